// Paged attention with mma.sync.m16n8k16 and cp.async. A warp has 16 rows of a work item; its block walks the keys
// that they see in tiles at fixed places, one in shared memory and the next on its way, gathered through the block
// table. A row's tiles and segments come in ascending order and its sums are a lane's own, so its arithmetic is
// settled by its position: tiles that it does not see change nothing, to the bit, nor do rows beside it.
//
// Shared memory: 2 x (keys, values) of a tile, in rows whose 16-byte pieces are swapped by the row's number, so that
// ldmatrix meets all banks; then for each warp its queries and the state of the segments that are done.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/attention/finite.cuh"
#include "cuda/attention/paged.h"
#include "cuda/attention/softmax.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/gemm/number.cuh"

namespace splitfuse::cuda {

/// For head_dim up to kDimValue, a multiple of 64.
template <int kDimValue, int kWarpsValue>
struct PagedTile {
  static constexpr int kDim = kDimValue;
  static constexpr int kWarps = kWarpsValue;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRows = kWarps * 16;
  static constexpr int kKeys = paged_tile_keys(kDim);
  static constexpr int kUnits = kKeys / 16;   // of 16 keys, which lie in one KV block
  static constexpr int kPieces = kDim / 8;    // of 16 bytes, in a key
  static constexpr int kTileBytes = kKeys * kDim * 2;
  static constexpr int kQueryBytes = 16 * kDim * 2;
  static constexpr int kStateBytes = 16 * kDim * 4;
  // Where registers hold queries, the state takes their place in shared memory.
  static constexpr bool kQueriesInRegisters = kDim <= 128;
  static constexpr int kWarpBytes = kStateBytes + (kQueriesInRegisters ? 0 : kQueryBytes);
  static constexpr int kSharedBytes = 4 * kTileBytes + kWarps * kWarpBytes;
  static constexpr int kStepsAtOnce = kQueriesInRegisters ? kDim / 16 : 4;   // more would be held in registers
  static_assert(kSharedBytes == paged_shared_bytes(kDim, kRows));
  static_assert(kDim % 64 == 0 && kKeys * kPieces % kThreads == 0 && kSegmentKeys % kKeys == 0);

  static __device__ __forceinline__ uint32_t piece_offset(int row, int piece) {
    return static_cast<uint32_t>((row * kPieces + (piece ^ (row % 8))) * 16);
  }
  /// From `offset`, of piece 0 or 1 of one of the first 16 rows, to 16 `unit` rows down and 2 `step` pieces on.
  static __device__ __forceinline__ uint32_t moved(uint32_t offset, int unit, int step) {
    return (offset ^ static_cast<uint32_t>(step % 4 * 32)) + static_cast<uint32_t>(step / 4 * 128 + unit * kDim * 32);
  }
  /// What a lane points to for load_matrices(): of 16 x 16 elements, its 8x8 parts in the order upper left, lower left,
  /// upper right, lower right; and with the middle two swapped.
  static __device__ __forceinline__ uint32_t down_first(int lane) { return piece_offset(lane % 16, lane / 16); }
  static __device__ __forceinline__ uint32_t right_first(int lane) {
    return piece_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
};

/// The keys of an item, and where they lie.
struct KeyRange {
  const char* head;       // the head's keys in block 0
  const int32_t* table;
  int32_t begin;
  int32_t end;
};

/// A lane's two rows, g and g + 8 of its warp's 16. Behind an item's last row they are the last, and not written.
struct LaneRows {
  int32_t position[2];
  int32_t low[2];   // first key that is seen
  float slope[2];   // of ALiBi

  __device__ __forceinline__ bool sees(int row, int32_t key) const { return key >= low[row] && key <= position[row]; }
};

/// A lane's part of two rows' running softmax: maximum of the scores in units of log2, sum of weights over the keys of
/// this lane, weighted sums of values in the order of multiply_add().
template <class Tile>
struct LaneState {
  float top[2];
  float sum[2];
  float values[Tile::kDim / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = no_score();
      sum[r] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < Tile::kDim / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) values[i][c] = 0.0f;
    }
  }
};

/// A warp's queries, as the first operand of multiply_add(): in registers, or fetched from shared memory each time.
template <class Tile>
struct Queries {
  uint32_t shared;
  uint32_t held[Tile::kQueriesInRegisters ? Tile::kDim / 16 : 1][4];

