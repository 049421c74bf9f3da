#include "cuda/attention/attention.h"

#include <algorithm>
#include <memory>
#include <set>

#include "base/check.h"
#include "cuda/device/check.h"
#include "splitfuse/types.h"

namespace splitfuse::cuda {
namespace {

// Lists in device memory start at multiples of it.
constexpr int64_t kAlign = 16;

int64_t value_bytes(const KvShape& shape) { return int64_t{2} * shape.head_dim * shape.block_size; }

int64_t head_bytes(const KvShape& shape) { return 2 * value_bytes(shape); }

void check_shape(const KvShape& shape, DType dtype) {
  if (dtype != DType::kBF16 && dtype != DType::kF16) {
    throw ConfigError(cat("dtype: the CUDA backend computes in bfloat16 or float16, not ", dtype_name(dtype)));
  }
  if (shape.dtype != KvDType::kAuto) {
    throw ConfigError(cat("kv_dtype: the CUDA backend holds keys and values in the format of activations, not as ",
                          kv_dtype_name(shape.dtype)));
  }
  if (shape.head_dim > kMaxHeadDim) {
    throw ConfigError(cat("head_dim: the CUDA backend attends with heads of up to ", kMaxHeadDim, ", not ",
                          shape.head_dim, "; use device \"cpu\""));
  }
  SPLITFUSE_ASSERT(shape.head_dim > 0 && shape.head_dim % 8 == 0);
  SPLITFUSE_ASSERT(shape.block_size > 0 && shape.block_size % 16 == 0);
}

int64_t distinct_windows(const AttentionShape& shape) {
  std::set<int32_t> windows;
  for (const AttentionLayer& layer : shape.layers) windows.insert(layer.window);
  return static_cast<int64_t>(windows.size());
}

template <class T>
int64_t list_bytes(int64_t count) {
  return round_up(count * static_cast<int64_t>(sizeof(T)), kAlign);
}

}  // namespace

CudaAttention::CudaAttention(DType dtype, const Device& device, cudaStream_t stream)
    : dtype_(dtype), processors_(device.processors), shared_memory_(device.shared_memory), overlap_(device.major >= 9),
      stream_(stream) {
  if (dtype != DType::kBF16 && dtype != DType::kF16) {
    throw ConfigError(cat("dtype: the CUDA backend computes in bfloat16 or float16, not ", dtype_name(dtype)));
  }
}

int64_t CudaAttention::block_bytes(const KvShape& shape, DType dtype) {
  check_shape(shape, dtype);
  return head_bytes(shape) * shape.kv_heads * shape.layers;
}

CudaAttention::Room CudaAttention::room(const AttentionShape& shape, const StepLimits& limits) const {
  check_shape(shape.kv, dtype_);
  SPLITFUSE_ASSERT(shape.heads > 0 && shape.heads % shape.kv.kv_heads == 0);
  Room room;
  WorkShape& work = room.work;
  work.group = shape.heads / shape.kv.kv_heads;
  work.kv_heads = shape.kv.kv_heads;
  work.tile_rows = paged_tile_rows(shape.kv.head_dim, shared_memory_);
  work.tile_keys = paged_tile_keys(shape.kv.head_dim);
  work.blocks = processors_ * paged_blocks(shape.kv.head_dim, shared_memory_);
  work.max_rows = limits.max_rows;
  work.max_seqs = limits.max_seqs;
  work.max_context = limits.max_context;

  room.constants = static_cast<int64_t>(shape.alibi_slopes.size());
  for (const AttentionShape::Rope& rope : shape.ropes) room.constants += static_cast<int64_t>(rope.inv_freq.size());
  room.tables = int64_t{limits.max_seqs} * ceil_div(limits.max_context, shape.kv.block_size);
  room.step_bytes =
      list_bytes<RowPlace>(limits.max_rows) + list_bytes<int32_t>(room.tables) +
      distinct_windows(shape) * (list_bytes<WorkItem>(work.max_items()) + list_bytes<JoinItem>(work.max_joins()));
  room.states = work.states() * work.kv_heads * (shape.kv.head_dim + 2) * int64_t{sizeof(float)};
  return room;
}

int64_t CudaAttention::scratch_bytes(const AttentionShape& shape, const StepLimits& limits) const {
  const Room need = room(shape, limits);
  return list_bytes<float>(need.constants) + need.step_bytes + need.states;
}

void CudaAttention::prepare(const AttentionShape& shape, const StepLimits& limits, std::byte* kv) {
  SPLITFUSE_ASSERT(shape.scale > 0.0f && shape.softcap >= 0.0f);
  SPLITFUSE_ASSERT(shape.layers.size() == static_cast<size_t>(shape.kv.layers));
  SPLITFUSE_ASSERT(shape.alibi_slopes.empty() || shape.alibi_slopes.size() == static_cast<size_t>(shape.heads));
  room_ = room(shape, limits);
  shape_ = shape;
  kv_ = kv;
  value_bytes_ = value_bytes(shape.kv);
  head_bytes_ = head_bytes(shape.kv);
  block_bytes_ = block_bytes(shape.kv, dtype_);
  prepare_paged(shape.kv.head_dim, room_.work.tile_rows, dtype_ == DType::kF16);

  memory_ = Memory(scratch_bytes(shape, limits));
  step_memory_ = memory_.data() + list_bytes<float>(room_.constants);
  state_values_ = reinterpret_cast<float*>(step_memory_ + room_.step_bytes);
  state_sums_ = state_values_ + room_.work.states() * room_.work.kv_heads * shape.kv.head_dim;
  for (PinnedMemory& staging : staging_) {
    staging = PinnedMemory(std::max(room_.step_bytes, list_bytes<float>(room_.constants)));
  }
  send_constants();

  planner_ = std::make_unique<WorkPlanner>(room_.work);
  list_ = planner_->make_list();
  windows_.clear();
  list_of_layer_.clear();
  for (const AttentionLayer& layer : shape.layers) {
    const auto found = std::find(windows_.begin(), windows_.end(), layer.window);
    list_of_layer_.push_back(static_cast<int32_t>(found - windows_.begin()));
    if (found == windows_.end()) windows_.push_back(layer.window);
  }
  sent_lists_.assign(windows_.size(), {});
  table_starts_.assign(static_cast<size_t>(limits.max_seqs), 0);
}

void CudaAttention::send_constants() {
  auto* const host = reinterpret_cast<float*>(staging_[0].data());
  const auto* const device = reinterpret_cast<const float*>(memory_.data());
  int64_t used = 0;
  const auto put_floats = [&](const std::vector<float>& values) {
    std::copy(values.begin(), values.end(), host + used);
    used += static_cast<int64_t>(values.size());
    return device + used - values.size();
  };
  inv_freqs_.clear();
  for (const AttentionShape::Rope& rope : shape_.ropes) inv_freqs_.push_back(put_floats(rope.inv_freq));
  slopes_ = shape_.alibi_slopes.empty() ? nullptr : put_floats(shape_.alibi_slopes);
  SPLITFUSE_ASSERT(used == room_.constants);
  if (used == 0) return;
  SPLITFUSE_CUDA_CALL(cudaMemcpyAsync(memory_.data(), host, static_cast<size_t>(used) * sizeof(float),
                                      cudaMemcpyHostToDevice, stream_));
  SPLITFUSE_CUDA_CALL(cudaStreamSynchronize(stream_));
}

/// Room for `count` of T in the step's copy, to be filled; `on_device`: where they will be.
template <class T>
T* CudaAttention::put(Sending& sending, int64_t count, const T*& on_device) const {
  on_device = reinterpret_cast<const T*>(sending.to + sending.used);
  T* const host = reinterpret_cast<T*>(sending.from + sending.used);
  sending.used += list_bytes<T>(count);
  SPLITFUSE_ASSERT(sending.used <= room_.step_bytes);
  return host;
}

void CudaAttention::put_places(Sending& sending, const RaggedBatch& batch) {
  RowPlace* const places = put(sending, batch.rows(), places_);
  const int32_t size = shape_.kv.block_size;
  for (const RaggedSeq& seq : batch.seqs) {
    for (int32_t i = 0; i < seq.length; ++i) {
      const int32_t position = seq.computed + i;
      places[seq.begin + i] = {position, seq.block_table[position / size], position % size};
    }
  }
}

void CudaAttention::put_tables(Sending& sending, const RaggedBatch& batch) {
  int64_t entries = 0;
  for (size_t s = 0; s < batch.seqs.size(); ++s) {
    table_starts_[s] = static_cast<int32_t>(entries);
    entries += ceil_div(batch.seqs[s].computed + batch.seqs[s].length, shape_.kv.block_size);
  }
  SPLITFUSE_ASSERT(entries <= room_.tables);
  int32_t* to = put(sending, entries, tables_);
  for (const RaggedSeq& seq : batch.seqs) {
    to = std::copy_n(seq.block_table, ceil_div(seq.computed + seq.length, shape_.kv.block_size), to);
  }
}

void CudaAttention::put_lists(Sending& sending, const RaggedBatch& batch) {
  const std::span starts = std::span<const int32_t>(table_starts_).first(batch.seqs.size());
  for (size_t w = 0; w < windows_.size(); ++w) {
    planner_->plan(batch.seqs, starts, windows_[w], list_);
    SentList& sent = sent_lists_[w];
    sent.item_count = static_cast<int32_t>(list_.items.size());
    sent.join_count = static_cast<int32_t>(list_.joins.size());
    std::copy(list_.items.begin(), list_.items.end(), put(sending, sent.item_count, sent.items));
    std::copy(list_.joins.begin(), list_.joins.end(), put(sending, sent.join_count, sent.joins));
  }
}

void CudaAttention::begin(const RaggedBatch& batch) {
  SPLITFUSE_ASSERT(batch.rows() <= room_.work.max_rows);
  SPLITFUSE_ASSERT(batch.seqs.size() <= table_starts_.size());
  rows_ = batch.rows();
  const int turn = next_staging_;
  next_staging_ = 1 - turn;
  staged_[turn].synchronize();
  Sending sending{staging_[turn].data(), step_memory_};
  put_places(sending, batch);
  put_tables(sending, batch);
  put_lists(sending, batch);
  SPLITFUSE_CUDA_CALL(
      cudaMemcpyAsync(step_memory_, sending.from, static_cast<size_t>(sending.used), cudaMemcpyHostToDevice, stream_));
  staged_[turn].record(stream_);
}

void CudaAttention::rope_write_kv(const float* qkv, int32_t layer, void* q) {
  const AttentionLayer& which = layer_of(layer);
  RopeTask task;
  task.qkv = qkv;
  task.q = q;
  task.kv = layer_kv(layer);
  task.places = places_;
  task.heads = shape_.heads;
  task.kv_heads = shape_.kv.kv_heads;
  task.head_dim = shape_.kv.head_dim;
  task.qkv_stride = row_stride((int64_t{task.heads} + 2 * task.kv_heads) * task.head_dim);
  task.q_stride = row_stride(int64_t{task.heads} * task.head_dim);
  task.block_bytes = block_bytes_;
  task.head_bytes = head_bytes_;
  task.value_bytes = value_bytes_;
  task.rows = rows_;
  if (which.rope >= 0) {
    const AttentionShape::Rope& rope = shape_.ropes[static_cast<size_t>(which.rope)];
    task.inv_freq = inv_freqs_[static_cast<size_t>(which.rope)];
    task.pairs = static_cast<int32_t>(rope.inv_freq.size());
    task.magnitude = rope.magnitude;
  }
  task.q_norm = which.q_norm;
  task.k_norm = which.k_norm;
  task.norm = which.qk_norm == QkNorm::kHead  ? RopeNorm::kHead
              : which.qk_norm == QkNorm::kRow ? RopeNorm::kRow
                                              : RopeNorm::kNone;
  task.centred = shape_.qk_norm_kind == NormKind::kLayer;
  task.eps = shape_.qk_norm_eps;
  task.half = dtype_ == DType::kF16;
  rope_write(task, stream_, overlap_);
}

void CudaAttention::attention(const void* q, int32_t layer, void* out) {
  const AttentionLayer& which = layer_of(layer);
  const SentList& list = sent_lists_[static_cast<size_t>(list_of_layer_[static_cast<size_t>(layer)])];
  PagedTask task;
  task.q = q;
  task.out = out;
  task.kv = layer_kv(layer);
  task.tables = tables_;
  task.items = list.items;
  task.joins = list.joins;
  task.item_count = list.item_count;
  task.join_count = list.join_count;
  task.state_values = state_values_;
  task.state_sums = state_sums_;
  task.states = room_.work.states();
  task.slopes = slopes_;
  task.sinks = which.sinks;
  task.head_dim = shape_.kv.head_dim;
  task.row_stride = row_stride(int64_t{shape_.heads} * task.head_dim);
  task.block_bytes = block_bytes_;
  task.head_bytes = head_bytes_;
  task.value_bytes = value_bytes_;
  task.block_size = shape_.kv.block_size;
  task.kv_heads = shape_.kv.kv_heads;
  task.group = room_.work.group;
  task.window = which.window;
  task.tile_rows = room_.work.tile_rows;
  task.scale = shape_.scale;
  task.softcap = shape_.softcap;
  task.half = dtype_ == DType::kF16;
  attend_paged(task, stream_, overlap_);
  join_states(task, stream_, overlap_);
}

}  // namespace splitfuse::cuda
