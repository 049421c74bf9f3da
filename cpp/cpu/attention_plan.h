// How the attention of one step is cut into work: runs of query positions over runs of key segments.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/batch.h"

namespace splitfuse {

/// A window that hides nothing.
inline constexpr int32_t kNoWindow = 1 << 30;

/// What a plan depends on beside the batch.
struct AttentionGrain {
  int32_t group = 0;              // query heads per KV head
  int32_t kv_heads = 0;
  int32_t padded_dim = 0;
  int32_t run_positions = 0;      // query positions of a full run
  int32_t threads = 0;
  int64_t partials = 0;           // floats of room for states of split runs
  int64_t splits = 0;             // split runs there is room for
  int64_t entries = 0;

  /// Floats of the state of a run's rows.
  int64_t state_floats(int32_t positions) const;
};

/// The grain of these heads, for batches of up to max_rows rows of max_seqs sequences of max_context positions.
AttentionGrain attention_grain(int32_t group, int32_t kv_heads, int32_t padded_dim, int32_t threads, int32_t max_rows,
                               int32_t max_seqs, int32_t max_context);

/// The work of one step in layers of one window.
class AttentionPlan {
 public:
  /// A run of query positions of one sequence over a run of its key segments; a work item for each KV head.
  struct Entry {
    int32_t seq = 0;
    int32_t offset = 0;            // of its first query position in the chunk
    int32_t positions = 0;         // query positions
    int32_t begin = 0;             // its first key
    int32_t first_segment = 0;
    int32_t last_segment = 0;      // one past the last
    int32_t split = -1;            // in splits(); -1: its items see all their keys
    int64_t cost = 0;
  };
  /// Entries that make one result together: their items leave a state per segment, and the last one joins them.
  struct Split {
    int64_t partials;              // floats before its own: [kv head][segment][state]
    int32_t parts;                 // entries
    int32_t first_segment;
    int32_t last_segment;          // one past the last

    int32_t segments() const { return last_segment - first_segment; }
  };

  /// A row sees `window` positions up to its own. Takes all memory that making plans needs.
  AttentionPlan(const AttentionGrain& grain, int32_t window);
  static int64_t bytes(const AttentionGrain& grain);

  /// Cuts every chunk into runs of query positions, and costly runs at segments until there is work for all threads.
  void make(const RaggedBatch& batch);

  int32_t window() const { return window_; }
  const std::vector<Entry>& entries() const { return entries_; }   // costliest first
  const std::vector<Split>& splits() const { return splits_; }

 private:
  template <class Visit>
  void for_each_run(const RaggedBatch& batch, const Visit& visit) const;
  void add_run(const Entry& run, int64_t fair);

  AttentionGrain grain_;
  int32_t window_;
  int64_t partials_used_ = 0;
  std::vector<Entry> entries_;
  std::vector<Split> splits_;
};

}  // namespace splitfuse
