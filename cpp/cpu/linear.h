// The linear layers of the CPU backend: which kernel, and which thread computes what.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

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

/// One of several multiplications that are done together.
struct LinearRows {
  const Linear* linear = nullptr;
  const void* in = nullptr;   // [rows, k], in the activations' format
  int32_t rows = 0;
  void* out = nullptr;        // [rows, n]
};

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
  void embed(const Linear& table, std::span<const Token> tokens, float scale, float* x);
  void embed_positions(const Linear& table, std::span<const int32_t> positions, int32_t offset, float* x);

  /// linear, linear_add and linear_act: out (epilogue) in W^T.
  void multiply(const Linear& linear, const void* in, int32_t rows, Epilogue epilogue, void* out);
  /// The same for linears of one format, at most as many as the experts that prepare() was told of, in one go: threads
  /// share all their panels.
  void multiply(std::span<const LinearRows> all, Epilogue epilogue);

 private:
  /// One linear's multiplication, cut up: its rows into blocks, its panels in each share into groups. A piece is a
  /// block times a group; pieces go through all groups with one block of rows before they come to the next.
  struct Part {
    GemmTask task;             // of all rows and panels
    int64_t in_row_bytes = 0;  // from one of its rows to the next
    int32_t row_bytes = 0;     // of one row as the kernel reads it
    int32_t panels = 0;
    int32_t block_rows = 0;
    int32_t row_blocks = 0;
    int32_t group_panels = 0;
    int64_t panel_cost = 0;    // of all rows against one panel
  };
  /// A place between two panels.
  struct Cut {
    int32_t part = 0;
    int32_t panel = 0;
  };
  /// A thread's own run of panels. It takes pieces from the front; so do others when theirs is done.
  struct alignas(64) Share {
    std::atomic<int32_t> next{0};
    int32_t pieces = 0;
    Cut begin;
    Cut end;
  };
  /// Some rows of a part.
  struct Block {
    int32_t part = -1;
    int32_t block = -1;
    bool operator==(const Block&) const = default;
  };
  struct Work;
  class Walk;

  PackedLayout layout(const LinearShape& shape) const { return {shape, dtype_, kernel(shape.format)}; }
  int64_t thread_bytes() const;
  Part part(const LinearRows& rows, Epilogue epilogue) const;
  void run(std::span<Part> parts, WeightFormat format);
  void prepare_row(const Work& work, const Part& part, const std::byte* in, std::byte* out) const;
  void prepare_rows(const Work& work);
  void divide_rows(const Work& work, int32_t panels, Part& part) const;
  void divide(const Work& work);
  void run_share(const Work& work, Share& share, float* scratch, Block& prepared) const;

  DType dtype_;
  ThreadPool& pool_;
  GemmTable table_;
  std::unique_ptr<Share[]> shares_;   // [threads]
  std::vector<Part> parts_;           // [experts]
  Memory scratch_;                    // [threads][thread_bytes()], then rows as records
};

}  // namespace splitfuse