  __device__ __forceinline__ void fetch(uint32_t (&to)[4], int step, int lane) const {
    load_matrices(to, shared + Tile::moved(Tile::down_first(lane), 0, step));
  }
  __device__ __forceinline__ void hold(int lane) {
    if constexpr (Tile::kQueriesInRegisters) {
#pragma unroll
      for (int step = 0; step < Tile::kDim / 16; ++step) fetch(held[step], step, lane);
    }
  }
  __device__ __forceinline__ void get(uint32_t (&to)[4], int step, int lane) const {
    if constexpr (Tile::kQueriesInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = held[step][i];
    } else {
      fetch(to, step, lane);
    }
  }
};

/// The largest of, and the sum over, the four lanes that share a row; the same bits for each of them.
__device__ __forceinline__ float largest_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

/// Where the 16 keys of unit `unit` of tile `tile` begin; null if none of them is in range, as then no block may be
/// looked up.
template <class Tile>
__device__ __forceinline__ const char* find_unit(const PagedTask& task, const KeyRange& keys, int32_t tile, int unit) {
  const int32_t key = tile * Tile::kKeys + unit * 16;
  if (key >= keys.end || key + 16 <= keys.begin) return nullptr;
  const int32_t block = keys.table[key / task.block_size];
  return keys.head + block * task.block_bytes + int64_t{key % task.block_size} * task.head_dim * 2;
}

/// Begins to copy a tile's keys and values, zero where a key or dimension is out of range, to shared memory.
template <class Tile>
__device__ __forceinline__ void load_tile(const PagedTask& task, const KeyRange& keys, int32_t tile,
                                          const char* const (&units)[Tile::kUnits], uint32_t to) {
#pragma unroll 1
  for (int i = 0; i < Tile::kKeys * Tile::kPieces / Tile::kThreads; ++i) {
    const int index = i * Tile::kThreads + static_cast<int>(threadIdx.x);
    const int row = index / Tile::kPieces;
    const int piece = index % Tile::kPieces;
    const int32_t key = tile * Tile::kKeys + row;
    const bool valid = key >= keys.begin && key < keys.end && piece * 8 < task.head_dim;
    const char* from = valid ? units[row / 16] + row % 16 * (task.head_dim * 2) + piece * 16 : keys.head;
    const uint32_t at = to + Tile::piece_offset(row, piece);
    copy_piece(at, from, valid);
    copy_piece(at + Tile::kTileBytes, from + (valid ? task.value_bytes : 0), valid);
  }
}

/// Begins to copy a warp's 16 queries, zero behind the item's last row, to shared memory.
template <class Tile>
__device__ __forceinline__ void load_queries(const PagedTask& task, const WorkItem& item, int32_t kv_head,
                                             int32_t warp_row, int lane, uint32_t to) {
  const auto* q = static_cast<const uint16_t*>(task.q);
#pragma unroll 4
  for (int i = 0; i < Tile::kPieces / 2; ++i) {
    const int index = i * 32 + lane;
    const int row = index / Tile::kPieces;
    const int piece = index % Tile::kPieces;
    const bool valid = warp_row + row < item.rows && piece * 8 < task.head_dim;
    const int32_t number = item.first_row + warp_row + row;
    const int64_t at = (item.batch_row + int64_t{number / task.group}) * task.row_stride +
                       (kv_head * task.group + int64_t{number % task.group}) * task.head_dim + piece * 8;
    copy_piece(to + Tile::piece_offset(row, piece), q + (valid ? at : 0), valid);
  }
}

/// Queries times the tile's keys.
template <class Element, class Tile>
__device__ __forceinline__ void multiply_keys(float (&scores)[Tile::kKeys / 8][4], const Queries<Tile>& queries,
                                              uint32_t keys, int lane) {
#pragma unroll Tile::kStepsAtOnce
  for (int step = 0; step < Tile::kDim / 16; ++step) {
    uint32_t q[4];
    queries.get(q, step, lane);
#pragma unroll
    for (int j = 0; j < Tile::kUnits; ++j) {
      uint32_t k[4];
      load_matrices(k, keys + Tile::moved(Tile::right_first(lane), j, step));
      multiply_add<Element>(scores[2 * j], q, k[0], k[1]);
      multiply_add<Element>(scores[2 * j + 1], q, k[2], k[3]);
    }
  }
}

