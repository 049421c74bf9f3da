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
/// Rows of up to this many groups in all are quantized by each thread for itself, which spares a fork and join.
constexpr int32_t kOwnGroups = 96;
constexpr int64_t kOwnBytes = int64_t{64} * kOwnGroups;   // a record of one group takes 64

}  // namespace

GemmTable gemm_table(Isa isa) {
  GemmTable table;
  add_gemm_ref(table);
  add_integer_gemm_ref(table);
#if defined(__x86_64__)
  if (isa >= Isa::kAvx2) add_gemm_avx2(table);
  if (isa >= Isa::kAvx2) add_integer_gemm_avx2(table);
  if (isa == Isa::kAvxVnni) add_integer_gemm_avx_vnni(table);
  if (isa >= Isa::kAvx512) add_gemm_avx512(table);
  if (isa >= Isa::kAvx512) add_integer_gemm_avx512(table);
  if (isa >= Isa::kAvx512Vnni) add_integer_gemm_avx512_vnni(table);
  if (isa >= Isa::kAvx512Bf16) add_gemm_avx512_bf16(table);
#elif defined(__aarch64__)
  if (isa >= Isa::kNeon) add_gemm_neon(table);
  if (isa >= Isa::kNeon) add_integer_gemm_neon(table);
  if (isa >= Isa::kNeonBf16) add_gemm_neon_bf16(table);
  if (isa >= Isa::kNeonI8mm) add_integer_gemm_neon_i8mm(table);
#else
  (void)isa;
#endif
  return table;
}

const GemmKernel& gemm_kernel(const GemmTable& table, DType dtype, WeightFormat format) {
  switch (format) {
    case WeightFormat::kDense:
      break;
    case WeightFormat::kInt8:
      return table.int8;
    case WeightFormat::kInt4:
      return table.int4;
  }
  return dtype == DType::kBF16 ? table.bf16 : table.f32;
}

/// One multiplication, cut up: the rows into blocks, each share into groups of panels. A piece is a block times a
/// group; pieces go through all groups with one block of rows before they come to the next.
struct LinearOps::Work {
  const GemmKernel& kernel;
  GemmTask task;             // of all rows and panels
  int64_t in_row_bytes = 0;  // from one of its rows to the next
  int32_t row_bytes = 0;     // of one row as the kernel reads it
  bool own = false;          // each thread makes these from the task's rows for itself
  int32_t block_rows = 0;
  int32_t row_blocks = 0;
  int32_t group_panels = 0;
  int32_t panels = 0;
};

LinearOps::LinearOps(DType dtype, Isa isa, ThreadPool& pool)
    : dtype_(dtype), pool_(pool), table_(gemm_table(isa)), shares_(new Share[static_cast<size_t>(pool.size())]) {}

int64_t LinearOps::thread_bytes() const {
  const bool widens = kernel(WeightFormat::kDense).widen != nullptr;
  const int64_t sums = kSumFloats * int64_t{sizeof(float)};
  return round_up(sums + (widens ? kWidenFloats * int64_t{sizeof(float)} : kOwnBytes), int64_t{64});
}

int64_t LinearOps::scratch_bytes(const StepLimits& limits) const {
  const int64_t records =
      limits.integer_depth > 0 ? int64_t{limits.max_rows} * row_record(limits.integer_depth).bytes : 0;
  return pool_.size() * thread_bytes() + records;
}

void LinearOps::prepare(const StepLimits& limits) { scratch_ = Memory(scratch_bytes(limits), &pool_); }

void LinearOps::pack(const Linear& linear, Rows which, int32_t row, const TensorView& weight) {
  pack_weight(linear, layout(linear), dtype_, which, row, weight, pool_);
}

void LinearOps::pack_bias(const Linear& linear, Rows which, int32_t row, const TensorView& bias) {
  splitfuse::pack_bias(linear, layout(linear), which, row, bias);
}

void LinearOps::embed(const Linear& table, std::span<const Token> tokens, float* x) {
  const PackedLayout packed = layout(table);
  pool_.run_parts(static_cast<int64_t>(tokens.size()), [&](int, int64_t first, int64_t past) {
    for (int64_t r = first; r < past; ++r) {
      unpack_row(table, packed, dtype_, tokens[static_cast<size_t>(r)], x + r * row_stride(table.k));
    }
  });
}

