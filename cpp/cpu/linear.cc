#include "cpu/linear.h"

#include <algorithm>

#include "base/check.h"

namespace splitfuse {
namespace {

/// A block of k of a task's rows takes about this much, so that it stays in the second cache beside one of a panel
/// while panel after panel passes by.
constexpr int64_t kRowBytes = 448 << 10;
/// A thread's room for rows widened to f32.
constexpr int64_t kWidenFloats = 256 << 10;
/// Pieces of a thread's share: small enough that a thread that was held up can be helped.
constexpr int32_t kPieces = 8;

}  // namespace

GemmTable gemm_table(Isa isa) {
  GemmTable table;
  add_gemm_ref(table);
#if defined(__x86_64__)
  if (isa >= Isa::kAvx2) add_gemm_avx2(table);
  if (isa >= Isa::kAvx512) add_gemm_avx512(table);
  if (isa >= Isa::kAvx512Bf16) add_gemm_avx512_bf16(table);
#endif
  return table;
}

/// One multiplication, cut up: the rows into blocks, each share into groups of panels. A piece is a block times a
/// group; pieces go through all groups with one block of rows before they come to the next.
struct LinearOps::Work {
  GemmTask task;             // of all rows and panels
  int32_t row_bytes = 0;     // of one row as the kernel reads it
  int32_t block_rows = 0;
  int32_t row_blocks = 0;
  int32_t group_panels = 0;
  int32_t panels = 0;
};

LinearOps::LinearOps(DType dtype, Isa isa, ThreadPool& pool)
    : dtype_(dtype), pool_(pool), kernel_(dtype == DType::kBF16 ? gemm_table(isa).bf16 : gemm_table(isa).f32),
      shares_(new Share[static_cast<size_t>(pool.size())]) {}

int64_t LinearOps::thread_floats() const { return kSumFloats + (kernel_.widen != nullptr ? kWidenFloats : 0); }

int64_t LinearOps::scratch_bytes() const { return pool_.size() * thread_floats() * int64_t{sizeof(float)}; }

void LinearOps::prepare() { scratch_ = Memory(scratch_bytes()); }

void LinearOps::pack(const Linear& linear, Rows which, int32_t row, const TensorView& weight) {
  pack_weight(linear, layout(linear), dtype_, which, row, weight, pool_);
}

void LinearOps::pack_bias(const Linear& linear, Rows which, int32_t row, const TensorView& bias) {
  splitfuse::pack_bias(linear, layout(linear), which, row, bias);
}

void LinearOps::embed(const Linear& table, std::span<const Token> tokens, float* x) {
  const PackedLayout packed = layout(table);
  const auto rows = static_cast<int32_t>(tokens.size());
  pool_.run([&](int thread) {
    for (int32_t r = thread; r < rows; r += pool_.size()) {
      unpack_row(table, packed, dtype_, tokens[static_cast<size_t>(r)], x + r * row_stride(table.k));
    }
  });
}

void LinearOps::divide(Work& work) {
  const int32_t tile = kernel_.row_tile;
  const auto room = static_cast<int32_t>(kRowBytes / std::min(work.row_bytes, kDepthBytes) / tile * tile);
  int32_t most_rows = std::min(room, kTaskRows / tile * tile);
  if (kernel_.widen != nullptr) {
    most_rows = std::min(most_rows, static_cast<int32_t>(kWidenFloats * int64_t{sizeof(float)} / work.row_bytes));
    if (most_rows > tile) most_rows = most_rows / tile * tile;
  }
  SPLITFUSE_ASSERT(most_rows > 0);
  // With few panels for the threads there are, they share the rows.
  const int32_t threads = pool_.size();
  const int32_t blocks = std::max(ceil_div(work.task.rows, most_rows), ceil_div(4 * threads, work.panels));
  work.block_rows = std::min(round_up(ceil_div(work.task.rows, blocks), tile), most_rows);
  work.row_blocks = ceil_div(work.task.rows, work.block_rows);
  work.group_panels = std::max(work.panels * work.row_blocks / (threads * kPieces), 1);
  for (int32_t t = 0; t < threads; ++t) {
    Share& share = shares_[static_cast<size_t>(t)];
    share.panel_begin = static_cast<int32_t>(int64_t{work.panels} * t / threads);
    share.panel_end = static_cast<int32_t>(int64_t{work.panels} * (t + 1) / threads);
    share.pieces = ceil_div(share.panel_end - share.panel_begin, work.group_panels) * work.row_blocks;
    share.next.store(0, std::memory_order_relaxed);
  }
}

/// `widened`: the block of rows that stands in scratch as f32.
void LinearOps::run_piece(const Work& work, const Share& share, int32_t piece, float* scratch, int32_t& widened) const {
  const int32_t groups = share.pieces / work.row_blocks;
  const int32_t block = piece / groups;
  const int32_t group = piece % groups;
  const int32_t row = block * work.block_rows;
  GemmTask task = work.task;
  task.sums = scratch;
  task.rows = std::min(work.block_rows, task.rows - row);
  task.panel_begin = share.panel_begin + group * work.group_panels;
  task.panel_end = std::min(task.panel_begin + work.group_panels, share.panel_end);
  const int64_t in_bytes = dtype_size(dtype_);
  const auto* in = static_cast<const std::byte*>(task.in) + row * task.in_stride * in_bytes;
  const int64_t out_bytes = task.epilogue == Epilogue::kGate ? in_bytes : int64_t{sizeof(float)};
  task.out = static_cast<std::byte*>(task.out) + row * task.out_stride * out_bytes;
  task.in = in;
  if (kernel_.widen != nullptr) {
    float* wide = scratch + kSumFloats;
    const int64_t stride = work.row_bytes / int64_t{sizeof(float)};
    for (int32_t r = 0; r < task.rows && widened != block; ++r) {
      kernel_.widen(in + r * task.in_stride * in_bytes, stride, wide + r * stride);
    }
    widened = block;
    task.in = wide;
    task.in_stride = stride;
  }
  kernel_.multiply(task);
}

void LinearOps::multiply(const Linear& linear, const void* in, int32_t rows, Epilogue epilogue, void* out) {
  if (rows == 0) return;
  SPLITFUSE_ASSERT(scratch_.size() > 0);
  SPLITFUSE_ASSERT(linear.gated == (epilogue == Epilogue::kGate));
  const PackedLayout packed = layout(linear);
  Work work;
  work.task = {.in = in,
               .in_stride = row_stride(linear.k),
               .rows = rows,
               .panels = linear.data,
               .bias = linear.bias ? reinterpret_cast<const float*>(linear.data + packed.bias_offset()) : nullptr,
               .depth = linear.k,
               .columns = linear.n,
               .out = out,
               .out_stride = row_stride(linear.n),
               .epilogue = epilogue};
  work.panels = packed.panels();
  work.row_bytes = kernel_.widen != nullptr ? round_up(linear.k, 2) * static_cast<int32_t>(sizeof(float))
                                            : static_cast<int32_t>(linear.k * dtype_size(dtype_));
  divide(work);
  pool_.run([&](int thread) {
    float* scratch = reinterpret_cast<float*>(scratch_.data()) + thread * thread_floats();
    int32_t widened = -1;
    for (int i = 0; i < pool_.size(); ++i) {
      Share& share = shares_[static_cast<size_t>((thread + i) % pool_.size())];
      for (;;) {
        const int32_t piece = share.next.fetch_add(1, std::memory_order_relaxed);
        if (piece >= share.pieces) break;
        run_piece(work, share, piece, scratch, widened);
      }
    }
  });
}

}  // namespace splitfuse