/// Softcap and ALiBi, and then the units of log2.
template <class Tile>
__device__ __forceinline__ void bend(float (&scores)[Tile::kKeys / 8][4], const PagedTask& task, const LaneRows& rows,
                                     int32_t key) {
#pragma unroll
  for (int j = 0; j < Tile::kKeys / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float score = scores[j][c] * task.scale;
      if (task.softcap > 0.0f) score = task.softcap * tanhf(score / task.softcap);
      const int32_t distance = key + j * 8 + c % 2 - rows.position[c / 2];
      score += rows.slope[c / 2] * static_cast<float>(distance);
      scores[j][c] = score * kLog2e;
    }
  }
}

/// Makes `scores` weights and moves the state's maximum, sums and values to the new base. `unit`: what scores are
/// multiplied by to be in units of log2.
template <class Tile>
__device__ __forceinline__ void make_weights(float (&scores)[Tile::kKeys / 8][4], LaneState<Tile>& state, float unit) {
  float base[2];
  float shrink[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = no_score();
#pragma unroll
    for (int j = 0; j < Tile::kKeys / 8; ++j) {
      largest = fmaxf(largest, fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
    }
    const float top = fmaxf(state.top[r], largest_of_row(largest) * unit);
    base[r] = base_of(top);
    shrink[r] = exp2_fast(state.top[r] - base[r]);
    state.top[r] = top;
    state.sum[r] *= shrink[r];
  }
#pragma unroll
  for (int i = 0; i < Tile::kDim / 8; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) state.values[i][c] *= shrink[c / 2];
  }
#pragma unroll
  for (int j = 0; j < Tile::kKeys / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      scores[j][c] = exp2_fast(fmaf(scores[j][c], unit, -base[c / 2]));
      state.sum[c / 2] += scores[j][c];
    }
  }
}

__device__ __forceinline__ uint32_t two_flags(bool low, bool high, uint32_t ones) {
  return (low ? ones & 0xffffu : 0u) | (high ? ones & 0xffff0000u : 0u);
}

/// Makes NaN of those sums whose row sees a value that is no finite number, in a tile where some row does not see it:
/// counts such values by multiplying who sees a key with what is not finite.
template <class Element, class Tile>
__device__ __forceinline__ void spread_nan(LaneState<Tile>& state, const LaneRows& rows, uint32_t values, int32_t key,
                                           int lane) {
  uint32_t seen[Tile::kUnits][4];
#pragma unroll
  for (int j = 0; j < Tile::kUnits; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t at = key + j * 16 + i / 2 * 8;
      seen[j][i] = two_flags(rows.sees(i % 2, at), rows.sees(i % 2, at + 1), kOnes<Element>);
    }
  }
#pragma unroll
  for (int d = 0; d < Tile::kDim / 16; ++d) {
    float count[2][4] = {};
#pragma unroll
    for (int j = 0; j < Tile::kUnits; ++j) {
      uint32_t v[4];
      load_transposed(v, values + Tile::moved(Tile::down_first(lane), j, d));
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = not_finite<Element>(v[i]) & kOnes<Element>;
      multiply_add<Element>(count[0], seen[j], v[0], v[1]);
      multiply_add<Element>(count[1], seen[j], v[2], v[3]);
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      if (count[c / 4][c % 4] > 0.0f) state.values[2 * d + c / 4][c % 4] = __int_as_float(0x7fffffff);
    }
  }
}

/// Adds weights times the tile's values. kMasked: some row does not see some key, whose weight 0 must not meet NaN.
template <class Element, class Tile, bool kMasked>
__device__ __forceinline__ void multiply_values(const float (&weights)[Tile::kKeys / 8][4], LaneState<Tile>& state,
                                                const LaneRows& rows, uint32_t values, int32_t key, int lane) {
  uint32_t bad = 0;
#pragma unroll
  for (int j = 0; j < Tile::kUnits; ++j) {
    const float (&low)[4] = weights[2 * j];
    const float (&high)[4] = weights[2 * j + 1];
    const uint32_t p[4] = {pack_two<Element>(low[0], low[1]), pack_two<Element>(low[2], low[3]),
                           pack_two<Element>(high[0], high[1]), pack_two<Element>(high[2], high[3])};
#pragma unroll
    for (int d = 0; d < Tile::kDim / 16; ++d) {
      uint32_t v[4];
      load_transposed(v, values + Tile::moved(Tile::down_first(lane), j, d));
      if constexpr (kMasked) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t not_numbers = not_finite<Element>(v[i]);
          v[i] &= ~not_numbers;
          bad |= not_numbers;
        }
      }
      multiply_add<Element>(state.values[2 * d], p, v[0], v[1]);
      multiply_add<Element>(state.values[2 * d + 1], p, v[2], v[3]);
    }
  }
  if constexpr (kMasked) {
    if (__any_sync(0xffffffff, bad != 0)) spread_nan<Element, Tile>(state, rows, values, key, lane);
  }
}

