// Dynamic SplitFuse as a pure function: which tokens run in the next forward.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "splitfuse/types.h"

namespace splitfuse {

/// A sequence as the planner sees it. There are no phases: `known - computed` tokens are left to do;
/// a decode is a sequence that has begun and has one left.
struct SeqView {
  SeqId id = 0;
  int32_t known = 0;      // tokens whose ids are known: prompt and output
  int32_t computed = 0;   // tokens whose keys and values are in the KV cache
  int32_t blocks = 0;     // KV blocks of its computed tokens
  int32_t shared = 0;     // of these, held by other sequences too
  int32_t priority = 0;   // lower is served first
  int32_t behind = 0;     // of `blocks`, given back because every attention window has passed them

  /// KV blocks that preempting it frees.
  int32_t own() const { return blocks - behind - shared; }

  bool operator==(const SeqView&) const = default;
};

struct Limits {
  int32_t max_tokens = 0;    // the token budget
  int32_t max_seqs = 0;      // sequences of one forward
  int32_t free_blocks = 0;   // free or evictable
  int32_t total_blocks = 0;
  int32_t block_size = 0;    // tokens of one KV block
};

/// `tokens` of a sequence, from its `computed` on. It yields logits exactly if it reaches `known`.
struct Chunk {
  SeqId id = 0;
  int32_t tokens = 0;

  bool operator==(const Chunk&) const = default;
};

struct StepPlan {
  std::vector<Chunk> chunks;     // what runs, decodes first
  std::vector<SeqId> preempt;    // whose blocks are freed before: tokens stay, keys and values are recomputed later

  bool operator==(const StepPlan&) const = default;
};

/// The Dynamic SplitFuse rule (DeepSpeed-FastGen, 2023) over `in_order`, first served first:
/// 1. every decode gets its one token;
/// 2. the rest of the budget goes to the other sequences in order, the last one cut so that the
///    budget is met exactly.
/// Where blocks are short a decode preempts sequences behind it, last first, and itself if there are
/// none. Any other sequence takes a shorter chunk; if it could not advance at all it preempts those
/// behind it that are not decodes, and the first in order preempts anyone. So the first in order always
/// advances unless decodes alone fill the budget.
/// Sequences with nothing to do (known == computed) are only victims, and where they are last in order they make room
/// for whole chunks.
/// Pure: no clock, no state; allocates nothing once `out` has capacity. O(sequences).
void plan_splitfuse(std::span<const SeqView> in_order, const Limits& limits, StepPlan& out);

}  // namespace splitfuse
