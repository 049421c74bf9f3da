// The linear layers of the CPU backend: which kernel, and which thread computes what.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>

#include "backend/backend.h"
#include "base/memory.h"
#include "base/thread_pool.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/pack.h"

namespace splitfuse {

/// The best kernels of every rung up to `isa`.
GemmTable gemm_table(Isa isa);
/// The kernels for weights of `format`, which is that of `dtype` activations where it is kDense.
const GemmKernel& gemm_kernel(const GemmTable& table, DType dtype, WeightFormat format);

class LinearOps {
 public:
  LinearOps(DType dtype, Isa isa, ThreadPool& pool);

  const GemmKernel& kernel(WeightFormat format) const { return gemm_kernel(table_, dtype_, format); }
  int64_t bytes(const LinearShape& shape) const { return layout(shape).bytes(); }
  /// Bytes that prepare() will take.
  int64_t scratch_bytes(const StepLimits& limits) const;
  void prepare(const StepLimits& limits);

  /// As Backend's operations of these names.
  void pack(const Linear& linear, Rows which, int32_t row, const TensorView& weight);
  void pack_bias(const Linear& linear, Rows which, int32_t row, const TensorView& bias);
  void embed(const Linear& table, std::span<const Token> tokens, float* x);

  /// linear, linear_add and linear_gated: out (epilogue) in W^T.
  void multiply(const Linear& linear, const void* in, int32_t rows, Epilogue epilogue, void* out);

 private:
  /// A thread's own run of panels. It takes pieces from the front; so do others when theirs is done.
  struct alignas(64) Share {
    std::atomic<int32_t> next{0};
    int32_t pieces = 0;
    int32_t panel_begin = 0;
    int32_t panel_end = 0;
  };
  struct Work;

  PackedLayout layout(const LinearShape& shape) const { return {shape, dtype_, kernel(shape.format)}; }
  int64_t thread_bytes() const;
  void prepare_row(const Work& work, const std::byte* in, std::byte* out) const;
  void prepare_rows(Work& work);
  void divide(Work& work);
  void run_piece(const Work& work, const Share& share, int32_t piece, float* scratch, int32_t& prepared) const;

  DType dtype_;
  ThreadPool& pool_;
  GemmTable table_;
  std::unique_ptr<Share[]> shares_;   // [threads]
  Memory scratch_;                    // [threads][thread_bytes()], then rows as records
};

}  // namespace splitfuse
