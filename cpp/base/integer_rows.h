// Matrices as integers, row by row, in the forms of TensorView.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "splitfuse/types.h"
#include "splitfuse/weights.h"

namespace splitfuse {

/// Bytes of one row of `depth` weights, scales and minima apart. `dtype`: of kDense.
int64_t row_bytes(WeightFormat format, DType dtype, int64_t depth);
/// Scales (and minima) of one row.
int64_t row_scales(WeightFormat format, int64_t depth);

/// Rows [first, first + count) of a matrix.
TensorView row_range(const TensorView& matrix, int64_t first, int64_t count);

/// What row `row` of a matrix [n, k] of any form stands for, as f32 [k].
void row_to_f32(const TensorView& matrix, int64_t row, float* out);

/// One row as kInt8 or kInt4, scales and minima in half precision.
class IntegerRow {
 public:
  IntegerRow(WeightFormat format, int64_t depth);

  /// Takes over row `row` of `matrix` [n, depth] if that has this form; otherwise quantizes it. int8: each 32 by their
  /// largest magnitude, symmetric. int4: each 32 get the scale and minimum that fit them best (see fit_int4 in the
  /// source). Those of a group that holds a NaN or an infinity become NaN.
  void set(const TensorView& matrix, int64_t row);

  /// Whether a scale or minimum is too large for half precision.
  bool overflows() const;

  std::span<const std::byte> codes() const { return codes_; }
  std::span<const std::byte> scales() const { return scales_; }
  std::span<const std::byte> minima() const { return minima_; }

 private:
  void take(const TensorView& matrix, int64_t row);
  WeightFormat format_;
  std::vector<float> floats_;
  std::vector<std::byte> codes_;
  std::vector<std::byte> scales_;
  std::vector<std::byte> minima_;
};

}  // namespace splitfuse
