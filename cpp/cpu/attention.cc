#include "cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <numeric>

#include "base/check.h"

namespace splitfuse {
namespace {

// Query rows that a work item aims at: enough that reading K and V is cheap beside the arithmetic.
constexpr int32_t kItemRows = 48;
// Items each thread should get: splitting stops there.
constexpr int64_t kItemsPerThread = 4;
// An item of few rows costs as much as one of this many, because it waits for K and V.
constexpr int32_t kLeastCostRows = 8;
// Sequences of the greatest length that the room for partial states lets be split at once.
constexpr int64_t kSplitSequences = 4;

AttentionKernels make_attention_kernels(DType dtype, KvDType kv, Isa isa) {
  AttentionKernels kernels;
  attention_kernels_ref(dtype, kv, kernels);
#if defined(__x86_64__)
  if (isa >= Isa::kAvx2) attention_kernels_avx2(dtype, kv, kernels);
  if (isa >= Isa::kAvx512) attention_kernels_avx512(dtype, kv, kernels);
  if (isa >= Isa::kAvx512Bf16) attention_kernels_avx512_bf16(dtype, kv, kernels);
#elif defined(__aarch64__)
  if (isa >= Isa::kNeon) attention_kernels_neon(dtype, kv, kernels);
  if (isa >= Isa::kNeonBf16) attention_kernels_neon_bf16(dtype, kv, kernels);
#else
  (void)isa;
#endif
  return kernels;
}

KvLayout make_layout(const KvShape& shape, DType dtype) {
  SPLITFUSE_ASSERT(dtype == DType::kF32 || dtype == DType::kBF16);
  SPLITFUSE_ASSERT(shape.head_dim > 0 && shape.head_dim % 8 == 0);
  SPLITFUSE_ASSERT(shape.block_size > 0 && shape.block_size % kAttentionColumn == 0);
  KvLayout layout;
  const bool int8 = shape.dtype == KvDType::kInt8;
  const int64_t size = int8 ? 1 : dtype_size(dtype);
  layout.head_dim = shape.head_dim;
  layout.padded_dim = round_up(shape.head_dim, 16);
  layout.block_size = shape.block_size;
  layout.value_offset = size * shape.head_dim * shape.block_size;
  layout.scale_offset = layout.value_offset + size * layout.padded_dim * shape.block_size;
  layout.head_bytes = layout.scale_offset + (int8 ? 2 * int64_t{sizeof(float)} * shape.block_size : 0);
  layout.layer_bytes = layout.head_bytes * shape.kv_heads;
  layout.block_bytes = layout.layer_bytes * shape.layers;
  return layout;
}

// As many query positions as give whole register tiles and about kItemRows rows.
int32_t positions_per_item(int32_t group) {
  return round_up(ceil_div(kItemRows, group), kAttentionRows / std::gcd(kAttentionRows, group));
}

int32_t segments_of(int32_t keys) { return ceil_div(keys, kAttentionSegment); }

// Keys and values of one head at positions that lie in one column: [count][padded_dim], in the cache's format.
template <class Cell>
struct ColumnPart {
  const Cell* keys;
  const Cell* values;
  int64_t count;
};

// Writes them to a head's block, from its position `within` on.
template <class Cell>
void write_kv(const KvLayout& layout, std::byte* head, int64_t within, const ColumnPart<Cell>& part) {
  const int64_t stride = layout.padded_dim;
  auto* const values = reinterpret_cast<Cell*>(head + layout.value_offset);
  // In bfloat16 and int8 two dimensions of a key move as one.
  constexpr int64_t kTogether = sizeof(Cell) == 4 ? 1 : 2;
  for (int64_t d = 0; d < layout.head_dim; d += kTogether) {
    Cell* out = reinterpret_cast<Cell*>(head) + d * layout.block_size + within * kTogether;
    for (int64_t i = 0; i < part.count; ++i) {
      std::memcpy(out + i * kTogether, part.keys + i * stride + d, kTogether * sizeof(Cell));
    }
  }
  if constexpr (sizeof(Cell) == 4) {
    for (int64_t i = 0; i < part.count; ++i) {
      std::copy_n(part.values + i * stride, layout.head_dim, values + (within + i) * stride);
    }
  } else {
    for (int64_t i = 0; i < part.count; ++i) {
      const int64_t key = within + i;
      Cell* out = values + key / 2 * stride * 2;
      const Cell* in = part.values + i * stride;
      if (key % 2 == 0 && i + 1 < part.count) {
        for (int64_t d = 0; d < layout.head_dim; ++d) {
          out[2 * d] = in[d];
          out[2 * d + 1] = in[stride + d];
        }
        ++i;
      } else {
        for (int64_t d = 0; d < layout.head_dim; ++d) out[2 * d + key % 2] = in[d];
      }
    }
  }
}

}  // namespace

PagedAttention::PagedAttention(DType dtype, Isa isa, ThreadPool& pool) : dtype_(dtype), isa_(isa), pool_(pool) {}

Isa PagedAttention::kernel_isa(KvDType kv) const { return make_attention_kernels(dtype_, kv, isa_).isa; }

int64_t PagedAttention::block_bytes(const KvShape& shape, DType dtype) { return make_layout(shape, dtype).block_bytes; }

PagedAttention::Room PagedAttention::room(const AttentionShape& shape, const StepLimits& limits) const {
  const KvLayout layout = make_layout(shape.kv, dtype_);
  const int32_t group = shape.heads / shape.kv.kv_heads;
  const int32_t run = positions_per_item(group);
  Room room;
  room.angles = int64_t{limits.max_rows} * shape.kv.head_dim;
  // Between attentions it holds a column of rotated keys and of values, in int8 behind them one key in float32.
  room.thread = std::max(attention_scratch_floats(int64_t{run} * group, layout.padded_dim),
                         int64_t{2 * kAttentionColumn} * layout.padded_dim);
  room.partials = pool_.size() == 1 ? 0
                                    : kSplitSequences * segments_of(limits.max_context) * shape.kv.kv_heads *
                                          attention_state_floats(group, layout.padded_dim);
  // Parts of split runs number at most the items that are aimed at, and one more for each split run.
  room.splits = pool_.size() == 1 ? 0 : kItemsPerThread * pool_.size();
  room.entries = ceil_div(limits.max_rows, run) + limits.max_seqs + 2 * room.splits;
  return room;
}

int64_t PagedAttention::scratch_bytes(const AttentionShape& shape, const StepLimits& limits) const {
  const Room need = room(shape, limits);
  const int64_t floats = round_up(need.angles, int64_t{16}) + need.thread * pool_.size() + need.partials;
  return floats * int64_t{sizeof(float)} + need.entries * int64_t{sizeof(Entry)} +
         need.splits * int64_t{sizeof(Split) + sizeof(std::atomic<int32_t>)} * shape.kv.kv_heads;
}

void PagedAttention::prepare(const AttentionShape& shape, const StepLimits& limits, std::byte* kv) {
  SPLITFUSE_ASSERT(shape.heads > 0 && shape.heads % shape.kv.kv_heads == 0);
  SPLITFUSE_ASSERT(shape.scale > 0.0f);
  SPLITFUSE_ASSERT(shape.inv_freq.size() == static_cast<size_t>(shape.kv.head_dim / 2));
  kernels_ = make_attention_kernels(dtype_, shape.kv.dtype, isa_);
  shape_ = shape;
  layout_ = make_layout(shape.kv, dtype_);
  kv_ = kv;
  group_ = shape.heads / shape.kv.kv_heads;
  run_positions_ = positions_per_item(group_);
  room_ = room(shape, limits);
  const int64_t angles = round_up(room_.angles, int64_t{16});
  memory_ = Memory((angles + room_.thread * pool_.size() + room_.partials) * int64_t{sizeof(float)}, &pool_);
  angles_ = reinterpret_cast<float*>(memory_.data());
  scratch_ = angles_ + angles;
  partials_ = scratch_ + room_.thread * pool_.size();
  entries_.reserve(static_cast<size_t>(room_.entries));
  splits_.reserve(static_cast<size_t>(room_.splits));
  unfinished_ = std::vector<std::atomic<int32_t>>(static_cast<size_t>(room_.splits * shape.kv.kv_heads));
}

void PagedAttention::begin(const RaggedBatch& batch) {
  batch_ = batch;
  plan();
  const int32_t half = layout_.head_dim / 2;
  pool_.run_parts(batch_.rows(), [&](int, int64_t first, int64_t past) {
    for (int64_t row = first; row < past; ++row) {
      float* cos = angles_ + row * layout_.head_dim;
      float* sin = cos + half;
      const auto position = static_cast<float>(batch_.positions[static_cast<size_t>(row)]);
      for (int32_t i = 0; i < half; ++i) {
        const float angle = position * shape_.inv_freq[static_cast<size_t>(i)];
        cos[i] = std::cos(angle);
        sin[i] = std::sin(angle);
      }
    }
  });
}

// Cuts every chunk into runs of query positions, and costly runs at segments until there is work for all threads.
void PagedAttention::plan() {
  entries_.clear();
  splits_.clear();
  partials_used_ = 0;
  int64_t total = 0;
  const auto for_each_run = [&](const auto& visit) {
    for (size_t s = 0; s < batch_.seqs.size(); ++s) {
      const RaggedSeq& seq = batch_.seqs[s];
      for (int32_t at = 0; at < seq.length; at += run_positions_) {
        Entry run;
        run.seq = static_cast<int32_t>(s);
        run.offset = at;
        run.positions = std::min(run_positions_, seq.length - at);
        const int32_t keys = seq.computed + at + run.positions;
        run.last_segment = segments_of(keys);
        run.cost = int64_t{std::max(run.positions * group_, kLeastCostRows)} * keys;
        visit(run);
      }
    }
  };
  for_each_run([&](const Entry& run) { total += run.cost; });
  const int64_t fair = std::max<int64_t>(total * shape_.kv.kv_heads / (kItemsPerThread * pool_.size()), 1);
  for_each_run([&](const Entry& run) { add_run(run, fair); });
  std::sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) {
    return a.cost != b.cost ? a.cost > b.cost : a.seq != b.seq ? a.seq < b.seq : a.offset < b.offset;
  });
}

