// The parts of a product with mma.sync.m16n8k16 and cp.async. A block keeps some steps of depth of its tile in shared
// memory, in 128-byte rows whose 16-byte pieces are swapped by the row's number, so that ldmatrix meets all banks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/device/launch.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/number.cuh"
#include "cuda/gemm/tile_rules.h"

namespace splitfuse::cuda {

inline constexpr int kPieces = 8;   // of 16 bytes, in a row of a step

/// The tile of rule `kIndex`, its warps kWarpsWeights x kWarpsRows.
template <int kIndex, int kWarpsWeights, int kWarpsRows>
struct TileSm80 {
  static constexpr int kWeightRows = kTilesSm80[kIndex].weight_rows;
  static constexpr int kRows = kTilesSm80[kIndex].rows;
  static constexpr int kStages = kTilesSm80[kIndex].stages;
  static constexpr int kBlocks = kTilesSm80[kIndex].blocks;
  static constexpr int kWarpsAlongWeights = kWarpsWeights;
  static constexpr int kThreads = kWarpsWeights * kWarpsRows * 32;
  static constexpr int kWeightTiles = kWeightRows / kWarpsWeights / 16;   // instructions of a warp
  static constexpr int kRowTiles = kRows / kWarpsRows / 8;
  static constexpr int kStageBytes = (kWeightRows + kRows) * kPieces * 16;
  static constexpr int kStagedBytes = kRows * staged_stride(kWeightRows) * 4;
  static constexpr int kSharedBytes = std::max(kStages * kStageBytes, kStagedBytes);
  static_assert(kRowTiles % 2 == 0 && kWeightRows % (16 * kWarpsWeights) == 0);
};

using SmallestSm80 = TileSm80<0, 4, 1>;
using MiddleSm80 = TileSm80<1, 2, 2>;
using LargestSm80 = TileSm80<2, 4, 2>;

__device__ __forceinline__ uint32_t piece_offset(int row, int piece) {
  return static_cast<uint32_t>((row * kPieces + (piece ^ (row % kPieces))) * 16);
}

/// Step `step` of `count` rows from `first` on of a matrix [rows, depth] to `to`; zero where it has none.
template <int kCount, int kThreads>
__device__ __forceinline__ void load_rows(uint32_t to, const void* matrix, int64_t stride, int32_t first, int32_t rows,
                                          int32_t step, int32_t depth) {
  static_assert(kCount * kPieces % kThreads == 0);
#pragma unroll
  for (int i = 0; i < kCount * kPieces / kThreads; ++i) {
    const int index = i * kThreads + static_cast<int>(threadIdx.x);
    const int row = index / kPieces;
    const int piece = index % kPieces;
    const int32_t k = step * kDepthStep + piece * 8;
    const bool valid = first + row < rows && k < depth;
    const auto* from = static_cast<const uint16_t*>(matrix) + (valid ? (first + row) * stride + k : 0);
    copy_piece(to + piece_offset(row, piece), from, valid);
  }
}

/// Adds one step to a warp's sums, 16 of depth after the other.
template <class Element, class Tile>
__device__ __forceinline__ void add_step(float (&sums)[Tile::kWeightTiles][Tile::kRowTiles][4], uint32_t stage,
                                         int weight_row, int row, int lane) {
#pragma unroll
  for (int k = 0; k < kDepthStep / 16; ++k) {
    uint32_t weights[Tile::kWeightTiles][4];
#pragma unroll
    for (int i = 0; i < Tile::kWeightTiles; ++i) {
      load_matrices(weights[i], stage + piece_offset(weight_row + i * 16 + lane % 16, 2 * k + lane / 16));
    }
    uint32_t in[Tile::kRowTiles / 2][4];
#pragma unroll
    for (int j = 0; j < Tile::kRowTiles / 2; ++j) {
      const int input = row + j * 16 + lane % 8 + lane / 16 * 8;
      load_matrices(in[j], stage + piece_offset(Tile::kWeightRows + input, 2 * k + lane / 8 % 2));
    }
#pragma unroll
    for (int i = 0; i < Tile::kWeightTiles; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kRowTiles; ++j) {
        multiply_add<Element>(sums[i][j], weights[i], in[j / 2][j % 2 * 2], in[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

/// Computes and finishes the tile of `task` that begins at (weight_row, row), after wait_for_inputs(). `load_stage(to,
/// step)` begins to copy a step of weights and of input rows to `to`. `shared`: Tile::kSharedBytes.
template <class Element, class Tile, class LoadStage>
__device__ __forceinline__ void multiply_tile(const GemmTask& task, unsigned char* shared, int32_t weight_row,
                                              int32_t row, const LoadStage& load_stage) {
  const auto ring = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_weight_row = warp % Tile::kWarpsAlongWeights * Tile::kWeightTiles * 16;
  const int warp_row = warp / Tile::kWarpsAlongWeights * Tile::kRowTiles * 8;
  const int32_t steps = tiles_over(task.depth, kDepthStep);

#pragma unroll
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    if (s < steps) load_stage(ring + s * Tile::kStageBytes, s);
    end_of_stage();
  }
  float sums[Tile::kWeightTiles][Tile::kRowTiles][4] = {};
  for (int32_t step = 0; step < steps; ++step) {
    wait_for_stages<Tile::kStages - 2>();
    __syncthreads();   // what every thread copied is there, and the stage before has been used up
    const int32_t next = step + Tile::kStages - 1;
    if (next < steps) load_stage(ring + next % Tile::kStages * Tile::kStageBytes, next);
    end_of_stage();
    add_step<Element, Tile>(sums, ring + step % Tile::kStages * Tile::kStageBytes, warp_weight_row, warp_row, lane);
  }
  wait_for_stages<0>();
  __syncthreads();
  let_next_begin();

  auto* staged = reinterpret_cast<float*>(shared);
  constexpr int kStride = staged_stride(Tile::kWeightRows);
#pragma unroll
  for (int i = 0; i < Tile::kWeightTiles; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kRowTiles; ++j) {
      const float (&s)[4] = sums[i][j];
      float* to = staged + (warp_row + j * 8) * kStride + warp_weight_row + i * 16;
      store_fragment<Tile::kWeightRows>(to, lane, s[0], s[1], s[2], s[3]);
    }
  }
  __syncthreads();
  finish_tile<Element, Tile::kWeightRows, Tile::kRows>(
      task, weight_row, row, static_cast<int>(threadIdx.x), Tile::kThreads,
      [staged](int r, int w) { return *reinterpret_cast<const float4*>(staged + r * kStride + w); });
}

}  // namespace splitfuse::cuda
