// What TMA must know of a matrix to copy boxes of it into shared memory.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace splitfuse::cuda {

/// Of a matrix [rows, depth] of 16-bit floats, `stride` elements from row to row, a multiple of 8, at a multiple of 16
/// bytes. Boxes are [box_rows, 64], box_rows <= 256, laid down in 128-byte rows with the 128-byte swizzle; what lies
/// outside the matrix reads as zero. Throws Error if the driver refuses.
CUtensorMap tensor_map(const void* data, bool half, int64_t rows, int32_t depth, int64_t stride, int32_t box_rows);

}  // namespace splitfuse::cuda