/// Adds a tile, which begins at key `first_key`, to a warp's states. `whole`: every row sees all of it.
template <class Element, class Tile, bool kExtras>
__device__ __forceinline__ void add_tile(const PagedTask& task, const Queries<Tile>& queries, const LaneRows& rows,
                                         LaneState<Tile>& state, uint32_t keys, int32_t first_key, bool whole,
                                         int lane) {
  float scores[Tile::kKeys / 8][4] = {};
  multiply_keys<Element, Tile>(scores, queries, keys, lane);
  const int32_t key = first_key + lane % 4 * 2;
  if constexpr (kExtras) bend<Tile>(scores, task, rows, key);
  if (!whole) {
#pragma unroll
    for (int j = 0; j < Tile::kKeys / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (!rows.sees(c / 2, key + j * 8 + c % 2)) scores[j][c] = no_score();
      }
    }
  }
  make_weights<Tile>(scores, state, kExtras ? 1.0f : task.scale * kLog2e);
  const uint32_t values = keys + Tile::kTileBytes;
  if (whole) {
    multiply_values<Element, Tile, false>(scores, state, rows, values, key, lane);
  } else {
    multiply_values<Element, Tile, true>(scores, state, rows, values, key, lane);
  }
}

/// Joins a segment's state to that of the segments before it, which the warp keeps at `kept`; both are then `state`.
/// The sums over keys must be whole.
template <class Tile>
__device__ __forceinline__ void join_kept(LaneState<Tile>& state, const float (&top)[2], const float (&sum)[2],
                                          const float4* kept, int lane) {
  const Join joins[2] = {Join(top[0], state.top[0]), Join(top[1], state.top[1])};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    state.sum[r] = joins[r](sum[r], state.sum[r]);
    state.top[r] = joins[r].top;
  }
#pragma unroll
  for (int i = 0; i < Tile::kDim / 8; ++i) {
    const float4 before = kept[i * 32 + lane];
    float (&values)[4] = state.values[i];
    values[0] = joins[0](before.x, values[0]);
    values[1] = joins[0](before.y, values[1]);
    values[2] = joins[1](before.z, values[2]);
    values[3] = joins[1](before.w, values[3]);
  }
}

template <class Tile>
__device__ __forceinline__ void keep(const LaneState<Tile>& state, float4* kept, int lane) {
#pragma unroll
  for (int i = 0; i < Tile::kDim / 8; ++i) {
    const float (&values)[4] = state.values[i];
    kept[i * 32 + lane] = {values[0], values[1], values[2], values[3]};
  }
}

__device__ __forceinline__ int32_t query_head(const PagedTask& task, const WorkItem& item, int32_t kv_head,
                                              int32_t row) {
  return kv_head * task.group + (item.first_row + row) % task.group;
}

/// Writes a segment's state to global memory. `row`: of the item, g of the lane.
template <class Tile>
__device__ __forceinline__ void write_state(const PagedTask& task, const WorkItem& item, const LaneState<Tile>& state,
                                            int32_t kv_head, int32_t segment, int32_t row, int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= item.rows) continue;
    const int64_t at =
        kv_head * task.states + item.state + int64_t{segment - item.first_segment} * item.rows + row + 8 * r;
    if (lane % 4 == 0) *reinterpret_cast<float2*>(task.state_sums + at * 2) = {state.top[r], state.sum[r]};
#pragma unroll
    for (int i = 0; i < Tile::kDim / 8; ++i) {
      if (i * 8 >= task.head_dim) continue;
      *reinterpret_cast<float2*>(task.state_values + at * task.head_dim + i * 8 + lane % 4 * 2) = {
          state.values[i][2 * r], state.values[i][2 * r + 1]};
    }
  }
}

