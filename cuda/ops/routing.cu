// Which experts a row has: a warp for each row. Then which slot: one block for all rows.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "base/check.h"
#include "cuda/device/launch.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/ops/experts.h"
#include "cuda/ops/order.cuh"
#include "cuda/ops/reduce.cuh"

namespace splitfuse::cuda {
namespace {

constexpr int kThreads = 1024;   // of the block that places
static_assert(kMaxExperts <= kThreads, "an expert has a thread");
static_assert(kMaxExperts <= 32 * kLanes, "a lane's experts have a bit each");

/// What is not a number is the largest.
__device__ __forceinline__ bool comes_before(float a, float b) { return (isnan(a) && !isnan(b)) || a > b; }
__device__ __forceinline__ uint32_t score_key(float x) { return isnan(x) ? 0xffffffffu : key_of(x); }

struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

/// x = softmax(x), by a warp.
__device__ void softmax(float* x, int32_t count, int lane) {
  float largest = -INFINITY;
  for (int32_t e = lane; e < count; e += kLanes) largest = fmaxf(largest, x[e]);
  largest = over_warp(largest, Larger());
  float sum = 0.0f;
  for (int32_t e = lane; e < count; e += kLanes) sum += x[e] = expf(x[e] - largest);
  sum = over_warp(sum, Plus());
  for (int32_t e = lane; e < count; e += kLanes) x[e] /= sum;
}

/// The k best of scores [count]: bit j of a lane's result stands for the one numbered 32 j + lane.
__device__ uint32_t take_best(const float* scores, int32_t count, int32_t k, int lane) {
  uint32_t taken = 0;
  for (int32_t i = 0; i < k; ++i) {
    Wide best = 0;
    for (int32_t j = 0; j * kLanes + lane < count; ++j) {
      const int32_t e = j * kLanes + lane;
      if ((taken >> j & 1) != 0) continue;
      const Wide own = value_and_index(score_key(scores[e]), e);
      best = own > best ? own : best;
    }
    const int32_t e = index_of(over_warp(best, Max()));
    if (e % kLanes == lane) taken |= 1u << (e / kLanes);
  }
  return taken;
}

/// What a group is chosen by: its best score; with a correction the sum of its best two.
__device__ float group_score(const float* scores, int32_t size, bool corrected) {
  float first = scores[0];
  float second = -INFINITY;
  for (int32_t i = 1; i < size; ++i) {
    const float score = scores[i];
    if (comes_before(score, first)) {
      second = first;
      first = score;
    } else if (comes_before(score, second)) {
      second = score;
    }
  }
  return corrected && size > 1 ? first + second : first;
}

/// Takes all experts out of the running but those of the best groups. `group_scores`: scratch [groups].
__device__ void keep_best_groups(const RoutingTask& task, float* scores, float* group_scores, int lane) {
  const int32_t size = task.experts / task.groups;
  const bool corrected = task.correction != nullptr;
  for (int32_t g = lane; g < task.groups; g += kLanes)
    group_scores[g] = group_score(scores + g * size, size, corrected);
  __syncwarp();
  const uint32_t kept = take_best(group_scores, task.groups, task.top_groups, lane);
  const bool negative = corrected || task.scoring == ExpertScoring::kTopSoftmax;   // they may be
  const float out = negative ? -INFINITY : 0.0f;
  for (int32_t g = 0; g < task.groups; ++g) {
    const uint32_t of_owner = __shfl_sync(kAllLanes, kept, g % kLanes);
    if ((of_owner >> (g / kLanes) & 1) != 0) continue;
    for (int32_t i = lane; i < size; i += kLanes) scores[g * size + i] = out;
  }
  __syncwarp();
}

/// Turns the chosen scores [top_k] into weights and writes the row's choices; one lane.
__device__ void write_choices(const RoutingTask& task, const float* logits, const int32_t* ids, float* chosen,
                              ExpertChoice* choices) {
  if (task.scoring == ExpertScoring::kTopSoftmax) {
    float largest = -INFINITY;
    for (int32_t i = 0; i < task.top_k; ++i) largest = fmaxf(largest, chosen[i]);
    float sum = 0.0f;
    for (int32_t i = 0; i < task.top_k; ++i) sum += chosen[i] = expf(chosen[i] - largest);
    for (int32_t i = 0; i < task.top_k; ++i) chosen[i] /= sum;
  }
  float divisor = 1.0f;
  if (task.normalize) {
    divisor = 1e-20f;   // of weights that are all zero
    for (int32_t i = 0; i < task.top_k; ++i) divisor += chosen[i];
  }
  for (int32_t i = 0; i < task.top_k; ++i) choices[i] = {ids[i], chosen[i] / divisor * task.scale};
  if (task.shared) choices[task.top_k] = {task.experts, task.shared_gate ? sigmoid(logits[task.experts]) : 1.0f};
}

/// Floats of shared memory: weights, scores, group scores, what is chosen and which.
__host__ __device__ constexpr int32_t routing_floats(const RoutingTask& task) {
  return 2 * task.experts + task.groups + 2 * task.top_k;
}

__global__ __launch_bounds__(kLanes) void routing_kernel(const RoutingTask task) {
  extern __shared__ float weights[];   // [experts]
  float* scores = weights + task.experts;   // [experts]: what the choice is made by
  float* group_scores = scores + task.experts;   // [groups]
  float* chosen = group_scores + task.groups;   // [top_k]
  auto* ids = reinterpret_cast<int32_t*>(chosen + task.top_k);   // [top_k]
  wait_for_inputs();
  let_next_begin();
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x;
  const float* logits = task.logits + row * task.stride;

  for (int32_t e = lane; e < task.experts; e += kLanes) weights[e] = logits[e];
  if (task.scoring == ExpertScoring::kSoftmax) softmax(weights, task.experts, lane);
  for (int32_t e = lane; e < task.experts; e += kLanes) {
    if (task.scoring == ExpertScoring::kSigmoid) weights[e] = sigmoid(weights[e]);
    scores[e] = weights[e] + (task.correction != nullptr ? task.correction[e] : 0.0f);
  }
  __syncwarp();
  if (task.groups > 1) keep_best_groups(task, scores, group_scores, lane);
  const uint32_t taken = take_best(scores, task.experts, task.top_k, lane);

  const float* source = task.correction != nullptr ? weights : scores;
  int32_t before = 0;   // how many of the chosen have lower numbers
  for (int32_t j = 0; j * kLanes < task.experts; ++j) {
    const bool own = (taken >> j & 1) != 0;
    const unsigned all = __ballot_sync(kAllLanes, own);
    if (own) {
      const int32_t at = before + __popc(all & ((1u << lane) - 1));
      ids[at] = j * kLanes + lane;
      chosen[at] = source[j * kLanes + lane];
    }
    before += __popc(all);
  }
  __syncwarp();
  const int32_t each = task.top_k + (task.shared ? 1 : 0);
  if (lane == 0) write_choices(task, logits, ids, chosen, task.choices + row * each);
}

/// The sum of the values of this thread and of those before it. `room`: shared memory [kThreads / 32].
__device__ int32_t sum_up_to(int32_t value, int32_t* room) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += other;
  }
  __syncthreads();   // what was there before has been read
  if (lane == kLanes - 1) room[warp] = value;
  __syncthreads();
  for (int w = 0; w < warp; ++w) value += room[w];
  return value;
}

