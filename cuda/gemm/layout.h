// How a Linear lies in device memory: its rows as GemmTask has them, then its bias as f32.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backend/backend.h"
#include "base/check.h"
#include "cuda/gemm/gemm.h"

namespace splitfuse::cuda {

class DenseLayout {
 public:
  explicit DenseLayout(const LinearShape& shape)
      : gated_(shape.gated), rows_(shape.gated ? 2 * round_up(shape.n, kGateGroup) : shape.n),
        stride_(round_up(shape.k, 8)),
        // Kernels read biases four at a time.
        bias_bytes_(shape.bias ? round_up(rows_, 4) * int64_t{4} : 0) {}

  /// Rows of weights: 2 for each output of a gated linear.
  int32_t rows() const { return rows_; }
  /// Elements from row to row.
  int32_t stride() const { return stride_; }
  int64_t row_bytes() const { return stride_ * int64_t{2}; }
  int64_t bias_offset() const { return round_up<int64_t>(rows_ * row_bytes(), 64); }
  int64_t bytes() const { return round_up<int64_t>(bias_offset() + bias_bytes_, 64); }

  /// Where row `row` of a matrix lies.
  int32_t place(Rows which, int32_t row) const {
    if (!gated_) return row;
    return row / kGateGroup * 2 * kGateGroup + row % kGateGroup + (which == Rows::kUp ? kGateGroup : 0);
  }
  /// Rows from `row` on, of `count`, that lie next to each other.
  int32_t run(int32_t row, int32_t count) const {
    return gated_ ? std::min(count, kGateGroup - row % kGateGroup) : count;
  }

 private:
  bool gated_;
  int32_t rows_;
  int32_t stride_;
  int64_t bias_bytes_;
};

}  // namespace splitfuse::cuda