void LinearOps::divide(Work& work) {
  const int32_t tile = work.kernel.row_tile;
  const auto room = static_cast<int32_t>(kRowBytes / std::min(work.row_bytes, kDepthBytes) / tile * tile);
  int32_t most_rows = std::min(room, kTaskRows / tile * tile);
  if (work.kernel.widen != nullptr) {
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

/// One row as the kernel wants it, from one in the format of activations.
void LinearOps::prepare_row(const Work& work, const std::byte* in, std::byte* out) const {
  if (work.kernel.widen != nullptr) {
    work.kernel.widen(in, work.row_bytes / int64_t{sizeof(float)}, reinterpret_cast<float*>(out));
  } else if (dtype_ == DType::kBF16) {
    work.kernel.quantize_bf16(in, work.task.depth, out);
  } else {
    work.kernel.quantize_f32(in, work.task.depth, out);
  }
}

/// Prepares all rows, for all threads to read.
void LinearOps::prepare_rows(Work& work) {
  std::byte* const prepared = scratch_.data() + pool_.size() * thread_bytes();
  const auto* in = static_cast<const std::byte*>(work.task.in);
  const int64_t rows = work.task.rows;
  SPLITFUSE_ASSERT(prepared + rows * work.row_bytes <= scratch_.data() + scratch_.size());
  pool_.run_parts(rows, [&](int, int64_t first, int64_t past) {
    for (int64_t r = first; r < past; ++r) {
      prepare_row(work, in + r * work.in_row_bytes, prepared + r * work.row_bytes);
    }
  });
  work.task.in = prepared;
  work.task.in_stride = work.in_row_bytes = work.row_bytes;
}

/// `prepared`: the block of rows that stands in scratch as the kernel wants it, where each thread sees to that itself.
void LinearOps::run_piece(const Work& work, const Share& share, int32_t piece, float* scratch,
                          int32_t& prepared) const {
  const int32_t groups = share.pieces / work.row_blocks;
  const int32_t block = piece / groups;
  const int32_t group = piece % groups;
  const int32_t row = block * work.block_rows;
  GemmTask task = work.task;
  task.sums = scratch;
  task.rows = std::min(work.block_rows, task.rows - row);
  task.panel_begin = share.panel_begin + group * work.group_panels;
  task.panel_end = std::min(task.panel_begin + work.group_panels, share.panel_end);
  const auto* in = static_cast<const std::byte*>(task.in) + row * work.in_row_bytes;
  const int64_t out_bytes = task.epilogue == Epilogue::kGate ? dtype_size(dtype_) : int64_t{sizeof(float)};
  task.out = static_cast<std::byte*>(task.out) + row * task.out_stride * out_bytes;
  task.in = in;
  if (work.own) {
    auto* const rows = reinterpret_cast<std::byte*>(scratch + kSumFloats);
    for (int64_t r = 0; r < task.rows && prepared != block; ++r) {
      prepare_row(work, in + r * work.in_row_bytes, rows + r * work.row_bytes);
    }
    prepared = block;
    task.in = rows;
    task.in_stride = work.kernel.widen != nullptr ? work.row_bytes / int64_t{sizeof(float)} : work.row_bytes;
  }
  work.kernel.multiply(task);
}

void LinearOps::multiply(const Linear& linear, const void* in, int32_t rows, Epilogue epilogue, void* out) {
  if (rows == 0) return;
  SPLITFUSE_ASSERT(scratch_.size() > 0);
  SPLITFUSE_ASSERT(linear.gated == (epilogue == Epilogue::kGate));
  const PackedLayout packed = layout(linear);
  Work work = {kernel(linear.format), {}};
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
  work.in_row_bytes = row_stride(linear.k) * dtype_size(dtype_);
  if (linear.format != WeightFormat::kDense) {
    work.row_bytes = row_record(linear.k).bytes;
    work.own = int64_t{rows} * row_record(linear.k).groups <= kOwnGroups;
    work.task.narrow = dtype_ == DType::kBF16;
    if (!work.own) prepare_rows(work);
  } else {
    work.own = work.kernel.widen != nullptr;
    const int64_t element = work.own ? int64_t{sizeof(float)} : dtype_size(dtype_);
    work.row_bytes = static_cast<int32_t>((work.own ? round_up(linear.k, 2) : linear.k) * element);
  }
  divide(work);
  pool_.run([&](int thread) {
    float* scratch = reinterpret_cast<float*>(scratch_.data() + thread * thread_bytes());
    int32_t prepared = -1;
    for (int i = 0; i < pool_.size(); ++i) {
      Share& share = shares_[static_cast<size_t>((thread + i) % pool_.size())];
      for (;;) {
        const int32_t piece = share.next.fetch_add(1, std::memory_order_relaxed);
        if (piece >= share.pieces) break;
        run_piece(work, share, piece, scratch, prepared);
      }
    }
  });
}

}  // namespace splitfuse
