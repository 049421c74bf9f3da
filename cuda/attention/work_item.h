// What the attention kernels are told to do, as the host plans it and the device reads it.
//
// The rows of a sequence's chunk and a KV head are its query positions times the query heads of the group, numbered
// position by position: row r is position r / group of the chunk and head r % group of the group.
#pragma once

#include <cstdint>

namespace splitfuse::cuda {

/// Keys that are summed on their own before they join a row's result; segments start at multiples of it. Only whole
/// segments are given to different blocks, and they always join in ascending order.
inline constexpr int32_t kSegmentKeys = 512;

/// Some rows of a chunk over some segments of their keys; the work of one block for each KV head.
struct WorkItem {
  int32_t batch_row = 0;      // of the chunk's first position
  int32_t computed = 0;       // its position in the sequence
  int32_t table = 0;          // where the sequence's block table begins
  int32_t first_row = 0;
  int32_t rows = 0;
  int32_t first_segment = 0;
  int32_t last_segment = 0;   // one past the last
  int32_t state = -1;  // where its states go, [segment][row]; -1: it sees all keys of its rows and writes them
};

/// Rows whose segments lie in states, to be joined.
struct JoinItem {
  int32_t batch_row = 0;
  int32_t first_row = 0;
  int32_t rows = 0;
  int32_t segments = 0;
  int32_t state = 0;
};

}  // namespace splitfuse::cuda
