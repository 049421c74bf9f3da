#include "cuda/gemm/convert.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "base/integer_rows.h"
#include "base/numeric.h"

namespace splitfuse::cuda {
namespace {

void floats_to(DType to, std::span<const float> row, uint16_t* out) {
  if (to == DType::kBF16) {
    std::transform(row.begin(), row.end(), out, float_to_bf16);
    return;
  }
  for (size_t i = 0; i < row.size(); ++i) {
    out[i] = float_to_f16(row[i]);
    if (std::isfinite(row[i]) && !std::isfinite(f16_to_float(out[i]))) {
      throw CheckpointError(cat("a weight of ", row[i], " is beyond float16: use dtype bfloat16"));
    }
  }
}

void row_as_floats(const TensorView& matrix, int64_t row, std::span<float> out) {
  if (matrix.format != WeightFormat::kDense) return row_to_f32(matrix, row, out.data());
  convert_floats(matrix, row * static_cast<int64_t>(out.size()), out);
}

}  // namespace

void convert_rows(const TensorView& matrix, int64_t first, int64_t count, DType to, int64_t stride, std::byte* out) {
  const int64_t depth = matrix.shape[1];
  const bool same = matrix.format == WeightFormat::kDense && matrix.dtype == to;
  std::vector<float> floats(same ? 0 : static_cast<size_t>(depth));
  for (int64_t r = 0; r < count; ++r) {
    auto* row = reinterpret_cast<uint16_t*>(out) + r * stride;
    if (same) {
      const auto* from = static_cast<const std::byte*>(matrix.data) + (first + r) * depth * 2;
      std::memcpy(row, from, static_cast<size_t>(depth) * 2);
    } else {
      row_as_floats(matrix, first + r, floats);
      floats_to(to, floats, row);
    }
    std::fill(row + depth, row + stride, uint16_t{0});
  }
}

void convert_floats(const TensorView& tensor, int64_t first, std::span<float> out) {
  const auto* bits = static_cast<const uint16_t*>(tensor.data) + first;
  switch (tensor.dtype) {
    case DType::kF32:
      std::memcpy(out.data(), static_cast<const float*>(tensor.data) + first, out.size_bytes());
      break;
    case DType::kBF16:
      std::transform(bits, bits + out.size(), out.begin(), bf16_to_float);
      break;
    case DType::kF16:
      std::transform(bits, bits + out.size(), out.begin(), f16_to_float);
      break;
  }
}

}  // namespace splitfuse::cuda
