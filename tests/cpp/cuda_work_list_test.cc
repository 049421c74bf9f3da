// The plan of the CUDA backend's attention: who computes which rows over which keys. No GPU, and no CUDA, is needed.
#include "cuda/attention/work_list.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

namespace splitfuse::cuda {
namespace {

constexpr int32_t kContext = 40000;

WorkShape make_shape(int32_t group, int32_t kv_heads) {
  WorkShape shape;
  shape.group = group;
  shape.kv_heads = kv_heads;
  shape.blocks = 264;
  shape.max_rows = 4096;
  shape.max_seqs = 300;
  shape.max_context = kContext;
  return shape;
}

struct Batch {
  std::vector<RaggedSeq> seqs;
  std::vector<int32_t> tables;

  void add(int32_t computed, int32_t length) {
    RaggedSeq seq;
    seq.begin = seqs.empty() ? 0 : seqs.back().begin + seqs.back().length;
    seq.length = length;
    seq.computed = computed;
    seqs.push_back(seq);
    tables.push_back(static_cast<int32_t>(tables.size()) * 1000);
  }
};

/// The segments that each row is given, and where their states go (-1: nowhere).
using Given = std::map<std::pair<int32_t, int32_t>, std::map<int32_t, int32_t>>;

Given given_segments(const Batch& batch, const WorkList& list, const WorkShape& shape) {
  Given given;
  for (const WorkItem& item : list.items) {
    EXPECT_TRUE(0 < item.rows && item.rows <= shape.tile_rows);
    EXPECT_LT(item.first_segment, item.last_segment);
    const auto seq = std::find_if(batch.seqs.begin(), batch.seqs.end(),
                                  [&](const RaggedSeq& s) { return s.begin == item.batch_row; });
    EXPECT_NE(seq, batch.seqs.end());
    EXPECT_EQ(item.computed, seq->computed);
    EXPECT_EQ(item.table, batch.tables[static_cast<size_t>(seq - batch.seqs.begin())]);
    for (int32_t segment = item.first_segment; segment < item.last_segment; ++segment) {
      for (int32_t row = 0; row < item.rows; ++row) {
        const int32_t state = item.state < 0 ? -1 : item.state + (segment - item.first_segment) * item.rows + row;
        const bool first = given[{item.batch_row, item.first_row + row}].emplace(segment, state).second;
        EXPECT_TRUE(first) << "segment " << segment << " twice";
      }
    }
  }
  return given;
}

/// Every row has the segments that its keys lie in, without a gap, and joins read the states that items write.
void expect_covered(const Batch& batch, const WorkList& list, const WorkShape& shape, int32_t window) {
  const Given given = given_segments(batch, list, shape);
  std::map<std::pair<int32_t, int32_t>, std::pair<JoinItem, int32_t>> joined;
  for (const JoinItem& join : list.joins) {
    for (int32_t row = 0; row < join.rows; ++row) {
      EXPECT_TRUE(joined.emplace(std::pair(join.batch_row, join.first_row + row), std::pair(join, row)).second);
    }
  }
  std::set<int32_t> states;
  for (const RaggedSeq& seq : batch.seqs) {
    for (int32_t row = 0; row < seq.length * shape.group; ++row) {
      const auto found = given.find({seq.begin, row});
      ASSERT_NE(found, given.end());
      const std::map<int32_t, int32_t>& segments = found->second;
      const int32_t position = seq.computed + row / shape.group;
      const int32_t first = segments.begin()->first;
      EXPECT_LE(first, (window > 0 ? std::max(position - window + 1, 0) : 0) / kSegmentKeys);
      EXPECT_GE(segments.rbegin()->first, position / kSegmentKeys);
      EXPECT_EQ(segments.rbegin()->first - first + 1, static_cast<int32_t>(segments.size()));
      const auto join = joined.find({seq.begin, row});
      for (const auto& [segment, state] : segments) {
        if (join == joined.end()) {
          EXPECT_EQ(state, -1);
          continue;
        }
        const auto& [item, at] = join->second;
        EXPECT_EQ(static_cast<int32_t>(segments.size()), item.segments);
        EXPECT_EQ(state, item.state + (segment - first) * item.rows + at);
        EXPECT_TRUE(states.insert(state).second) << "a state for two";
        EXPECT_LT(state, shape.states());
      }
    }
  }
}

WorkList plan(const Batch& batch, const WorkShape& shape, int32_t window) {
  WorkPlanner planner(shape);
  WorkList list = planner.make_list();
  planner.plan(batch.seqs, batch.tables, window, list);
  EXPECT_LE(static_cast<int32_t>(list.items.size()), shape.max_items());
  EXPECT_LE(static_cast<int32_t>(list.joins.size()), shape.max_joins());
  return list;
}

TEST(CudaWorkList, EveryKeyOfEveryRowIsSeenOnce) {
  std::mt19937 random(7);
  for (int32_t group : {1, 3, 4, 7, 71}) {
    for (int32_t window : {0, 1, 100, 512, 513, 4096}) {
      const WorkShape shape = make_shape(group, 2);
      Batch batch;
      batch.add(0, 1);
      batch.add(511, 2);   // over the end of a segment
      batch.add(512, 1);
      for (int i = 0; i < 12; ++i) {
        const auto length = static_cast<int32_t>(i % 3 == 0 ? 1 + random() % 200 : 1);
        batch.add(static_cast<int32_t>(random() % (kContext - 200)), length);
      }
      expect_covered(batch, plan(batch, shape, window), shape, window);
    }
  }
}

TEST(CudaWorkList, AWindowLeavesOutWhatLiesBeforeIt) {
  Batch batch;
  batch.add(10000, 1);
  const WorkList list = plan(batch, make_shape(4, 8), 1000);
  for (const WorkItem& item : list.items) EXPECT_GE(item.first_segment, (10000 - 999) / kSegmentKeys);
}

TEST(CudaWorkList, OneLongDecodeIsWorkForManyBlocks) {
  const WorkShape shape = make_shape(4, 8);
  Batch batch;
  batch.add(32767, 1);
  const WorkList list = plan(batch, shape, 0);
  EXPECT_EQ(list.joins.size(), 1u);
  EXPECT_GE(static_cast<int32_t>(list.items.size()) * shape.kv_heads, shape.blocks);
  expect_covered(batch, list, shape, 0);
}

TEST(CudaWorkList, WhereThereIsWorkForAllNothingIsSplit) {
  Batch batch;
  for (int i = 0; i < 280; ++i) batch.add(2000, 1);
  const WorkList list = plan(batch, make_shape(4, 8), 0);
  EXPECT_EQ(list.items.size(), 280u);
  EXPECT_TRUE(list.joins.empty());
}

TEST(CudaWorkList, TheLongestComesFirstAndIsSplitAmongMany) {
  Batch batch;
  for (int i = 0; i < 100; ++i) batch.add(1000, 1);
  batch.add(39000, 1);
  const WorkList list = plan(batch, make_shape(4, 8), 0);
  ASSERT_FALSE(list.joins.empty());
  EXPECT_EQ(list.items[0].computed, 39000);
  EXPECT_GE(list.items[0].state, 0);
}

TEST(CudaWorkList, RoomIsNeverExceeded) {
  const WorkShape shape = make_shape(1, 1);
  WorkPlanner planner(shape);
  WorkList list = planner.make_list();
  const size_t items = list.items.capacity();
  const size_t joins = list.joins.capacity();
  for (int32_t seqs : {1, 20, 100, 300}) {
    for (int32_t length : {1, 13}) {
      Batch batch;
      for (int32_t i = 0; i < seqs; ++i) batch.add(kContext - length - i, length);
      planner.plan(batch.seqs, batch.tables, 0, list);
      expect_covered(batch, list, shape, 0);
      EXPECT_EQ(list.items.capacity(), items);
      EXPECT_EQ(list.joins.capacity(), joins);
    }
  }
}

}  // namespace
}  // namespace splitfuse::cuda
