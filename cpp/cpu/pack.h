// Weights in and out of the panels that gemm.h describes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"
#include "base/thread_pool.h"
#include "cpu/gemm.h"
#include "splitfuse/types.h"
#include "splitfuse/weights.h"

namespace splitfuse {

/// Where the parts of a packed linear lie: panels first, then the bias as f32, one for each packed column. `dtype`: of
/// kDense weights.
class PackedLayout {
 public:
  /// For panels as `kernel` reads them, whose width is a multiple of 2 kGateGroup.
  PackedLayout(const LinearShape& shape, DType dtype, const GemmKernel& kernel);

  int32_t width() const { return width_; }
  int32_t together() const { return together_; }
  /// Where weight k of a column lies in its panel, or in its group of one where weights are integers, in elements.
  int64_t place(int32_t k, int32_t column) const {
    const int32_t within = k & (together_ - 1);
    return int64_t{k - within} * width_ + column * together_ + within;
  }
  int32_t panels() const { return panels_; }
  int64_t panel_bytes() const { return panel_bytes_; }
  int64_t bias_offset() const { return panels_ * panel_bytes_; }
  int64_t bytes() const { return bytes_; }
  /// The packed column of a row of the weight matrix: groups of gate and up alternate in a gated linear.
  int32_t column(Rows which, int32_t row) const {
    if (!gated_) return row;
    return row / kGateGroup * (2 * kGateGroup) + (which == Rows::kUp ? kGateGroup : 0) + row % kGateGroup;
  }
  /// Rows of each matrix that one panel holds.
  int32_t rows_of_panel() const { return gated_ ? width_ / 2 : width_; }

 private:
  int32_t width_;
  int32_t together_;
  bool gated_;
  int32_t panels_;
  int64_t panel_bytes_;
  int64_t bytes_;
};

/// Writes a matrix [rows, k] to rows [row, row + rows) of `linear`, rounded to nearest even, quantized, or integers as
/// they are where both have the same format. What the tensor does not cover stays as it is. Throws InvalidArgument if
/// it does not fit.
void pack_weight(const Linear& linear, const PackedLayout& layout, DType dtype, Rows which, int32_t row,
                 const TensorView& weight, ThreadPool& pool);
/// The same for a bias [rows].
void pack_bias(const Linear& linear, const PackedLayout& layout, Rows which, int32_t row, const TensorView& bias);
/// A tensor of f32, bf16 or f16 as f32.
void to_f32(const TensorView& tensor, float* out);
/// Columns [first, first + count) of row `row` of a linear that is not gated, as f32 [count].
void unpack_row(const Linear& linear, const PackedLayout& layout, DType dtype, int32_t row, int32_t first,
                int32_t count, float* out);

}  // namespace splitfuse
