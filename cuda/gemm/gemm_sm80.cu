// The product with mma.sync.m16n8k16 and cp.async: for compute capability 8.x, where it is the only one.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device/launch.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/tile_rules.h"
#include "cuda/gemm/tile_sm80.cuh"

namespace splitfuse::cuda {
namespace {

template <class Tile>
__device__ __forceinline__ void load_stage(const GemmTask& task, uint32_t to, int32_t weight_row, int32_t row,
                                           int32_t step) {
  load_rows<Tile::kWeightRows, Tile::kThreads>(to, task.weights, task.weight_stride, weight_row, task.weight_rows, step,
                                               task.depth);
  load_rows<Tile::kRows, Tile::kThreads>(to + Tile::kWeightRows * kPieces * 16, task.in, task.in_stride, row, task.rows,
                                         step, task.depth);
}

template <class Element, class Tile>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBlocks) void gemm_sm80_kernel(const GemmTask task,
                                                                                  const TileGrid grid) {
  extern __shared__ __align__(128) unsigned char shared[];
  const TileGrid::Place tile = grid.place(static_cast<int32_t>(blockIdx.x));
  const int32_t weight_row = tile.weight_tile * Tile::kWeightRows;
  const int32_t row = tile.row_tile * Tile::kRows;
  wait_for_inputs();
  multiply_tile<Element, Tile>(task, shared, weight_row, row,
                               [&](uint32_t to, int32_t step) { load_stage<Tile>(task, to, weight_row, row, step); });
}

template <class Element, class Tile>
void run(const GemmTask& task, const GemmPlace& place) {
  const TileGrid grid{tiles_over(task.weight_rows, Tile::kWeightRows), tiles_over(task.rows, Tile::kRows)};
  Launch how;
  how.grid = dim3(static_cast<unsigned>(grid.count()));
  how.block = dim3(Tile::kThreads);
  how.stream = place.stream;
  how.shared_bytes = Tile::kSharedBytes;
  how.overlap = place.overlap;
  launch("gemm_sm80", gemm_sm80_kernel<Element, Tile>, how, task, grid);
}

template <class Element>
void choose(const GemmTask& task, const GemmPlace& place) {
  switch (choose_tile(kTilesSm80, task.weight_rows, task.rows, 1, place.processors)) {
    case 0:
      return run<Element, SmallestSm80>(task, place);
    case 1:
      return run<Element, MiddleSm80>(task, place);
    default:
      return run<Element, LargestSm80>(task, place);
  }
}

template <class Element>
void prepare() {
  allow_shared_memory(gemm_sm80_kernel<Element, SmallestSm80>, SmallestSm80::kSharedBytes);
  allow_shared_memory(gemm_sm80_kernel<Element, MiddleSm80>, MiddleSm80::kSharedBytes);
  allow_shared_memory(gemm_sm80_kernel<Element, LargestSm80>, LargestSm80::kSharedBytes);
}

}  // namespace

void prepare_gemm_sm80() {
  prepare<__nv_bfloat16>();
  prepare<__half>();
}

void gemm_sm80(const GemmTask& task, const GemmPlace& place) {
  if (task.rows == 0) return;
  task.half ? choose<__half>(task, place) : choose<__nv_bfloat16>(task, place);
}

}  // namespace splitfuse::cuda