void PagedAttention::add_run(const Entry& run, int64_t fair) {
  const auto parts = static_cast<int32_t>(std::min<int64_t>(run.last_segment, ceil_div(run.cost, fair)));
  const int64_t floats = int64_t{run.last_segment} * shape_.kv.kv_heads * state_floats(run.positions);
  if (parts == 1 || static_cast<int64_t>(splits_.size()) == room_.splits || partials_used_ + floats > room_.partials) {
    entries_.push_back(run);
    return;
  }
  for (int32_t part = 0; part < parts; ++part) {
    Entry entry = run;
    entry.first_segment = run.last_segment * part / parts;
    entry.last_segment = run.last_segment * (part + 1) / parts;
    entry.split = static_cast<int32_t>(splits_.size());
    entry.cost = run.cost / parts;
    entries_.push_back(entry);
  }
  splits_.push_back({partials_used_, parts, run.last_segment});
  partials_used_ += floats;
}

int64_t PagedAttention::state_floats(int32_t positions) const {
  return attention_state_floats(int64_t{positions} * group_, layout_.padded_dim);
}

void PagedAttention::rotate(RotateKernel kernel, const float* qkv, int64_t row, int64_t head, void* out) const {
  const int64_t dim = layout_.head_dim;
  const float* cos = angles_ + row * dim;
  const int64_t stride = row_stride((int64_t{shape_.heads} + 2 * shape_.kv.kv_heads) * dim);
  kernel(qkv + row * stride + head * dim, cos, cos + dim / 2, layout_.head_dim, out);
}

