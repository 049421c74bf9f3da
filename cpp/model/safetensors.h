// One safetensors file: eight bytes of header length (little-endian), a JSON header that gives each tensor's dtype,
// shape and place, then the tensors' bytes, end to end. Format: github.com/huggingface/safetensors, README.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "model/mapped_file.h"
#include "splitfuse/types.h"

namespace splitfuse {

/// A tensor in a file: `size` bytes from the file's byte `begin`.
struct StoredTensor {
  std::string name;
  std::string dtype;   // as written: "F32", "BF16", "I64", ...
  std::vector<int64_t> shape;
  int64_t begin = 0;
  int64_t size = 0;
};

/// A mapped file whose header was checked in full: every tensor lies within the file, no two overlap, none leaves
/// a gap, and sizes are those of shape and dtype (for the dtypes the format names).
class SafetensorsFile {
 public:
  /// Throws CheckpointError, naming the file and the tensor, if any of that is not so.
  explicit SafetensorsFile(const std::string& path);

  const MappedFile& file() const { return file_; }
  /// In the order of their data.
  const std::vector<StoredTensor>& tensors() const { return tensors_; }
  /// Pairs of "__metadata__", in the file's order.
  const std::vector<std::pair<std::string, std::string>>& metadata() const { return metadata_; }

 private:
  void read_header();

  MappedFile file_;
  std::vector<StoredTensor> tensors_;
  std::vector<std::pair<std::string, std::string>> metadata_;
};

/// The format's word for a dtype: "F32", "BF16" or "F16".
const char* safetensors_dtype(DType dtype);

/// "[2, 3]".
std::string shape_text(const std::vector<int64_t>& shape);

}  // namespace splitfuse
