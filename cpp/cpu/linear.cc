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
/// Reading a panel takes about as long as the arithmetic of this many rows.
constexpr int32_t kReadRows = 12;
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

/// Multiplications that are done together.
struct LinearOps::Work {
  const GemmKernel& kernel;
  std::span<Part> parts;
  bool own = false;   // each thread makes rows as the kernel reads them from the parts' rows for itself
};

/// Finds the pieces of a share, asked for in ascending order.
class LinearOps::Walk {
 public:
  struct Piece {
    int32_t part = 0;
    int32_t block = 0;
    int32_t panel_begin = 0;
    int32_t panel_end = 0;
  };

  Walk(const Work& work, const Share& share) : work_(work), share_(share), part_(share.begin.part) {}

  Piece at(int32_t piece) {
    for (; piece >= before_ + pieces(); ++part_) before_ += pieces();
    const Part& part = work_.parts[static_cast<size_t>(part_)];
    const int32_t groups = pieces() / part.row_blocks;
    const int32_t begin = first() + (piece - before_) % groups * part.group_panels;
    return {part_, (piece - before_) / groups, begin, std::min(begin + part.group_panels, past())};
  }
  int32_t all_pieces() {
    int32_t sum = 0;
    for (; part_ <= share_.end.part; ++part_) sum += pieces();
    return sum;
  }

 private:
  /// The share's panels of the part.
  int32_t first() const { return part_ == share_.begin.part ? share_.begin.panel : 0; }
  int32_t past() const {
    return part_ == share_.end.part ? share_.end.panel : work_.parts[static_cast<size_t>(part_)].panels;
  }
  int32_t pieces() const {
    const Part& part = work_.parts[static_cast<size_t>(part_)];
    return ceil_div(past() - first(), part.group_panels) * part.row_blocks;
  }

  const Work& work_;
  const Share& share_;
  int32_t part_;
  int32_t before_ = 0;   // pieces of the parts before
};

LinearOps::LinearOps(DType dtype, Isa isa, ThreadPool& pool)
    : dtype_(dtype), pool_(pool), table_(gemm_table(isa)), shares_(new Share[static_cast<size_t>(pool.size())]) {}

int64_t LinearOps::thread_bytes() const {
  const bool widens = kernel(WeightFormat::kDense).widen != nullptr;
  const int64_t sums = kSumFloats * int64_t{sizeof(float)};
  return round_up(sums + (widens ? kWidenFloats * int64_t{sizeof(float)} : kOwnBytes), int64_t{64});
}

int64_t LinearOps::scratch_bytes(const StepLimits& limits) const {
  int64_t records = 0;
  if (limits.integer_depth > 0) {
    const int64_t chosen = int64_t{limits.max_rows} * limits.experts_per_row;
    records = std::max(int64_t{limits.max_rows} * row_record(limits.integer_depth).bytes,
                       chosen * row_record(std::max(limits.expert_hidden, limits.expert_intermediate)).bytes);
  }
  return pool_.size() * thread_bytes() + records + limits.experts * int64_t{sizeof(Part)};
}

void LinearOps::prepare(const StepLimits& limits) {
  parts_.assign(static_cast<size_t>(limits.experts), {});
  scratch_ = Memory(scratch_bytes(limits) - limits.experts * int64_t{sizeof(Part)}, &pool_);
}

void LinearOps::pack(const Linear& linear, Rows which, int32_t row, const TensorView& weight) {
  pack_weight(linear, layout(linear), dtype_, which, row, weight, pool_);
}

void LinearOps::pack_bias(const Linear& linear, Rows which, int32_t row, const TensorView& bias) {
  splitfuse::pack_bias(linear, layout(linear), which, row, bias);
}

void LinearOps::embed(const Linear& table, std::span<const Token> tokens, float scale, float* x) {
  const PackedLayout packed = layout(table);
  pool_.run_parts(static_cast<int64_t>(tokens.size()), [&](int, int64_t first, int64_t past) {
    for (int64_t r = first; r < past; ++r) {
      float* const out = x + r * row_stride(table.k);
      unpack_row(table, packed, dtype_, tokens[static_cast<size_t>(r)], 0, table.k, out);
      for (int32_t k = 0; k < table.k; ++k) out[k] *= scale;
    }
  });
}

void LinearOps::embed_positions(const Linear& table, std::span<const int32_t> positions, int32_t offset, float* x) {
  constexpr int32_t kPart = 256;
  const PackedLayout packed = layout(table);
  pool_.run_parts(static_cast<int64_t>(positions.size()), [&](int, int64_t first, int64_t past) {
    for (int64_t r = first; r < past; ++r) {
      const int32_t row = offset + positions[static_cast<size_t>(r)];
      SPLITFUSE_ASSERT(row >= 0 && row < table.n);
      for (int32_t k = 0; k < table.k; k += kPart) {
        float part[kPart];
        const int32_t count = std::min(kPart, table.k - k);
        unpack_row(table, packed, dtype_, row, k, count, part);
        float* const out = x + r * row_stride(table.k) + k;
        for (int32_t i = 0; i < count; ++i) out[i] += part[i];
      }
    }
  });
}