void PagedAttention::rope_write_kv(const float* qkv, int32_t layer, void* q) {
  if (shape_.kv.dtype == KvDType::kInt8) return rope_write<int8_t>(qkv, layer, q);
  dtype_ == DType::kF32 ? rope_write<float>(qkv, layer, q) : rope_write<uint16_t>(qkv, layer, q);
}

template <class Cell>
void PagedAttention::rope_write(const float* qkv, int32_t layer, void* q) {
  pool_.run_parts(batch_.rows(), [&](int thread, int64_t first, int64_t past) {
    const int64_t q_stride = row_stride(int64_t{shape_.heads} * layout_.head_dim);
    for (int64_t row = first; row < past; ++row) {
      for (int64_t head = 0; head < shape_.heads; ++head) {
        const int64_t at = row * q_stride + head * layout_.head_dim;
        rotate(kernels_.rotate, qkv, row, head, static_cast<std::byte*>(q) + at * dtype_size(dtype_));
      }
    }
    for (const RaggedSeq& seq : batch_.seqs) {
      int64_t row = std::max<int64_t>(first, seq.begin);
      const int64_t end = std::min<int64_t>(past, seq.begin + seq.length);
      while (row < end) {
        // As many rows as lie in one column of keys.
        const int64_t position = seq.computed + row - seq.begin;
        const int64_t count = std::min(end - row, kAttentionColumn - position % kAttentionColumn);
        rope_write_column<Cell>(qkv, layer, row, count, seq.block_table[position / layout_.block_size],
                                position % layout_.block_size, thread);
        row += count;
      }
    }
  });
}