template <class Element, class Tile>
__device__ __forceinline__ void write_result(const PagedTask& task, const WorkItem& item, const LaneState<Tile>& state,
                                             const LaneRows& rows, int32_t kv_head, int32_t row, int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= item.rows) continue;
    const int32_t head = query_head(task, item, kv_head, row + 8 * r);
    const float scale = result_scale(state.top[r], state.sum[r], task.sinks == nullptr ? nullptr : task.sinks + head);
    const int64_t batch_row = int64_t{item.batch_row} + rows.position[r] - item.computed;
    auto* out = static_cast<uint16_t*>(task.out) + batch_row * task.row_stride + int64_t{head} * task.head_dim;
#pragma unroll
    for (int i = 0; i < Tile::kDim / 8; ++i) {
      if (i * 8 >= task.head_dim) continue;
      *reinterpret_cast<uint32_t*>(out + i * 8 + lane % 4 * 2) =
          pack_two<Element>(result_of(state.values[i][2 * r], scale), result_of(state.values[i][2 * r + 1], scale));
    }
  }
}

__device__ __forceinline__ int32_t first_seen(int32_t position, int32_t window) {
  return window > 0 && position >= window ? position - window + 1 : 0;
}

__device__ __forceinline__ LaneRows lane_rows(const PagedTask& task, const WorkItem& item, int32_t kv_head,
                                              int32_t row) {
  LaneRows rows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t number = item.first_row + min(row + 8 * r, item.rows - 1);
    rows.position[r] = item.computed + number / task.group;
    rows.low[r] = first_seen(rows.position[r], task.window);
    rows.slope[r] = task.slopes == nullptr ? 0.0f : task.slopes[kv_head * task.group + number % task.group];
  }
  return rows;
}

template <class Element, class Tile, bool kExtras>
__global__ __launch_bounds__(Tile::kThreads) void paged_kernel(const PagedTask task) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ const char* units[2][Tile::kUnits];   // of the tiles in shared memory or next to come
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int32_t kv_head = static_cast<int32_t>(blockIdx.x) % task.kv_heads;
  wait_for_inputs();

  const WorkItem item = task.items[blockIdx.x / static_cast<unsigned>(task.kv_heads)];
  const int32_t first_position = item.computed + item.first_row / task.group;
  const int32_t last_position = item.computed + (item.first_row + item.rows - 1) / task.group;
  KeyRange keys;
  keys.head = reinterpret_cast<const char*>(task.kv) + kv_head * task.head_bytes;
  keys.table = task.tables + item.table;
  keys.begin = max(first_seen(first_position, task.window), item.first_segment * kSegmentKeys);
  keys.end = min(last_position + 1, item.last_segment * kSegmentKeys);
  const int32_t first_tile = keys.begin / Tile::kKeys;
  const int32_t last_tile = (keys.end + Tile::kKeys - 1) / Tile::kKeys;

  const auto ring = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  unsigned char* warp_memory = shared + 4 * Tile::kTileBytes + warp * Tile::kWarpBytes;
  auto* kept = reinterpret_cast<float4*>(warp_memory);
  Queries<Tile> queries;
  queries.shared = static_cast<uint32_t>(__cvta_generic_to_shared(warp_memory)) +
                   (Tile::kQueriesInRegisters ? 0 : Tile::kStateBytes);

  // The last warp looks up blocks, as where rows are few it has nothing else to do.
  const bool looks_up = warp == Tile::kWarps - 1 && lane < Tile::kUnits;
  if (looks_up) {
    units[first_tile % 2][lane] = find_unit<Tile>(task, keys, first_tile, lane);
    units[(first_tile + 1) % 2][lane] = find_unit<Tile>(task, keys, first_tile + 1, lane);
  }
  __syncthreads();
  load_queries<Tile>(task, item, kv_head, warp * 16, lane, queries.shared);
  load_tile<Tile>(task, keys, first_tile, units[first_tile % 2], ring + first_tile % 2 * 2 * Tile::kTileBytes);
  end_of_stage();

  const bool busy = warp * 16 < item.rows;
  const int32_t row = warp * 16 + lane / 4;
  const LaneRows rows = lane_rows(task, item, kv_head, row);
  const int32_t warp_first = __shfl_sync(0xffffffff, rows.position[0], 0);
  const int32_t warp_last = __shfl_sync(0xffffffff, rows.position[1], 31);
  wait_for_stages<0>();
  __syncwarp();
  queries.hold(lane);
  __syncwarp();

  LaneState<Tile> state;
  state.clear();
  float kept_top[2] = {no_score(), no_score()};
  float kept_sum[2] = {0.0f, 0.0f};
  bool joins = false;
  for (int32_t tile = first_tile; tile < last_tile; ++tile) {
    wait_for_stages<0>();
    __syncthreads();   // what every thread copied is there, and the tile before has been used up
    if (tile + 1 < last_tile) {
      load_tile<Tile>(task, keys, tile + 1, units[(tile + 1) % 2], ring + (tile + 1) % 2 * 2 * Tile::kTileBytes);
    }
    end_of_stage();
    const char* unit = looks_up ? find_unit<Tile>(task, keys, tile + 2, lane) : nullptr;

    const int32_t key = tile * Tile::kKeys;
    const int32_t past = key + Tile::kKeys;
    if (busy && key <= warp_last && past > first_seen(warp_first, task.window)) {
      const uint32_t at = ring + tile % 2 * 2 * Tile::kTileBytes;
      const bool whole = past - 1 <= warp_first && key >= first_seen(warp_last, task.window);
      add_tile<Element, Tile, kExtras>(task, queries, rows, state, at, key, whole, lane);
    }
    if (busy && (past % kSegmentKeys == 0 || tile + 1 == last_tile)) {
      state.sum[0] = sum_of_row(state.sum[0]);
      state.sum[1] = sum_of_row(state.sum[1]);
      if (item.state >= 0) {
        write_state<Tile>(task, item, state, kv_head, key / kSegmentKeys, row, lane);
        state.clear();
      } else {
        if (joins) join_kept<Tile>(state, kept_top, kept_sum, kept, lane);
        if (tile + 1 < last_tile) {
          keep<Tile>(state, kept, lane);
          joins = true;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            kept_top[r] = state.top[r];
            kept_sum[r] = state.sum[r];
          }
          state.clear();
        }
      }
    }
    if (looks_up) units[tile % 2][lane] = unit;
  }
  let_next_begin();
  if (busy && item.state < 0) write_result<Element, Tile>(task, item, state, rows, kv_head, row, lane);
}

