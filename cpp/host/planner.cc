// The SplitFuse rule. See plan.h for what it promises.
#include <algorithm>
#include <cstddef>

#include "base/check.h"
#include "splitfuse/plan.h"

namespace splitfuse {
namespace {

bool is_decode(const SeqView& seq) { return seq.known - seq.computed == 1 && seq.computed > 0; }
bool is_idle(const SeqView& seq) { return seq.known == seq.computed; }

/// One call's working state. Victims are always taken from the back of the order, so who has been
/// preempted is told by two marks instead of a flag per sequence.
class Planner {
 public:
  Planner(std::span<const SeqView> order, const Limits& limits, StepPlan& out)
      : order_(order), limits_(limits), out_(out), end_(order.size()), prompt_end_(order.size()) {
    budget_ = limits.max_tokens;
    slots_ = limits.max_seqs;
    free_ = limits.free_blocks;
    out_.chunks.clear();
    out_.preempt.clear();
  }

  void run() {
    for (size_t i = 0; i < end_ && budget_ > 0 && slots_ > 0; ++i) {
      if (is_decode(order_[i])) plan_decode(i);
    }
    prompt_end_ = end_;
    for (size_t i = 0; i < prompt_end_ && budget_ > 0 && slots_ > 0; ++i) {
      const SeqView& seq = order_[i];
      if (seq.known > seq.computed && !is_decode(seq)) plan_prompt(i);
    }
  }

 private:
  int32_t blocks_needed(const SeqView& seq, int32_t tokens) const {
    return std::max(0, ceil_div(seq.computed + tokens, limits_.block_size) - seq.blocks);
  }
  /// Tokens that fit into the blocks `seq` holds and all free ones.
  int64_t room(const SeqView& seq) const { return (int64_t{seq.blocks} + free_) * limits_.block_size - seq.computed; }
  void take(const SeqView& seq, int32_t tokens) {
    free_ -= blocks_needed(seq, tokens);
    budget_ -= tokens;
    --slots_;
    out_.chunks.push_back({seq.id, tokens});
  }
  void preempt(const SeqView& seq) {
    if (seq.blocks == 0) return;
    out_.preempt.push_back(seq.id);
    free_ += seq.own();
  }
  /// Nobody but the first holds anything any more: blocks its victims shared among themselves, which
  /// no single preemption counted, are free too.
  void settle_first() { free_ = limits_.total_blocks - (order_[0].blocks - order_[0].behind); }

  void plan_decode(size_t i) {
    const SeqView& seq = order_[i];
    const int32_t need = blocks_needed(seq, 1);
    while (need > free_ && end_ > i + 1) preempt(order_[--end_]);
    if (need > free_ && i == 0) settle_first();
    if (need > free_) {
      end_ = i;
      preempt(seq);
      return;
    }
    take(seq, 1);
  }

  void plan_prompt(size_t i) {
    const SeqView& seq = order_[i];
    const int32_t todo = seq.known - seq.computed;
    while (room(seq) < std::min(todo, budget_) && prompt_end_ > i + 1) {
      const SeqView& last = order_[prompt_end_ - 1];
      if (!is_idle(last) && !is_decode(last)) break;
      --prompt_end_;
      if (is_idle(last)) preempt(last);
    }
    while (room(seq) < 1 && prompt_end_ > i + 1) {
      if (!is_decode(order_[--prompt_end_])) preempt(order_[prompt_end_]);
    }
    if (i == 0 && room(seq) < 1) preempt_decodes_for_first();
    const auto tokens = static_cast<int32_t>(std::min<int64_t>(std::min(todo, budget_), room(seq)));
    if (tokens > 0) take(seq, tokens);
  }

  void preempt_decodes_for_first() {
    const SeqView& first = order_[0];
    while (room(first) < 1 && end_ > 1) {
      const SeqView& victim = order_[--end_];
      if (!is_decode(victim)) continue;
      if (!out_.chunks.empty() && out_.chunks.back().id == victim.id) {
        free_ += blocks_needed(victim, 1);
        ++budget_;
        ++slots_;
        out_.chunks.pop_back();
      }
      preempt(victim);
    }
    prompt_end_ = std::min(prompt_end_, end_);
    if (room(first) < 1) settle_first();
  }

  std::span<const SeqView> order_;
  const Limits& limits_;
  StepPlan& out_;
  size_t end_;          // whoever is at or behind it has been preempted
  size_t prompt_end_;   // whoever is at or behind it and not a decode has been preempted
  int32_t budget_, slots_, free_;
};

}  // namespace

void plan_splitfuse(std::span<const SeqView> in_order, const Limits& limits, StepPlan& out) {
  Planner(in_order, limits, out).run();
}

}  // namespace splitfuse
