// The products of all experts at once. Which rows an expert has is known on the device alone: the tiles of slots are
// taken from a table there, of which the last may be empty. Tiles and sums are those of gemm_sm80().
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/device/launch.cuh"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/tile_sm80.cuh"
#include "cuda/ops/experts.h"

namespace splitfuse::cuda {
namespace {

/// As load_rows(), of the rows of `matrix` that `row_of` [kCount], shared memory, names; -1: zeros.
template <int kCount, int kThreads>
__device__ __forceinline__ void load_listed(uint32_t to, const void* matrix, int64_t stride, const int32_t* row_of,
                                            int32_t step, int32_t depth) {
  static_assert(kCount * kPieces % kThreads == 0);
#pragma unroll
  for (int i = 0; i < kCount * kPieces / kThreads; ++i) {
    const int index = i * kThreads + static_cast<int>(threadIdx.x);
    const int row = index / kPieces;
    const int piece = index % kPieces;
    const int32_t k = step * kDepthStep + piece * 8;
    const int32_t source = row_of[row];
    const bool valid = source >= 0 && k < depth;
    const auto* from = static_cast<const uint16_t*>(matrix) + (valid ? source * stride + k : 0);
    copy_piece(to + piece_offset(row, piece), from, valid);
  }
}

template <class Element, class Tile>
__global__ __launch_bounds__(Tile::kThreads,
                             Tile::kBlocks) void expert_gemm_kernel(const ExpertGemmTask task,
                                                                    const __grid_constant__ ExpertWeights weights) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ int32_t row_of[Tile::kRows];
  wait_for_inputs();
  const auto index = static_cast<int32_t>(blockIdx.x);
  const SlotTile tile = task.tiles[index / task.weight_tiles];
  if (tile.expert < 0) return;
  const ExpertShape shape = tile.expert == task.shared_expert ? task.shared : task.routed;
  const int32_t weight_row = index % task.weight_tiles * Tile::kWeightRows;
  if (weight_row >= shape.weight_rows) return;

  const int32_t end = task.first_slot[tile.expert + 1];
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows; i += Tile::kThreads) {
    const int32_t slot = tile.slot + i;
    row_of[i] = slot >= end ? -1 : task.row_of_slot != nullptr ? task.row_of_slot[slot] : slot;
  }
  __syncthreads();

  const std::byte* data = weights.data[tile.expert];
  GemmTask gemm;
  gemm.weights = data;
  gemm.bias = shape.bias_offset == 0 ? nullptr : reinterpret_cast<const float*>(data + shape.bias_offset);
  gemm.out = task.out;
  gemm.out_stride = task.out_stride;
  gemm.rows = end;
  gemm.columns = shape.columns;
  gemm.depth = shape.depth;
  gemm.epilogue = task.epilogue;
  gemm.activation = task.activation;
  gemm.gated = task.gated;
  multiply_tile<Element, Tile>(gemm, shared, weight_row, tile.slot, [&](uint32_t to, int32_t step) {
    load_rows<Tile::kWeightRows, Tile::kThreads>(to, data, shape.weight_stride, weight_row, shape.weight_rows, step,
                                                 shape.depth);
    load_listed<Tile::kRows, Tile::kThreads>(to + Tile::kWeightRows * kPieces * 16, task.in, task.in_stride, row_of,
                                             step, shape.depth);
  });
}

template <class Element, class Tile>
void run(ExpertGemmTask task, const ExpertWeights& weights, const GemmPlace& place) {
  task.weight_tiles = tiles_over(std::max(task.routed.weight_rows, task.shared.weight_rows), Tile::kWeightRows);
  Launch how;
  how.grid = dim3(static_cast<unsigned>(task.weight_tiles) * static_cast<unsigned>(task.tile_count));
  how.block = dim3(Tile::kThreads);
  how.stream = place.stream;
  how.shared_bytes = Tile::kSharedBytes;
  how.overlap = place.overlap;
  launch("expert_gemm", expert_gemm_kernel<Element, Tile>, how, task, weights);
}

template <class Element>
void choose(const ExpertGemmTask& task, const ExpertWeights& weights, int tile, const GemmPlace& place) {
  switch (tile) {
    case 0:
      return run<Element, SmallestSm80>(task, weights, place);
    case 1:
      return run<Element, MiddleSm80>(task, weights, place);
    default:
      return run<Element, LargestSm80>(task, weights, place);
  }
}

template <class Element>
void prepare() {
  allow_shared_memory(expert_gemm_kernel<Element, SmallestSm80>, SmallestSm80::kSharedBytes);
  allow_shared_memory(expert_gemm_kernel<Element, MiddleSm80>, MiddleSm80::kSharedBytes);
  allow_shared_memory(expert_gemm_kernel<Element, LargestSm80>, LargestSm80::kSharedBytes);
}

}  // namespace

int expert_tile(int64_t slots, int32_t experts) {
  if (slots <= int64_t{kTilesSm80[0].rows} * experts) return 0;
  return slots < int64_t{kTilesSm80[2].rows} * experts ? 1 : 2;
}

int32_t expert_tile_rows(int tile) { return kTilesSm80[tile].rows; }

void prepare_expert_gemm() {
  prepare<__nv_bfloat16>();
  prepare<__half>();
}

void expert_gemm(const ExpertGemmTask& task, const ExpertWeights& weights, int tile, const GemmPlace& place) {
  task.half ? choose<__half>(task, weights, tile, place) : choose<__nv_bfloat16>(task, weights, tile, place);
}

}  // namespace splitfuse::cuda
