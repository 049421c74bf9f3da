// Cuts a ragged batch's attention into work for the blocks of a GPU. Nothing of CUDA is needed to plan.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/batch.h"
#include "cuda/attention/work_item.h"

namespace splitfuse::cuda {

/// What all plans of an engine have in common.
struct WorkShape {
  int32_t group = 1;         // query heads per KV head
  int32_t kv_heads = 1;
  int32_t tile_rows = 64;    // most rows of an item
  int32_t tile_keys = 64;    // a divisor of kSegmentKeys
  int32_t blocks = 1;        // that run at once
  int32_t max_rows = 0;      // of a batch, in tokens
  int32_t max_seqs = 0;
  int32_t max_context = 0;   // positions of a sequence

  /// States of a KV head that there is room for: enough for the longest sequences of a few decodes, or two full items.
  int64_t states() const;
  /// Splits, and items, that a plan has at most.
  int32_t max_joins() const;
  int32_t max_items() const;
};

/// The plan of one step, for layers of one window: items costliest first.
struct WorkList {
  std::vector<WorkItem> items;
  std::vector<JoinItem> joins;
};

class WorkPlanner {
 public:
  /// Takes all memory that plan() will need, but for the lists.
  explicit WorkPlanner(const WorkShape& shape);
  /// A list with room for any plan.
  WorkList make_list() const;

  /// Fills `list` for layers whose rows see the last `window` positions (0: all). tables[s]: where the block table of
  /// sequence s begins. Every row's keys are covered once, by whole segments. Runs that take long are split at
  /// segments until there is work for all blocks; that changes who computes, not what.
  void plan(std::span<const RaggedSeq> seqs, std::span<const int32_t> tables, int32_t window, WorkList& list);

 private:
  struct Run {
    WorkItem item;
    int64_t cost = 0;  // in tiles of keys
  };
  int64_t collect(std::span<const RaggedSeq> seqs, std::span<const int32_t> tables, int32_t window);
  void add(const Run& run, int64_t fair, WorkList& list);

  WorkShape shape_;
  std::vector<Run> runs_;
  int64_t states_used_ = 0;
};

}  // namespace splitfuse::cuda
