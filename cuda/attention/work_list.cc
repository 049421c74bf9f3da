#include "cuda/attention/work_list.h"

#include <algorithm>

#include "base/check.h"

namespace splitfuse::cuda {
namespace {

// Items that each block which runs at once should get: splitting stops there.
constexpr int32_t kItemsPerBlock = 2;
// Decodes of the greatest length that the room for states lets be split at once.
constexpr int64_t kSplitDecodes = 16;
// Beginning an item and ending it costs about as much as this many tiles of keys.
constexpr int64_t kItemCost = 2;

}  // namespace

int64_t WorkShape::states() const {
  const int64_t segments = ceil_div(max_context, kSegmentKeys);
  return segments * std::max<int64_t>(kSplitDecodes * group, int64_t{2} * tile_rows);
}

int32_t WorkShape::max_joins() const { return kItemsPerBlock * blocks; }

int32_t WorkShape::max_items() const {
  const int64_t runs = ceil_div(int64_t{max_rows} * group, int64_t{tile_rows}) + max_seqs;
  // Parts of split runs number at most twice the items that are aimed at, as a run may have half a part too many.
  return static_cast<int32_t>(runs + 2 * int64_t{max_joins()});
}

WorkPlanner::WorkPlanner(const WorkShape& shape) : shape_(shape) {
  SPLITFUSE_ASSERT(shape.group > 0 && shape.tile_rows > 0 && shape.blocks > 0);
  SPLITFUSE_ASSERT(shape.tile_keys > 0 && kSegmentKeys % shape.tile_keys == 0);
  runs_.reserve(static_cast<size_t>(shape.max_items()));
}

WorkList WorkPlanner::make_list() const {
  WorkList list;
  list.items.reserve(static_cast<size_t>(shape_.max_items()));
  list.joins.reserve(static_cast<size_t>(shape_.max_joins()));
  return list;
}

/// Lists the runs of rows, costliest first, and returns what they cost together.
int64_t WorkPlanner::collect(std::span<const RaggedSeq> seqs, std::span<const int32_t> tables, int32_t window) {
  runs_.clear();
  int64_t total = 0;
  for (size_t s = 0; s < seqs.size(); ++s) {
    const RaggedSeq& seq = seqs[s];
    const int32_t rows = seq.length * shape_.group;
    for (int32_t at = 0; at < rows; at += shape_.tile_rows) {
      Run run;
      run.item.batch_row = seq.begin;
      run.item.computed = seq.computed;
      run.item.table = tables[s];
      run.item.first_row = at;
      run.item.rows = std::min(shape_.tile_rows, rows - at);
      const int32_t position = seq.computed + at / shape_.group;
      const int32_t first = window > 0 ? std::max(position - window + 1, 0) : 0;
      const int32_t past = seq.computed + (at + run.item.rows - 1) / shape_.group + 1;
      run.item.first_segment = first / kSegmentKeys;
      run.item.last_segment = ceil_div(past, kSegmentKeys);
      run.cost = ceil_div(past, shape_.tile_keys) - first / shape_.tile_keys + kItemCost;
      total += run.cost;
      runs_.push_back(run);
    }
  }
  std::sort(runs_.begin(), runs_.end(), [](const Run& a, const Run& b) {
    if (a.cost != b.cost) return a.cost > b.cost;
    return a.item.batch_row != b.item.batch_row ? a.item.batch_row < b.item.batch_row
                                                : a.item.first_row < b.item.first_row;
  });
  return total;
}

void WorkPlanner::plan(std::span<const RaggedSeq> seqs, std::span<const int32_t> tables, int32_t window,
                       WorkList& list) {
  list.items.clear();
  list.joins.clear();
  states_used_ = 0;
  const int64_t total = collect(seqs, tables, window) * shape_.kv_heads;
  const int64_t fair = std::max(total / (kItemsPerBlock * int64_t{shape_.blocks}), kItemCost + 1);
  for (const Run& run : runs_) add(run, fair, list);
}

void WorkPlanner::add(const Run& run, int64_t fair, WorkList& list) {
  const int32_t segments = run.item.last_segment - run.item.first_segment;
  const auto parts = static_cast<int32_t>(std::clamp<int64_t>((run.cost + fair / 2) / fair, 1, segments));
  const int64_t states = int64_t{segments} * run.item.rows;
  const bool room = static_cast<int32_t>(list.joins.size()) < shape_.max_joins() &&
                    static_cast<int64_t>(list.items.size()) + parts + static_cast<int64_t>(runs_.size()) <=
                        int64_t{shape_.max_items()} &&
                    states_used_ + states <= shape_.states();
  if (parts == 1 || !room) {
    list.items.push_back(run.item);
    return;
  }
  for (int32_t part = 0; part < parts; ++part) {
    WorkItem item = run.item;
    const auto begin = static_cast<int32_t>(int64_t{segments} * part / parts);
    item.first_segment = run.item.first_segment + begin;
    item.last_segment = run.item.first_segment + static_cast<int32_t>(int64_t{segments} * (part + 1) / parts);
    item.state = static_cast<int32_t>(states_used_ + int64_t{begin} * run.item.rows);
    list.items.push_back(item);
  }
  list.joins.push_back(
      {run.item.batch_row, run.item.first_row, run.item.rows, segments, static_cast<int32_t>(states_used_)});
  states_used_ += states;
}

}  // namespace splitfuse::cuda