__global__ __launch_bounds__(kThreads) void placing_kernel(const PlacingTask task) {
  __shared__ int32_t counts[kThreads];   // then: the next free slot
  __shared__ int32_t room[kThreads / kLanes];
  __shared__ int32_t tiles_used;
  wait_for_inputs();
  let_next_begin();
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int32_t choices = task.rows * task.each;
  counts[thread] = 0;
  __syncthreads();
  for (int32_t i = thread; i < choices; i += kThreads) atomicAdd(&counts[task.choices[i].expert], 1);
  __syncthreads();

  const int32_t count = counts[thread];
  const int32_t tiles = (count + task.tile_rows - 1) / task.tile_rows;
  const int32_t first = sum_up_to(count, room) - count;
  const int32_t first_tile = sum_up_to(tiles, room) - tiles;
  if (thread <= task.experts) task.first_slot[thread] = first;
  for (int32_t t = 0; t < tiles; ++t) task.tiles[first_tile + t] = {thread, first + t * task.tile_rows};
  if (thread == kThreads - 1) tiles_used = first_tile + tiles;
  counts[thread] = first;
  __syncthreads();
  for (int32_t t = tiles_used + thread; t < task.tile_count; t += kThreads) task.tiles[t] = {-1, 0};
  for (int32_t i = thread; i < choices; i += kThreads) {
    const int32_t slot = atomicAdd(&counts[task.choices[i].expert], 1);
    task.slot_of_choice[i] = slot;
    task.row_of_slot[slot] = i / task.each;
  }
}

constexpr int kCombineThreads = 256;

__device__ __forceinline__ float4 weighed(float weight, const float4& x) {
  return {weight * x.x, weight * x.y, weight * x.z, weight * x.w};
}

__global__ __launch_bounds__(kCombineThreads) void combine_kernel(const CombineTask task) {
  wait_for_inputs();
  let_next_begin();
  const int64_t row = blockIdx.x;
  const ExpertChoice* choices = task.choices + row * task.each;
  const int32_t* slots = task.slot_of_choice + row * task.each;
  for (int32_t c = static_cast<int32_t>(threadIdx.x) * 4; c < task.columns; c += kCombineThreads * 4) {
    float4 sum = {};
    for (int32_t i = 0; i < task.each; ++i) {
      const float4 y = *reinterpret_cast<const float4*>(task.y + slots[i] * task.stride + c);
      const float4 part = weighed(choices[i].weight, y);
      sum = i == 0 ? part : plus(sum, part);
    }
    put_floats(task.out + row * task.stride + c, task.columns - c, false, sum);
  }
}

Launch on(const GemmPlace& place, int32_t blocks, int threads) {
  Launch how;
  how.grid = dim3(static_cast<unsigned>(blocks));
  how.block = dim3(static_cast<unsigned>(threads));
  how.stream = place.stream;
  how.overlap = place.overlap;
  return how;
}

}  // namespace

void choose_experts(const RoutingTask& task, const GemmPlace& place) {
  SPLITFUSE_ASSERT(task.experts <= kMaxExperts && task.top_k <= task.experts && task.top_groups <= task.groups);
  Launch how = on(place, task.rows, kLanes);
  how.shared_bytes = static_cast<size_t>(routing_floats(task)) * sizeof(float);
  launch("choose_experts", routing_kernel, how, task);
}

void place_rows(const PlacingTask& task, const GemmPlace& place) {
  SPLITFUSE_ASSERT(task.experts <= kMaxExperts);
  launch("place_rows", placing_kernel, on(place, 1, kThreads), task);
}

void combine_experts(const CombineTask& task, const GemmPlace& place) {
  launch("combine_experts", combine_kernel, on(place, task.rows, kCombineThreads), task);
}

}  // namespace splitfuse::cuda