/// `panels`: of all parts.
void LinearOps::divide_rows(const Work& work, int32_t panels, Part& part) const {
  const int32_t tile = work.kernel.row_tile;
  const auto room = static_cast<int32_t>(kRowBytes / std::min(part.row_bytes, kDepthBytes) / tile * tile);
  int32_t most_rows = std::min(room, kTaskRows / tile * tile);
  if (work.kernel.widen != nullptr) {
    most_rows = std::min(most_rows, static_cast<int32_t>(kWidenFloats * int64_t{sizeof(float)} / part.row_bytes));
    if (most_rows > tile) most_rows = most_rows / tile * tile;
  }
  SPLITFUSE_ASSERT(most_rows > 0);
  // With few panels for the threads there are, they share the rows.
  const int32_t blocks = std::max(ceil_div(part.task.rows, most_rows), ceil_div(4 * pool_.size(), panels));
  part.block_rows = std::min(round_up(ceil_div(part.task.rows, blocks), tile), most_rows);
  part.row_blocks = ceil_div(part.task.rows, part.block_rows);
  part.panel_cost = part.task.depth * (part.task.rows + int64_t{part.row_blocks} * kReadRows);
}

void LinearOps::divide(const Work& work) {
  int32_t panels = 0;
  int64_t cost = 0;
  for (const Part& part : work.parts) panels += part.panels;
  for (Part& part : work.parts) {
    divide_rows(work, panels, part);
    cost += part.panels * part.panel_cost;
  }
  const int32_t threads = pool_.size();
  for (Part& part : work.parts) {
    const int64_t group = cost * part.row_blocks / (int64_t{threads} * kPieces * part.panel_cost);
    part.group_panels = static_cast<int32_t>(std::clamp<int64_t>(group, 1, part.panels));
  }
  const auto last = static_cast<int32_t>(work.parts.size()) - 1;
  Cut cut;
  int64_t before = 0;   // cost of the parts before the cut's
  for (int32_t t = 0; t < threads; ++t) {
    Share& share = shares_[static_cast<size_t>(t)];
    share.begin = cut;
    const int64_t target = cost * (t + 1) / threads - before;
    int64_t passed = 0;
    for (const Part* part = &work.parts[static_cast<size_t>(cut.part)]; cut.part < last; ++part, ++cut.part) {
      const int64_t whole = part->panels * part->panel_cost;
      if (passed + whole > target) break;
      passed += whole;
    }
    before += passed;
    cut.panel = static_cast<int32_t>((target - passed) / work.parts[static_cast<size_t>(cut.part)].panel_cost);
    share.end = cut;
    share.pieces = Walk(work, share).all_pieces();
    share.next.store(0, std::memory_order_relaxed);
  }
}

/// One row as the kernel wants it, from one in the format of activations.
void LinearOps::prepare_row(const Work& work, const Part& part, const std::byte* in, std::byte* out) const {
  if (work.kernel.widen != nullptr) {
    work.kernel.widen(in, part.row_bytes / int64_t{sizeof(float)}, reinterpret_cast<float*>(out));
  } else if (dtype_ == DType::kBF16) {
    work.kernel.quantize_bf16(in, part.task.depth, out);
  } else {
    work.kernel.quantize_f32(in, part.task.depth, out);
  }
}

/// Prepares all rows, for all threads to read.
void LinearOps::prepare_rows(const Work& work) {
  std::byte* const prepared = scratch_.data() + pool_.size() * thread_bytes();
  int64_t rows = 0;
  for (const Part& part : work.parts) rows += part.task.rows;
  pool_.run_parts(rows, [&](int, int64_t first, int64_t past) {
    std::byte* out = prepared;
    int64_t before = 0;
    for (const Part& part : work.parts) {
      const auto* in = static_cast<const std::byte*>(part.task.in);
      const int64_t end = std::min<int64_t>(past - before, part.task.rows);
      for (int64_t r = std::max<int64_t>(first - before, 0); r < end; ++r) {
        prepare_row(work, part, in + r * part.in_row_bytes, out + r * part.row_bytes);
      }
      before += part.task.rows;
      out += int64_t{part.task.rows} * part.row_bytes;
    }
  });
  std::byte* next = prepared;
  for (Part& part : work.parts) {
    part.task.in = next;
    part.task.in_stride = part.in_row_bytes = part.row_bytes;
    next += int64_t{part.task.rows} * part.row_bytes;
  }
  SPLITFUSE_ASSERT(next <= scratch_.data() + scratch_.size());
}

