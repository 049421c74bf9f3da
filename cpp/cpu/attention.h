// Paged attention over ragged chunks on the CPU, and the rotary embedding that feeds it.
//
// A chunk of any length at any place of a sequence is cut into work items: (sequence, KV head, run of query
// positions, run of key segments). Keys are walked in tiles and segments at fixed absolute positions, and a query
// row sees its keys in ascending order, so a row's arithmetic is settled by its own position alone.
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
  /// qkv [rows, (heads + 2 kv_heads) * head_dim] f32: rotates queries into q [rows, heads * head_dim] and keys,
  /// and writes keys and values to `layer` of the KV cache.
  void rope_write_kv(const float* qkv, int32_t layer, void* q);
  /// out [rows, heads * head_dim] = causal attention of q over each row's sequence in the KV cache.
  void attention(const void* q, int32_t layer, void* out);

 private:
  // A run of query positions of one sequence over a run of its key segments; a work item for each KV head.
  struct Entry {
    int32_t seq = 0;
    int32_t offset = 0;            // of its first query position in the chunk
    int32_t positions = 0;         // query positions
    int32_t first_segment = 0;
    int32_t last_segment = 0;      // one past the last
    int32_t split = -1;            // in splits_; -1: its items see all their keys
    int64_t cost = 0;
  };
  // Entries that make one result together: their items leave a state per segment, and the last one joins them.
  struct Split {
    int64_t partials;              // in partials_: [kv head][segment][state]
    int32_t parts;                 // entries
    int32_t segments;
  };
  // Scratch memory: floats, and numbers of things.
  struct Room {
    int64_t angles = 0;
    int64_t thread = 0;
    int64_t partials = 0;
    int64_t entries = 0;
    int64_t splits = 0;
  };

  Room room(const AttentionShape& shape, const StepLimits& limits) const;
  int64_t state_floats(int32_t positions) const;
  void plan();
  void add_run(const Entry& run, int64_t fair);
  using RotateKernel = decltype(AttentionKernels::rotate);
  void rotate(RotateKernel kernel, const float* qkv, int64_t row, int64_t head, void* out) const;
  template <class Cell>
  void rope_write(const float* qkv, int32_t layer, void* q);
  template <class Cell>
  void rope_write_column(const float* qkv, int32_t layer, int64_t row, int64_t count, int32_t block, int64_t within,
                         int thread);
  AttentionItem make_item(const Entry& entry, int32_t head, int32_t layer, const void* q, void* out, int thread) const;
  bool few_rows(const Entry& entry) const { return entry.positions * group_ <= kAttentionFewRows; }
  void announce(const Entry& entry, int64_t head, int32_t layer, AttentionItem& item) const;
  void run_item(const Entry& entry, int32_t head, AttentionItem& item);

  DType dtype_;
  Isa isa_;
  ThreadPool& pool_;
  AttentionKernels kernels_;       // for the KV cache that prepare() was given
  AttentionShape shape_;
  KvLayout layout_;
  std::byte* kv_ = nullptr;
  RaggedBatch batch_;
  int32_t group_ = 0;              // query heads per KV head
  int32_t run_positions_ = 0;      // query positions of a full run
  Room room_;
  Memory memory_;
  float* angles_ = nullptr;        // [rows][cosines: head_dim / 2, sines: head_dim / 2]
  float* scratch_ = nullptr;       // [threads][room_.thread]
  float* partials_ = nullptr;
  int64_t partials_used_ = 0;
  std::vector<Entry> entries_;     // costliest first
  std::vector<Split> splits_;
  std::vector<std::atomic<int32_t>> unfinished_;   // [split][kv head]: parts still running
  std::atomic<int64_t> next_item_{0};
};

}  // namespace splitfuse
