// Host tensors as rows of 16-bit floats.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "splitfuse/types.h"
#include "splitfuse/weights.h"

namespace splitfuse::cuda {

/// Rows [first, first + count) of a matrix [n, k], of any form, as kBF16 or kF16 at `out`, `stride` >= k elements from
/// row to row and zero behind k. Throws CheckpointError if a finite weight is beyond float16.
void convert_rows(const TensorView& matrix, int64_t first, int64_t count, DType to, int64_t stride, std::byte* out);

/// Elements [first, first + out.size()) of a tensor of floats as float32.
void convert_floats(const TensorView& tensor, int64_t first, std::span<float> out);

}  // namespace splitfuse::cuda
