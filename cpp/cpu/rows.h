// Operations on whole rows.
#pragma once

#include <cstdint>
#include <span>

#include "base/thread_pool.h"
#include "cpu/isa.h"
#include "cpu/row_kernels.h"
#include "splitfuse/types.h"

namespace splitfuse {

class RowOps {
 public:
  RowOps(DType dtype, Isa isa, ThreadPool& pool);

  Isa kernel_isa() const { return kernels_.isa; }

  /// out [count, columns] = x / rms(x) * weight. `rows` empty: the first `count` rows of x; else its rows `rows`,
  /// closed up, and `count` is not looked at.
  void rms_norm(const float* x, const float* weight, float eps, int32_t columns, int32_t count,
                std::span<const int32_t> rows, void* out);

 private:
  DType dtype_;
  ThreadPool& pool_;
  RowKernels kernels_;
};

}  // namespace splitfuse
