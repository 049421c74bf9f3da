// Which part of a product a block computes. Weights are the first operand of every instruction and rows of the input
// the second, so a tile is (weight rows) x (input rows).
//
// The order of summation may not depend on the number of input rows. The tile may: it decides which elements a block
// computes, not how. The parts that depth is cut into decide how, so depth_splits() sees the weights' shape alone.
#pragma once

#include <cstdint>

namespace splitfuse::cuda {

/// Depth is walked in steps of so many elements: 128 bytes, a row of a swizzled tile.
inline constexpr int32_t kDepthStep = 64;

struct TileShape {
  int32_t weight_rows = 0;
  int32_t rows = 0;
  int32_t stages = 0;   // steps of depth in flight
  int32_t blocks = 0;   // per multiprocessor
  int32_t speed = 0;    // multiply-adds a multiprocessor does in a given time, in percent of the best tile's
};

inline constexpr TileShape kTilesSm80[] = {
    {64, 16, 6, 2, 20},
    {64, 64, 4, 2, 65},
    {128, 128, 3, 1, 100},
};
inline constexpr TileShape kTilesSm90a[] = {
    {64, 8, 11, 2, 10},  {64, 16, 10, 2, 20},  {64, 32, 8, 2, 35},    {64, 64, 6, 2, 55},
    {64, 128, 4, 2, 70}, {128, 128, 3, 2, 85}, {128, 256, 4, 1, 100},
};

constexpr int32_t tiles_over(int32_t size, int32_t tile) { return (size + tile - 1) / tile; }

/// Parts that depth is cut into on Hopper, where a cluster of blocks adds them up: as many as give the smallest tiles
/// of such weights 64 blocks, which can read at the memory's pace, each part having at least 4 steps.
constexpr int32_t depth_splits(int32_t weight_rows, int32_t depth) {
  const int32_t blocks = tiles_over(weight_rows, 64);
  const int32_t steps = tiles_over(depth, kDepthStep);
  int32_t splits = 1;
  while (splits < 8 && blocks * splits < 64 && steps >= 8 * splits) splits *= 2;
  return splits;
}

/// Steps [begin, end) of part `split`.
struct DepthRange {
  int32_t begin = 0;
  int32_t end = 0;
};
constexpr DepthRange depth_range(int32_t depth, int32_t splits, int32_t split) {
  const int32_t steps = tiles_over(depth, kDepthStep);
  return {steps * split / splits, steps * (split + 1) / splits};
}

/// The index of the tile in `tiles` with which the busiest multiprocessor is done first. Up to 64 input rows, where
/// reading the weights takes longest, it is the smallest that holds them all.
template <int kCount>
constexpr int choose_tile(const TileShape (&tiles)[kCount], int32_t weight_rows, int32_t rows, int32_t splits,
                          int32_t processors) {
  if (rows <= 64) {
    int smallest = 0;
    while (tiles[smallest].rows < rows) ++smallest;
    return smallest;
  }
  int best = 0;
  int64_t least = INT64_MAX;
  for (int i = 0; i < kCount; ++i) {
    const TileShape& tile = tiles[i];
    if (tile.rows < 64) continue;
    const int64_t blocks = int64_t{tiles_over(weight_rows, tile.weight_rows)} * tiles_over(rows, tile.rows) * splits;
    const int64_t turns = (blocks + processors - 1) / processors;
    const int64_t time = turns * tile.weight_rows * tile.rows * 100 / tile.speed;
    if (time <= least) {
      least = time;
      best = i;
    }
  }
  return best;
}

/// The order in which tiles are begun: blocks that run together share weights, and the input of a band of tiles, which
/// is what the second-level cache holds.
struct TileGrid {
  int32_t weight_tiles = 0;
  int32_t row_tiles = 0;

  static constexpr int32_t kBand = 16;
  struct Place {
    int32_t weight_tile = 0;
    int32_t row_tile = 0;
  };
  constexpr int32_t count() const { return weight_tiles * row_tiles; }
  constexpr Place place(int32_t index) const {
    const int32_t band = index / (kBand * weight_tiles);
    const int32_t rest = index - band * kBand * weight_tiles;
    const int32_t left = row_tiles - band * kBand;
    const int32_t width = left < kBand ? left : kBand;
    return {rest / width, band * kBand + rest % width};
  }
};

}  // namespace splitfuse::cuda
