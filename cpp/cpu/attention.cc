#include "cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/check.h"

namespace splitfuse {
namespace {

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

// What hides nothing from any sequence counts as no window.
int32_t window_of(const AttentionLayer& layer, const StepLimits& limits) {
  return layer.window > 0 && layer.window < limits.max_context ? layer.window : kNoWindow;
}

void check(const AttentionShape& shape) {
  SPLITFUSE_ASSERT(shape.heads > 0 && shape.heads % shape.kv.kv_heads == 0);
  SPLITFUSE_ASSERT(shape.scale > 0.0f && shape.softcap >= 0.0f);
  SPLITFUSE_ASSERT(shape.alibi_slopes.empty() || shape.alibi_slopes.size() == static_cast<size_t>(shape.heads));
  for (const AttentionShape::Rope& rope : shape.ropes) {
    SPLITFUSE_ASSERT(2 * rope.inv_freq.size() <= static_cast<size_t>(shape.kv.head_dim));
  }
  SPLITFUSE_ASSERT(shape.layers.size() == static_cast<size_t>(shape.kv.layers));
  for (const AttentionLayer& layer : shape.layers) {
    SPLITFUSE_ASSERT(layer.rope < static_cast<int32_t>(shape.ropes.size()));
    SPLITFUSE_ASSERT(layer.qk_norm == QkNorm::kNone || (layer.q_norm != nullptr && layer.k_norm != nullptr));
  }
}

}  // namespace

PagedAttention::PagedAttention(DType dtype, Isa isa, ThreadPool& pool) : dtype_(dtype), isa_(isa), pool_(pool) {}

Isa PagedAttention::kernel_isa(KvDType kv) const { return make_attention_kernels(dtype_, kv, isa_).isa; }

int64_t PagedAttention::block_bytes(const KvShape& shape, DType dtype) { return make_layout(shape, dtype).block_bytes; }

PagedAttention::Room PagedAttention::room(const AttentionShape& shape, const StepLimits& limits) const {
  const KvLayout layout = make_layout(shape.kv, dtype_);
  Room room;
  room.grain = attention_grain(shape.heads / shape.kv.kv_heads, shape.kv.kv_heads, layout.padded_dim, pool_.size(),
                               limits.max_rows, limits.max_seqs, limits.max_context);
  for (const AttentionShape::Rope& rope : shape.ropes) {
    room.angle_columns += 2 * static_cast<int32_t>(rope.inv_freq.size());
  }
  room.angles = round_up(int64_t{limits.max_rows} * room.angle_columns, int64_t{16});
  // Between attentions it holds a column of keys and of values.
  room.thread =
      std::max(attention_scratch_floats(int64_t{room.grain.run_positions} * room.grain.group, layout.padded_dim),
               int64_t{2 * kAttentionColumn} * layout.padded_dim);
  return room;
}

int64_t PagedAttention::scratch_bytes(const AttentionShape& shape, const StepLimits& limits) const {
  const Room need = room(shape, limits);
  const int64_t floats = need.angles + need.thread * pool_.size() + need.grain.partials;
  std::vector<int32_t> windows;
  for (const AttentionLayer& layer : shape.layers) windows.push_back(window_of(layer, limits));
  std::sort(windows.begin(), windows.end());
  const auto plans = std::unique(windows.begin(), windows.end()) - windows.begin();
  return floats * int64_t{sizeof(float)} + plans * AttentionPlan::bytes(need.grain) +
         need.grain.splits * int64_t{sizeof(std::atomic<int32_t>)} * shape.kv.kv_heads;
}

void PagedAttention::prepare(const AttentionShape& shape, const StepLimits& limits, std::byte* kv) {
  check(shape);
  kernels_ = make_attention_kernels(dtype_, shape.kv.dtype, isa_);
  shape_ = shape;
  layout_ = make_layout(shape.kv, dtype_);
  kv_ = kv;
  group_ = shape.heads / shape.kv.kv_heads;
  const Room need = room(shape, limits);
  thread_floats_ = need.thread;
  memory_ = Memory((need.angles + need.thread * pool_.size() + need.grain.partials) * int64_t{sizeof(float)}, &pool_);
  angles_ = reinterpret_cast<float*>(memory_.data());
  scratch_ = angles_ + need.angles;
  partials_ = scratch_ + need.thread * pool_.size();
  angle_columns_ = need.angle_columns;
  angle_at_.clear();
  int32_t angle = 0;
  for (const AttentionShape::Rope& rope : shape.ropes) {
    angle_at_.push_back(angle);
    angle += 2 * static_cast<int32_t>(rope.inv_freq.size());
  }
  plans_.clear();
  plan_of_.clear();
  for (const AttentionLayer& layer : shape.layers) {
    const int32_t window = window_of(layer, limits);
    const auto same = [&](const AttentionPlan& plan) { return plan.window() == window; };
    auto plan = std::find_if(plans_.begin(), plans_.end(), same);
    if (plan == plans_.end()) plan = plans_.emplace(plan, need.grain, window);
    plan_of_.push_back(static_cast<int32_t>(plan - plans_.begin()));
  }
  unfinished_ = std::vector<std::atomic<int32_t>>(static_cast<size_t>(need.grain.splits * shape.kv.kv_heads));
}

void PagedAttention::begin(const RaggedBatch& batch) {
  batch_ = batch;
  for (AttentionPlan& plan : plans_) plan.make(batch);
  if (angle_columns_ == 0) return;
  pool_.run_parts(batch_.rows(), [&](int, int64_t first, int64_t past) {
    for (int64_t row = first; row < past; ++row) {
      float* out = angles_ + row * angle_columns_;
      const auto position = static_cast<float>(batch_.positions[static_cast<size_t>(row)]);
      for (const AttentionShape::Rope& rope : shape_.ropes) {
        const size_t pairs = rope.inv_freq.size();
        for (size_t i = 0; i < pairs; ++i) {
          const float angle = position * rope.inv_freq[i];
          out[i] = std::cos(angle) * rope.magnitude;
          out[pairs + i] = std::sin(angle) * rope.magnitude;
        }
        out += 2 * pairs;
      }
    }
  });
}

void PagedAttention::attention(const void* q, int32_t layer, void* out) {
  const AttentionPlan& plan = plans_[static_cast<size_t>(plan_of_[static_cast<size_t>(layer)])];
  const int64_t kv_heads = shape_.kv.kv_heads;
  const int64_t items = static_cast<int64_t>(plan.entries().size()) * kv_heads;
  for (size_t split = 0; split < plan.splits().size(); ++split) {
    for (int64_t head = 0; head < kv_heads; ++head) {
      unfinished_[split * static_cast<size_t>(kv_heads) + static_cast<size_t>(head)].store(plan.splits()[split].parts,
                                                                                           std::memory_order_relaxed);
    }
  }
  next_item_.store(pool_.size(), std::memory_order_relaxed);
  pool_.run([&](int thread) {
    AttentionAhead ahead;
    const auto claim = [&] { return next_item_.fetch_add(1, std::memory_order_relaxed); };
    const auto entry_of = [&](int64_t index) -> const Entry& {
      return plan.entries()[static_cast<size_t>(index / kv_heads)];
    };
    for (int64_t index = thread; index < items;) {
      const Entry& entry = entry_of(index);
      const auto head = static_cast<int32_t>(index % kv_heads);
      AttentionItem item = make_item(entry, plan.window(), head, layer, q, out, thread);
      if (!few_rows(entry)) {
        run_item(plan, entry, head, item);
        index = claim();
        continue;
      }
      // The next item is claimed before the work, so that its keys and values can be fetched meanwhile.
      item.ahead = &ahead;
      index = claim();
      if (index < items) announce(entry_of(index), index % kv_heads, layer, item);
      run_item(plan, entry, head, item);
    }
  });
}

void PagedAttention::announce(const Entry& entry, int64_t head, int32_t layer, AttentionItem& item) const {
  if (!few_rows(entry)) return;
  const RaggedSeq& seq = batch_.seqs[static_cast<size_t>(entry.seq)];
  item.next_kv = kv_ + layer * layout_.layer_bytes + head * layout_.head_bytes;
  item.next_block_table = seq.block_table;
  item.next_begin = entry.begin;
  item.next_past = std::min(seq.computed + entry.offset + entry.positions, entry.last_segment * kAttentionSegment);
}

AttentionItem PagedAttention::make_item(const Entry& entry, int32_t window, int32_t head, int32_t layer, const void* q,
                                        void* out, int thread) const {
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
  item.window = window;
  item.begin = entry.begin;
  item.first_segment = entry.first_segment;
  item.last_segment = entry.last_segment;
  item.scale = shape_.scale * std::numbers::log2e_v<float>;
  item.softcap = shape_.softcap;
  if (!shape_.alibi_slopes.empty()) item.slopes = shape_.alibi_slopes.data() + int64_t{head} * group_;
  const float* sinks = shape_.layers[static_cast<size_t>(layer)].sinks;
  if (sinks != nullptr) item.sinks = sinks + int64_t{head} * group_;
  item.state_floats = attention_state_floats(int64_t{entry.positions} * group_, layout_.padded_dim);
  item.scratch = scratch_ + thread_floats_ * thread;
  return item;
}

void PagedAttention::run_item(const AttentionPlan& plan, const Entry& entry, int32_t head, AttentionItem& item) {
  if (entry.split < 0) return kernels_.attend(item);

  const AttentionPlan::Split& split = plan.splits()[static_cast<size_t>(entry.split)];
  float* const partials = partials_ + split.partials + int64_t{head} * split.segments() * item.state_floats;
  item.partials = partials + (entry.first_segment - split.first_segment) * item.state_floats;
  kernels_.attend(item);
  auto& unfinished = unfinished_[static_cast<size_t>(int64_t{entry.split} * shape_.kv.kv_heads + head)];
  // Who comes last has seen the others' states, and joins them all in the one order there is.
  if (unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    item.partials = partials;
    item.first_segment = split.first_segment;
    item.last_segment = split.last_segment;
    kernels_.merge(item);
  }
}

}  // namespace splitfuse
