// Operations on whole rows.
#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "base/thread_pool.h"
#include "cpu/isa.h"
#include "cpu/row_kernels.h"
#include "splitfuse/types.h"

namespace splitfuse {

class RowOps {
 public:
  RowOps(DType dtype, Isa isa, ThreadPool& pool);

  Isa kernel_isa() const { return kernels_.isa; }

  /// As Backend's operations of these names. `count`: rows of x.
  void norm(const Norm& norm, const float* x, int32_t count, std::span<const int32_t> rows, void* out);
  void norm_in_place(const Norm& norm, int32_t count, float* x);
  void add(const Norm& norm, const float* y, float scale, int32_t count, float* x);
  void scale_logits(float* logits, int32_t count, int32_t vocab, float scale, float softcap);

 private:
  DType dtype_;
  ThreadPool& pool_;
  RowKernels kernels_;
};

}  // namespace splitfuse