/// `prepared`: the part and block of rows that stand in scratch as the kernel wants them, where each thread sees to
/// that itself.
void LinearOps::run_share(const Work& work, Share& share, float* scratch, Block& prepared) const {
  Walk walk(work, share);
  for (;;) {
    const int32_t number = share.next.fetch_add(1, std::memory_order_relaxed);
    if (number >= share.pieces) return;
    const Walk::Piece piece = walk.at(number);
    const Part& part = work.parts[static_cast<size_t>(piece.part)];
    const int32_t row = piece.block * part.block_rows;
    GemmTask task = part.task;
    task.sums = scratch;
    task.rows = std::min(part.block_rows, task.rows - row);
    task.panel_begin = piece.panel_begin;
    task.panel_end = piece.panel_end;
    const auto* in = static_cast<const std::byte*>(task.in) + row * part.in_row_bytes;
    const int64_t out_bytes = task.epilogue == Epilogue::kAct ? dtype_size(dtype_) : int64_t{sizeof(float)};
    task.out = static_cast<std::byte*>(task.out) + row * task.out_stride * out_bytes;
    task.in = in;
    if (work.own) {
      auto* const rows = reinterpret_cast<std::byte*>(scratch + kSumFloats);
      const Block block = {piece.part, piece.block};
      for (int64_t r = 0; r < task.rows && prepared != block; ++r) {
        prepare_row(work, part, in + r * part.in_row_bytes, rows + r * part.row_bytes);
      }
      prepared = block;
      task.in = rows;
      task.in_stride = work.kernel.widen != nullptr ? part.row_bytes / int64_t{sizeof(float)} : part.row_bytes;
    }
    work.kernel.multiply(task);
  }
}

LinearOps::Part LinearOps::part(const LinearRows& rows, Epilogue epilogue) const {
  const Linear& linear = *rows.linear;
  SPLITFUSE_ASSERT(!linear.gated || epilogue == Epilogue::kAct);
  SPLITFUSE_ASSERT(linear.gated || linear.activation != Activation::kSwigluClamped);
  const PackedLayout packed = layout(linear);
  Part part;
  part.task = {.in = rows.in,
               .in_stride = row_stride(linear.k),
               .rows = rows.rows,
               .panels = linear.data,
               .bias = linear.bias ? reinterpret_cast<const float*>(linear.data + packed.bias_offset()) : nullptr,
               .depth = linear.k,
               .columns = linear.n,
               .out = rows.out,
               .out_stride = row_stride(linear.n),
               .epilogue = epilogue,
               .gated = linear.gated,
               .activation = linear.activation};
  part.panels = packed.panels();
  part.in_row_bytes = row_stride(linear.k) * dtype_size(dtype_);
  if (linear.format != WeightFormat::kDense) {
    part.row_bytes = row_record(linear.k).bytes;
    part.task.narrow = dtype_ == DType::kBF16;
  } else {
    const bool widens = kernel(linear.format).widen != nullptr;
    const int64_t element = widens ? int64_t{sizeof(float)} : dtype_size(dtype_);
    part.row_bytes = static_cast<int32_t>((widens ? round_up(linear.k, 2) : linear.k) * element);
  }
  return part;
}

void LinearOps::run(std::span<Part> parts, WeightFormat format) {
  SPLITFUSE_ASSERT(scratch_.size() > 0);
  Work work = {kernel(format), parts};
  if (format == WeightFormat::kDense) {
    work.own = work.kernel.widen != nullptr;
  } else {
    work.own = std::ranges::all_of(parts, [](const Part& part) {
      return int64_t{part.task.rows} * row_record(part.task.depth).groups <= kOwnGroups;
    });
    if (!work.own) prepare_rows(work);
  }
  divide(work);
  pool_.run([&](int thread) {
    float* scratch = reinterpret_cast<float*>(scratch_.data() + thread * thread_bytes());
    Block prepared;
    for (int i = 0; i < pool_.size(); ++i) {
      run_share(work, shares_[static_cast<size_t>((thread + i) % pool_.size())], scratch, prepared);
    }
  });
}

void LinearOps::multiply(const Linear& linear, const void* in, int32_t rows, Epilogue epilogue, void* out) {
  if (rows == 0) return;
  Part one = part({&linear, in, rows, out}, epilogue);
  run({&one, 1}, linear.format);
}

void LinearOps::multiply(std::span<const LinearRows> all, Epilogue epilogue) {
  size_t count = 0;
  for (const LinearRows& rows : all) {
    if (rows.rows == 0) continue;
    SPLITFUSE_ASSERT(count < parts_.size() && rows.linear->format == all[0].linear->format);
    parts_[count++] = part(rows, epilogue);
  }
  if (count > 0) run(std::span(parts_).first(count), all[0].linear->format);
}

}  // namespace splitfuse
