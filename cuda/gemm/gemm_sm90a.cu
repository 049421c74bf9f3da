// The product with wgmma and TMA, for Hopper. A block is one or two warpgroups that multiply, 64 weight rows each, and
// a warp whose one thread keeps TMA filling a ring of stages. Where depth is cut into parts, a cluster of blocks has
// one each, and they add up through each other's shared memory.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/device/launch.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/ring_sm90a.cuh"
#include "cuda/gemm/tensor_map.h"
#include "cuda/gemm/tile_rules.h"
#include "cuda/gemm/wgmma_sm90a.cuh"

namespace splitfuse::cuda {
namespace {

template <int kIndex>
struct TileSm90a {
  static constexpr int kWeightRows = kTilesSm90a[kIndex].weight_rows;
  static constexpr int kRows = kTilesSm90a[kIndex].rows;
  static constexpr int kStages = kTilesSm90a[kIndex].stages;
  static constexpr int kBlocks = kTilesSm90a[kIndex].blocks;
  static constexpr int kUsers = kWeightRows / 64 * 4;   // warps that multiply
  static constexpr int kThreads = (kUsers + 1) * 32;
  static constexpr int kRowBytes = kDepthStep * 2;
  static constexpr int kWeightBytes = kWeightRows * kRowBytes;
  static constexpr int kStageBytes = kWeightBytes + kRows * kRowBytes;
  static constexpr int kStagedBytes = kRows * staged_stride(kWeightRows) * 4;
  static constexpr int kRingBytes = std::max(kStages * kStageBytes, kStagedBytes);
  static constexpr int kAlignment = 1024;   // of the swizzle
  static constexpr int kSharedBytes = kAlignment + kRingBytes + static_cast<int>(sizeof(Ring<kStages>));
  static_assert(kStageBytes % kAlignment == 0 && kWeightBytes % kAlignment == 0 && kRingBytes % 8 == 0);
};

struct Plan {
  TileGrid grid;
  int32_t splits = 1;
  uint64_t weight_hint = 0;   // to the second-level cache
};

/// What one block computes.
struct Part {
  int32_t weight_row = 0;
  int32_t row = 0;
  DepthRange steps;
  int32_t count = 0;
};

template <class Tile>
__device__ __forceinline__ void load_weights(const CUtensorMap& map, const Part& part, Ring<Tile::kStages>& ring,
                                             unsigned char* stages, int32_t index, uint64_t hint) {
  cute::SM90_TMA_LOAD_2D::copy(&map, ring.barrier(index), hint, stages + index % Tile::kStages * Tile::kStageBytes,
                               (part.steps.begin + index) * kDepthStep, part.weight_row);
}
template <class Tile>
__device__ __forceinline__ void load_in(const CUtensorMap& map, const Part& part, Ring<Tile::kStages>& ring,
                                        unsigned char* stages, int32_t index) {
  cute::SM90_TMA_LOAD_2D::copy(&map, ring.barrier(index), static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                               stages + index % Tile::kStages * Tile::kStageBytes + Tile::kWeightBytes,
                               (part.steps.begin + index) * kDepthStep, part.row);
}

/// One thread: weights of as many steps as there is room for, before the input is known to be there; then all the rest.
template <class Tile>
__device__ __forceinline__ void fill(const CUtensorMap& weights, const CUtensorMap& in, const Part& part,
                                     Ring<Tile::kStages>& ring, unsigned char* stages, uint64_t hint) {
  const int32_t ahead = part.count < Tile::kStages ? part.count : Tile::kStages;
  for (int32_t i = 0; i < ahead; ++i) {
    ring.claim(i, Tile::kStageBytes);
    load_weights<Tile>(weights, part, ring, stages, i, hint);
  }
  wait_for_inputs();
  for (int32_t i = 0; i < ahead; ++i) load_in<Tile>(in, part, ring, stages, i);
  for (int32_t i = ahead; i < part.count; ++i) {
    ring.claim(i, Tile::kStageBytes);
    load_weights<Tile>(weights, part, ring, stages, i, hint);
    load_in<Tile>(in, part, ring, stages, i);
  }
}

/// A warpgroup: its sums over the block's steps, one instruction's depth after the other.
template <class Element, class Tile>
__device__ __forceinline__ void multiply(const Part& part, Ring<Tile::kStages>& ring, uint32_t stages, int group,
                                         int lane, float (&sums)[Tile::kRows / 2]) {
  for (int32_t i = 0; i < part.count; ++i) {
    ring.wait(i);
    const uint32_t stage = stages + i % Tile::kStages * Tile::kStageBytes;
    const uint64_t weights = rows_descriptor(stage + group * 64 * Tile::kRowBytes);
    const uint64_t in = rows_descriptor(stage + Tile::kWeightBytes);
    hold(sums);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < kDepthStep / 16; ++k) {
      wgmma<Element, Tile::kRows>(weights + 2 * k, in + 2 * k, sums, i == 0 && k == 0);
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();   // those of the step before are done
    hold(sums);
    if (i > 0 && lane == 0) ring.release(i - 1);
  }
  cute::warpgroup_wait<0>();
  hold(sums);
}

/// Lays a warp's sums down: instruction after instruction of 8 input rows.
template <class Tile>
__device__ __forceinline__ void stage_sums(const float (&sums)[Tile::kRows / 2], float* staged, int warp, int lane) {
#pragma unroll
  for (int j = 0; j < Tile::kRows / 8; ++j) {
    float* to = staged + j * 8 * staged_stride(Tile::kWeightRows) + warp * 16;
    store_fragment<Tile::kWeightRows>(to, lane, sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
  }
}

template <class Element, class Tile>
__device__ __forceinline__ void finish(const GemmTask& task, const Part& part, float* staged, int32_t splits) {
  constexpr int kStride = staged_stride(Tile::kWeightRows);
  const int thread = static_cast<int>(threadIdx.x);
  const auto finish_with = [&](int first, int threads, const auto& sum) {
    finish_tile<Element, Tile::kWeightRows, Tile::kRows>(task, part.weight_row, part.row, first, threads, sum);
  };
  if (splits == 1) {
    __syncthreads();
    wait_for_inputs();
    finish_with(thread, Tile::kThreads,
                [=](int r, int w) { return *reinterpret_cast<const float4*>(staged + r * kStride + w); });
    return;
  }
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  cluster.sync();
  wait_for_inputs();
  const int first = static_cast<int>(cluster.block_rank()) * Tile::kThreads + thread;
  finish_with(first, Tile::kThreads * splits, [&](int r, int w) {
    const auto part_sum = [&](int split) {
      const float* theirs = cluster.map_shared_rank(staged, static_cast<unsigned>(split));
      return *reinterpret_cast<const float4*>(theirs + r * kStride + w);
    };
    float4 total = part_sum(0);
    for (int split = 1; split < splits; ++split) total = plus(total, part_sum(split));
    return total;
  });
  cluster.sync();   // nobody may end while others read its memory
}

template <class Element, class Tile>
__global__ __launch_bounds__(Tile::kThreads,
                             Tile::kBlocks) void gemm_sm90a_kernel(const __grid_constant__ CUtensorMap weights,
                                                                   const __grid_constant__ CUtensorMap in,
                                                                   const GemmTask task, const Plan plan) {
  extern __shared__ unsigned char unaligned[];
  const uint32_t base = cute::cast_smem_ptr_to_uint(unaligned);
  unsigned char* shared = unaligned + (Tile::kAlignment - base % Tile::kAlignment) % Tile::kAlignment;
  auto& ring = *reinterpret_cast<Ring<Tile::kStages>*>(shared + Tile::kRingBytes);
  auto* staged = reinterpret_cast<float*>(shared);

  const auto block = static_cast<int32_t>(blockIdx.x);
  const TileGrid::Place place = plan.grid.place(block / plan.splits);
  Part part;
  part.weight_row = place.weight_tile * Tile::kWeightRows;
  part.row = place.row_tile * Tile::kRows;
  part.steps = depth_range(task.depth, plan.splits, block % plan.splits);
  part.count = part.steps.end - part.steps.begin;

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  if (threadIdx.x == 0) ring.begin(Tile::kUsers);
  __syncthreads();
  if (warp == Tile::kUsers) {
    if (lane == 0) fill<Tile>(weights, in, part, ring, shared, plan.weight_hint);
    __syncwarp();
  } else {
    float sums[Tile::kRows / 2] = {};
    multiply<Element, Tile>(part, ring, cute::cast_smem_ptr_to_uint(shared), warp / 4, lane, sums);
    // All of them are done with the stages, over which the sums are laid.
    asm volatile("bar.sync 1, %0;" ::"n"(Tile::kUsers * 32) : "memory");
    stage_sums<Tile>(sums, staged, warp, lane);
  }
  let_next_begin();
  finish<Element, Tile>(task, part, staged, plan.splits);
}

template <class Element, int kIndex>
void run(const GemmTask& task, const GemmPlace& place, int32_t splits) {
  using Tile = TileSm90a<kIndex>;
  Plan plan;
  plan.grid = {tiles_over(task.weight_rows, Tile::kWeightRows), tiles_over(task.rows, Tile::kRows)};
  plan.splits = splits;
  // Weights that only one block reads should not drive others out.
  plan.weight_hint = static_cast<uint64_t>(plan.grid.row_tiles == 1 ? cute::TMA::CacheHintSm90::EVICT_FIRST
                                                                    : cute::TMA::CacheHintSm90::EVICT_NORMAL);
  const CUtensorMap weights =
      tensor_map(task.weights, task.half, task.weight_rows, task.depth, task.weight_stride, Tile::kWeightRows);
  const CUtensorMap in = tensor_map(task.in, task.half, task.rows, task.depth, task.in_stride, Tile::kRows);
  Launch how;
  how.grid = dim3(static_cast<unsigned>(plan.grid.count() * splits));
  how.block = dim3(Tile::kThreads);
  how.stream = place.stream;
  how.shared_bytes = Tile::kSharedBytes;
  how.cluster = static_cast<unsigned>(splits);
  how.overlap = place.overlap;
  launch("gemm_sm90a", gemm_sm90a_kernel<Element, Tile>, how, weights, in, task, plan);
}

/// Calls `f` with each tile's number, as a constant.
template <class Function, int... kIndex>
void for_each_tile(const Function& f, std::integer_sequence<int, kIndex...>) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}
using EveryTile = std::make_integer_sequence<int, static_cast<int>(std::size(kTilesSm90a))>;

template <class Element>
void choose(const GemmTask& task, const GemmPlace& place) {
  const int32_t splits = depth_splits(task.weight_rows, task.depth);
  const int chosen = choose_tile(kTilesSm90a, task.weight_rows, task.rows, splits, place.processors);
  for_each_tile(
      [&](auto index) {
        if (index == chosen) run<Element, index>(task, place, splits);
      },
      EveryTile{});
}

template <class Element>
void prepare() {
  for_each_tile(
      [](auto index) {
        using Tile = TileSm90a<index>;
        allow_shared_memory(gemm_sm90a_kernel<Element, Tile>, Tile::kSharedBytes);
      },
      EveryTile{});
}

}  // namespace

void prepare_gemm_sm90a() {
  prepare<__nv_bfloat16>();
  prepare<__half>();
}

void gemm_sm90a(const GemmTask& task, const GemmPlace& place) {
  if (task.rows == 0) return;
  task.half ? choose<__half>(task, place) : choose<__nv_bfloat16>(task, place);
}

}  // namespace splitfuse::cuda
