// The canonical checkpoint: one safetensors file, tensors under their canonical names in loading order, the
// configuration in its metadata. A matrix of integers is several tensors (TensorView says what they mean):
//
//   NAME          int8: I8 [n, k]     int4: U8 [n, groups, 16]
//   NAME.scale          F16 [n, groups]     F16 [n, groups]
//   NAME.minimum                            F16 [n, groups]
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "splitfuse/config.h"
#include "splitfuse/weights.h"

namespace splitfuse {

namespace checkpoint_keys {
inline constexpr const char* kFormat = "format";
inline constexpr const char* kVersion = "splitfuse.version";
inline constexpr const char* kConfig = "splitfuse.config";
inline constexpr const char* kQuantize = "splitfuse.quantize";   // only where matrices are integers
}  // namespace checkpoint_keys
/// What stands under kFormat.
inline constexpr const char* kCheckpointFormat = "splitfuse";

/// The format of a matrix in a model that is quantized to `quantize`.
WeightFormat matrix_format(const std::string& name, WeightFormat quantize);

/// A tensor as the file has it.
struct StoredPart {
  std::string name;
  const char* dtype;   // the format's word
  std::vector<int64_t> shape;
  int64_t bytes;
};
/// One tensor of the model and what it is in the file: itself, or the parts of a matrix of integers.
struct LaidOut {
  std::string name;
  std::vector<int64_t> shape;
  WeightFormat format = WeightFormat::kDense;
  std::vector<StoredPart> parts;
};

/// Every tensor of the model, in the file's order. `dtype`: of those that are not integers.
std::vector<LaidOut> checkpoint_layout(const ModelConfig& config, WeightFormat quantize, DType dtype);

}  // namespace splitfuse
