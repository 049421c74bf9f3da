#include "model/checkpoint_layout.h"

#include "base/integer_rows.h"
#include "model/safetensors.h"

namespace splitfuse {
namespace {

constexpr const char* kScale = ".scale";
constexpr const char* kMinimum = ".minimum";

std::vector<StoredPart> parts_of(const LaidOut& tensor, DType dtype) {
  const auto& [name, shape, format, none] = tensor;
  if (format == WeightFormat::kDense) {
    int64_t bytes = dtype_size(dtype);
    for (const int64_t extent : shape) bytes *= extent;
    return {{name, safetensors_dtype(dtype), shape, bytes}};
  }
  const int64_t n = shape[0];
  const int64_t bytes = n * row_bytes(format, dtype, shape[1]);
  const int64_t groups = row_scales(format, shape[1]);
  const int64_t halves = n * groups * int64_t{sizeof(uint16_t)};
  if (format == WeightFormat::kInt8) {
    return {{name, "I8", shape, bytes}, {name + kScale, "F16", {n, groups}, halves}};
  }
  return {{name, "U8", {n, groups, kWeightGroup / 2}, bytes},
          {name + kScale, "F16", {n, groups}, halves},
          {name + kMinimum, "F16", {n, groups}, halves}};
}

}  // namespace

WeightFormat matrix_format(const std::string& name, WeightFormat quantize) {
  // What chooses, or is only added, is small beside the rest.
  if (name.ends_with(".router.weight") || name.ends_with(".shared_gate.weight") || name == "embed_positions.weight") {
    return WeightFormat::kDense;
  }
  const bool table = name == "embed.weight" || name == "lm_head.weight";
  return table && quantize == WeightFormat::kInt4 ? WeightFormat::kInt8 : quantize;
}

std::vector<LaidOut> checkpoint_layout(const ModelConfig& config, WeightFormat quantize, DType dtype) {
  std::vector<LaidOut> layout;
  for (const auto& [name, shape] : weight_shapes(config)) {
    LaidOut tensor{name, shape, shape.size() == 2 ? matrix_format(name, quantize) : WeightFormat::kDense, {}};
    tensor.parts = parts_of(tensor, dtype);
    layout.push_back(std::move(tensor));
  }
  return layout;
}

}  // namespace splitfuse
