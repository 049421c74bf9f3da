#include "cpu/attention_plan.h"

#include <algorithm>
#include <numeric>

#include "base/check.h"
#include "cpu/attention_kernels.h"

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

// As many query positions as give whole register tiles and about kItemRows rows.
int32_t positions_per_item(int32_t group) {
  return round_up(ceil_div(kItemRows, group), kAttentionRows / std::gcd(kAttentionRows, group));
}

int32_t segments_of(int32_t keys) { return ceil_div(keys, kAttentionSegment); }

}  // namespace

int64_t AttentionGrain::state_floats(int32_t positions) const {
  return attention_state_floats(int64_t{positions} * group, padded_dim);
}

AttentionGrain attention_grain(int32_t group, int32_t kv_heads, int32_t padded_dim, int32_t threads, int32_t max_rows,
                               int32_t max_seqs, int32_t max_context) {
  AttentionGrain grain;
  grain.group = group;
  grain.kv_heads = kv_heads;
  grain.padded_dim = padded_dim;
  grain.run_positions = positions_per_item(group);
  grain.threads = threads;
  if (threads > 1) {
    grain.partials = kSplitSequences * segments_of(max_context) * kv_heads * grain.state_floats(1);
    grain.splits = kItemsPerThread * threads;
  }
  // Parts of split runs number at most the items that are aimed at, and one more for each split run.
  grain.entries = ceil_div(max_rows, grain.run_positions) + max_seqs + 2 * grain.splits;
  return grain;
}

AttentionPlan::AttentionPlan(const AttentionGrain& grain, int32_t window) : grain_(grain), window_(window) {
  entries_.reserve(static_cast<size_t>(grain.entries));
  splits_.reserve(static_cast<size_t>(grain.splits));
}

int64_t AttentionPlan::bytes(const AttentionGrain& grain) {
  return int64_t{sizeof(AttentionPlan)} + grain.entries * int64_t{sizeof(Entry)} +
         grain.splits * int64_t{sizeof(Split)};
}

template <class Visit>
void AttentionPlan::for_each_run(const RaggedBatch& batch, const Visit& visit) const {
  for (size_t s = 0; s < batch.seqs.size(); ++s) {
    const RaggedSeq& seq = batch.seqs[s];
    for (int32_t at = 0; at < seq.length; at += grain_.run_positions) {
      Entry run;
      run.seq = static_cast<int32_t>(s);
      run.offset = at;
      run.positions = std::min(grain_.run_positions, seq.length - at);
      run.begin = std::max(seq.computed + at - window_ + 1, 0);
      run.first_segment = run.begin / kAttentionSegment;
      const int32_t past = seq.computed + at + run.positions;
      run.last_segment = segments_of(past);
      run.cost = int64_t{std::max(run.positions * grain_.group, kLeastCostRows)} * (past - run.begin);
      visit(run);
    }
  }
}

void AttentionPlan::make(const RaggedBatch& batch) {
  entries_.clear();
  splits_.clear();
  partials_used_ = 0;
  int64_t total = 0;
  for_each_run(batch, [&](const Entry& run) { total += run.cost; });
  const int64_t fair = std::max<int64_t>(total * grain_.kv_heads / (kItemsPerThread * grain_.threads), 1);
  for_each_run(batch, [&](const Entry& run) { add_run(run, fair); });
  std::sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) {
    return a.cost != b.cost ? a.cost > b.cost : a.seq != b.seq ? a.seq < b.seq : a.offset < b.offset;
  });
}

void AttentionPlan::add_run(const Entry& run, int64_t fair) {
  const int32_t segments = run.last_segment - run.first_segment;
  const auto parts = static_cast<int32_t>(std::min<int64_t>(segments, ceil_div(run.cost, fair)));
  const int64_t floats = int64_t{segments} * grain_.kv_heads * grain_.state_floats(run.positions);
  if (parts == 1 || static_cast<int64_t>(splits_.size()) == grain_.splits ||
      partials_used_ + floats > grain_.partials) {
    entries_.push_back(run);
    return;
  }
  for (int32_t part = 0; part < parts; ++part) {
    Entry entry = run;
    entry.first_segment = run.first_segment + segments * part / parts;
    entry.last_segment = run.first_segment + segments * (part + 1) / parts;
    entry.begin = std::max(run.begin, entry.first_segment * kAttentionSegment);
    entry.split = static_cast<int32_t>(splits_.size());
    entry.cost = run.cost / parts;
    entries_.push_back(entry);
  }
  splits_.push_back({partials_used_, parts, run.first_segment, run.last_segment});
  partials_used_ += floats;
}

}  // namespace splitfuse