template <class Element, class Tile>
auto choose_paged(const PagedTask& task) {
  const bool extras = task.softcap > 0.0f || task.slopes != nullptr;
  return extras ? paged_kernel<Element, Tile, true> : paged_kernel<Element, Tile, false>;
}

template <class Tile>
void attend_tile(const PagedTask& task, cudaStream_t stream, bool overlap) {
  Launch how;
  how.grid = dim3(static_cast<unsigned>(task.item_count) * static_cast<unsigned>(task.kv_heads));
  how.block = dim3(Tile::kThreads);
  how.stream = stream;
  how.shared_bytes = Tile::kSharedBytes;
  how.overlap = overlap;
  launch("attend_paged", task.half ? choose_paged<__half, Tile>(task) : choose_paged<__nv_bfloat16, Tile>(task), how,
         task);
}

template <class Element, class Tile>
void prepare_kernels() {
  allow_shared_memory(paged_kernel<Element, Tile, true>, Tile::kSharedBytes);
  allow_shared_memory(paged_kernel<Element, Tile, false>, Tile::kSharedBytes);
}

template <class Tile>
void prepare_tile(bool half) {
  half ? prepare_kernels<__half, Tile>() : prepare_kernels<__nv_bfloat16, Tile>();
}

using Tile64 = PagedTile<64, 4>;
using Tile128 = PagedTile<128, 4>;
using Tile256 = PagedTile<256, 4>;
using Narrow256 = PagedTile<256, 1>;   // where shared memory is small

// Each is compiled in a file of its own.
extern template void attend_tile<Tile64>(const PagedTask&, cudaStream_t, bool);
extern template void attend_tile<Tile128>(const PagedTask&, cudaStream_t, bool);
extern template void attend_tile<Tile256>(const PagedTask&, cudaStream_t, bool);
extern template void attend_tile<Narrow256>(const PagedTask&, cudaStream_t, bool);
extern template void prepare_tile<Tile64>(bool);
extern template void prepare_tile<Tile128>(bool);
extern template void prepare_tile<Tile256>(bool);
extern template void prepare_tile<Narrow256>(bool);

}  // namespace splitfuse::cuda
