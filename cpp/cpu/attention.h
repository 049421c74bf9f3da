// Paged attention over ragged chunks on the CPU, and the rotary embedding that feeds it.
//
// A chunk of any length at any place of a sequence is cut into work items: (sequence, KV head, run of query
// positions, run of key segments). Keys are walked in tiles and segments at fixed absolute positions, and a query
// row sees its keys in ascending order, so a row's arithmetic is settled by its own position alone, and the window of
// its layer. Blocks that lie wholly before the window of a sequence's first row are never looked at, nor their place in
// the block table.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "backend/batch.h"
#include "base/memory.h"
#include "base/thread_pool.h"
#include "cpu/attention_kernels.h"
#include "cpu/attention_plan.h"
#include "cpu/isa.h"

namespace splitfuse {

/// The attention half of a CPU backend: rotary tables, KV writes, attention, and their scratch memory.
class PagedAttention {
 public:
  PagedAttention(DType dtype, Isa isa, ThreadPool& pool);

  /// Whose kernels attend to a KV cache of `kv`.
  Isa kernel_isa(KvDType kv) const;
  /// Bytes of one KV block over all layers.
  static int64_t block_bytes(const KvShape& shape, DType dtype);
  /// Bytes that prepare() will take.
  int64_t scratch_bytes(const AttentionShape& shape, const StepLimits& limits) const;
  /// Takes all scratch memory. `kv`: block_bytes * blocks, zeroed, 64-byte aligned.
  void prepare(const AttentionShape& shape, const StepLimits& limits, std::byte* kv);

  /// Computes the batch's rotary angles and plans its attention work. `batch` must stay valid during the step.
  void begin(const RaggedBatch& batch);
  /// qkv [rows, (heads + 2 kv_heads) * head_dim] f32, which it overwrites: norms and rotates queries into
  /// q [rows, heads * head_dim] and keys, and writes keys and values to `layer` of the KV cache.
  void rope_write_kv(float* qkv, int32_t layer, void* q);
  /// out [rows, heads * head_dim] = causal attention of q over each row's sequence in the KV cache.
  void attention(const void* q, int32_t layer, void* out);

 private:
  using Entry = AttentionPlan::Entry;
  struct Room {
    AttentionGrain grain;
    int32_t angle_columns = 0;  // of a row
    int64_t angles = 0;  // floats
    int64_t thread = 0;  // floats
  };

  Room room(const AttentionShape& shape, const StepLimits& limits) const;
  void turn(float* heads, int32_t count, const float* weight, const AttentionLayer& layer, int64_t row) const;
  template <class Cell>
  void rope_write(float* qkv, int32_t layer, void* q);
  template <class Cell>
  void rope_write_column(const float* qkv, int32_t layer, int64_t row, int64_t count, int32_t block, int64_t within,
                         int thread);
  AttentionItem make_item(const Entry& entry, int32_t window, int32_t head, int32_t layer, const void* q, void* out,
                          int thread) const;
  bool few_rows(const Entry& entry) const { return entry.positions * group_ <= kAttentionFewRows; }
  void announce(const Entry& entry, int64_t head, int32_t layer, AttentionItem& item) const;
  void run_item(const AttentionPlan& plan, const Entry& entry, int32_t head, AttentionItem& item);

  DType dtype_;
  Isa isa_;
  ThreadPool& pool_;
  AttentionKernels kernels_;  // for the KV cache that prepare() was given
  AttentionShape shape_;
  KvLayout layout_;
  std::byte* kv_ = nullptr;
  RaggedBatch batch_;
  int32_t group_ = 0;  // query heads per KV head
  Memory memory_;
  int32_t angle_columns_ = 0;
  std::vector<int32_t> angle_at_;  // of each of shape_.ropes, in a row
  float* angles_ = nullptr;  // [rows][angle_columns_]: cosines, then sines of each
  int64_t thread_floats_ = 0;
  float* scratch_ = nullptr;  // [threads][thread_floats_]
  float* partials_ = nullptr;
  std::vector<AttentionPlan> plans_;  // one for each window there is
  std::vector<int32_t> plan_of_;  // [layers], in plans_
  std::vector<std::atomic<int32_t>> unfinished_;  // [split][kv head]: parts still running
  std::atomic<int64_t> next_item_{0};
};

}  // namespace splitfuse
