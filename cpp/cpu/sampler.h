// Chooses tokens from logits, one row at a time, by the rules of SamplingParams.
#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "base/memory.h"
#include "base/thread_pool.h"
#include "cpu/isa.h"
#include "cpu/row_kernels.h"

namespace splitfuse {

class Sampler {
 public:
  Sampler(Isa isa, ThreadPool& pool);

  Isa kernel_isa() const { return kernels_.isa; }

  /// Bytes that prepare() will take.
  int64_t scratch_bytes(const StepLimits& limits) const;
  void prepare(const StepLimits& limits);
  /// logits [rows.size()][row_stride(vocab)], overwritten. A row's result depends on that row alone.
  void sample(float* logits, std::span<const SampleRow> rows, std::span<SampleResult> results);

 private:
  ThreadPool& pool_;
  RowKernels kernels_;
  int32_t vocab_ = 0;
  int64_t thread_bytes_ = 0;
  Memory memory_;   // [threads][thread_bytes_]
};

}  // namespace splitfuse