template <class Cell>
void PagedAttention::rope_write_column(const float* qkv, int32_t layer, int64_t row, int64_t count, int32_t block,
                                       int64_t within, int thread) {
  const int64_t dim = layout_.head_dim;
  const int64_t heads = shape_.heads;
  const int64_t kv_heads = shape_.kv.kv_heads;
  const int64_t in_stride = row_stride((heads + 2 * kv_heads) * dim);
  auto* const keys = reinterpret_cast<Cell*>(scratch_ + room_.thread * thread);
  Cell* const values = keys + kAttentionColumn * layout_.padded_dim;
  std::byte* const at = kv_ + block * layout_.block_bytes + layer * layout_.layer_bytes;
  for (int64_t head = 0; head < kv_heads; ++head) {
    std::byte* const out = at + head * layout_.head_bytes;
    for (int64_t i = 0; i < count; ++i) {
      Cell* const key = keys + i * layout_.padded_dim;
      Cell* const value = values + i * layout_.padded_dim;
      const float* const in = qkv + (row + i) * in_stride + (heads + kv_heads + head) * dim;
      if constexpr (sizeof(Cell) == 1) {
        auto* const rotated = reinterpret_cast<float*>(values + kAttentionColumn * layout_.padded_dim);
        rotate(kernels_.rotate_f32, qkv, row + i, heads + head, rotated);
        float* const key_scale = reinterpret_cast<float*>(out + layout_.scale_offset) + within + i;
        float* const value_scale = key_scale + layout_.block_size;
        kernels_.quantize(rotated, layout_.head_dim, key, key_scale);
        kernels_.quantize(in, layout_.head_dim, value, value_scale);
        if (std::isnan(*key_scale + *value_scale)) *key_scale = *value_scale = std::numeric_limits<float>::quiet_NaN();
      } else {
        rotate(kernels_.rotate, qkv, row + i, heads + head, key);
        kernels_.convert(in, layout_.head_dim, value);
      }
    }
    write_kv(layout_, out, within, ColumnPart<Cell>{keys, values, count});
  }
}

void PagedAttention::attention(const void* q, int32_t layer, void* out) {
  const int64_t kv_heads = shape_.kv.kv_heads;
  const int64_t items = static_cast<int64_t>(entries_.size()) * kv_heads;
  for (size_t split = 0; split < splits_.size(); ++split) {
    for (int64_t head = 0; head < kv_heads; ++head) {
      unfinished_[split * static_cast<size_t>(kv_heads) + static_cast<size_t>(head)].store(splits_[split].parts,
                                                                                           std::memory_order_relaxed);
    }
  }
  next_item_.store(pool_.size(), std::memory_order_relaxed);
  pool_.run([&](int thread) {
    AttentionAhead ahead;
    const auto claim = [&] { return next_item_.fetch_add(1, std::memory_order_relaxed); };
    for (int64_t index = thread; index < items;) {
      const Entry& entry = entries_[static_cast<size_t>(index / kv_heads)];
      const auto head = static_cast<int32_t>(index % kv_heads);
      AttentionItem item = make_item(entry, head, layer, q, out, thread);
      if (!few_rows(entry)) {
        run_item(entry, head, item);
        index = claim();
        continue;
      }
      // The next item is claimed before the work, so that its keys and values can be fetched meanwhile.
      item.ahead = &ahead;
      index = claim();
      if (index < items) announce(entries_[static_cast<size_t>(index / kv_heads)], index % kv_heads, layer, item);
      run_item(entry, head, item);
    }
  });
}

void PagedAttention::announce(const Entry& entry, int64_t head, int32_t layer, AttentionItem& item) const {
  if (!few_rows(entry)) return;
  const RaggedSeq& seq = batch_.seqs[static_cast<size_t>(entry.seq)];
  item.next_kv = kv_ + layer * layout_.layer_bytes + head * layout_.head_bytes;
  item.next_block_table = seq.block_table;
  item.next_begin = entry.first_segment * kAttentionSegment;
  item.next_past = std::min(seq.computed + entry.offset + entry.positions, entry.last_segment * kAttentionSegment);
}

AttentionItem PagedAttention::make_item(const Entry& entry, int32_t head, int32_t layer, const void* q, void* out,
                                        int thread) const {
  const RaggedSeq& seq = batch_.seqs[static_cast<size_t>(entry.seq)];
  AttentionItem item;
  item.layout = layout_;
  item.kv = kv_ + layer * layout_.layer_bytes + head * layout_.head_bytes;
  item.block_table = seq.block_table;
  item.row_stride = row_stride(int64_t{shape_.heads} * layout_.head_dim);
  const int64_t first = (seq.begin + entry.offset) * item.row_stride + int64_t{head} * group_ * layout_.head_dim;
  item.q = static_cast<const std::byte*>(q) + first * dtype_size(dtype_);
  item.out = static_cast<std::byte*>(out) + first * dtype_size(dtype_);
  item.group = group_;
  item.positions = entry.positions;
  item.first = seq.computed + entry.offset;
  item.first_segment = entry.first_segment;
  item.last_segment = entry.last_segment;
  item.scale = shape_.scale * std::numbers::log2e_v<float>;
  item.state_floats = state_floats(entry.positions);
  item.scratch = scratch_ + room_.thread * thread;
  return item;
}

void PagedAttention::run_item(const Entry& entry, int32_t head, AttentionItem& item) {
  if (entry.split < 0) return kernels_.attend(item);

  const Split& split = splits_[static_cast<size_t>(entry.split)];
  item.partials = partials_ + split.partials + int64_t{head} * split.segments * item.state_floats;
  kernels_.attend(item);
  auto& unfinished = unfinished_[static_cast<size_t>(int64_t{entry.split} * shape_.kv.kv_heads + head)];
  // Who comes last has seen the others' states, and joins them all in the one order there is.
  if (unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    item.last_segment = split.segments;
    kernels_.merge(item);
  }
}

}  // namespace splitfuse
