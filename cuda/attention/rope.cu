// Norms and rotation of queries and keys, and the KV cache's new entries. Bytes: 4 read and 2 written for each element;
// a few operations each. A warp has a head of a row; sums are over a lane's own elements in ascending order and then
// over lanes as a tree, so that they depend on the head alone.
#include <cuda_runtime.h>

#include "cuda/attention/finite.cuh"
#include "cuda/attention/paged.h"
#include "cuda/attention/rope.h"
#include "cuda/device/launch.cuh"
#include "cuda/gemm/number.cuh"

namespace splitfuse::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kHeadsPerWarp = 2;  // that a block aims at
constexpr int kPairs = kMaxHeadDim / 64;  // of neighbouring dimensions, that a lane has at most

struct Shared {
  float cosines[kMaxHeadDim / 2];
  float sines[kMaxHeadDim / 2];
  float sums[kWarps];
  float heads[kWarps][kMaxHeadDim];
};

/// A norm but for its weight: (x - mean) * scale.
struct Scaling {
  float mean = 0.0f;
  float scale = 1.0f;
};

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffff, x, lanes);
  return x;
}

/// The sum of `term(x)` over a row's elements, for the whole block.
template <class Term>
__device__ float sum_of_block(Shared& shared, const float* row, int32_t count, const Term& term) {
  float sum = 0.0f;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += kThreads) sum += term(row[i]);
  sum = sum_of_warp(sum);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += shared.sums[warp];
  return sum;
}

__device__ Scaling scaling_of_row(Shared& shared, const RopeTask& task, const float* row, int32_t count) {
  Scaling scaling;
  const auto columns = static_cast<float>(count);
  if (task.centred) scaling.mean = sum_of_block(shared, row, count, [](float x) { return x; }) / columns;
  const float mean = scaling.mean;
  const float squares = sum_of_block(shared, row, count, [mean](float x) { return (x - mean) * (x - mean); });
  scaling.scale = 1.0f / sqrtf(squares / columns + task.eps);
  return scaling;
}

/// Of a head, of which a lane has x[i][0] and x[i][1], zero behind its end.
__device__ __forceinline__ Scaling scaling_of_head(const RopeTask& task, const float (&x)[kPairs][2], int32_t lane) {
  Scaling scaling;
  const auto columns = static_cast<float>(task.head_dim);
  if (task.centred) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) sum += x[i][0] + x[i][1];
    scaling.mean = sum_of_warp(sum) / columns;
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const bool inside = i * 64 + lane * 2 < task.head_dim;
    const float low = x[i][0] - scaling.mean;
    const float high = x[i][1] - scaling.mean;
    squares += inside ? low * low + high * high : 0.0f;
  }
  scaling.scale = 1.0f / sqrtf(sum_of_warp(squares) / columns + task.eps);
  return scaling;
}

__device__ __forceinline__ float rotated(const Shared& shared, const float* head, int32_t pairs, int32_t dim) {
  if (dim < pairs) return head[dim] * shared.cosines[dim] - head[dim + pairs] * shared.sines[dim];
  if (dim >= 2 * pairs) return head[dim];
  const int32_t pair = dim - pairs;
  return head[dim] * shared.cosines[pair] + head[pair] * shared.sines[pair];
}

/// A query or key of a warp, to `out`. `weight`: of its norm.
template <class Element>
__device__ __forceinline__ void write_rotated(const RopeTask& task, const Shared& shared, float* head,
                                              const float (&x)[kPairs][2], Scaling scaling, const float* weight,
                                              uint16_t* out, int32_t lane) {
  if (task.norm == RopeNorm::kHead) scaling = scaling_of_head(task, x, lane);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int32_t dim = i * 64 + lane * 2;
    if (dim >= task.head_dim) continue;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      head[dim + c] =
          task.norm == RopeNorm::kNone ? x[i][c] : (x[i][c] - scaling.mean) * scaling.scale * weight[dim + c];
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int32_t dim = i * 64 + lane * 2;
    if (dim >= task.head_dim) continue;
    *reinterpret_cast<uint32_t*>(out + dim) =
        pack_two<Element>(rotated(shared, head, task.pairs, dim), rotated(shared, head, task.pairs, dim + 1));
  }
  __syncwarp();
}

/// A value of a warp, to `out`; what is not finite becomes NaN, as attention wants it.
template <class Element>
__device__ __forceinline__ void write_value(const RopeTask& task, const float (&x)[kPairs][2], uint16_t* out,
                                            int32_t lane) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int32_t dim = i * 64 + lane * 2;
    if (dim >= task.head_dim) continue;
    const uint32_t two = pack_two<Element>(x[i][0], x[i][1]);
    const uint32_t bad = not_finite<Element>(two);
    *reinterpret_cast<uint32_t*>(out + dim) = (two & ~bad) | (bad & 0x7fff7fffu);
  }
}

template <class Element>
__global__ __launch_bounds__(kThreads) void rope_kernel(const RopeTask task) {
  __shared__ Shared shared;
  wait_for_inputs();
  const int64_t row = blockIdx.x;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32;
  const float* in = task.qkv + row * task.qkv_stride;
  const RowPlace place = task.places[row];
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < task.pairs; i += kThreads) {
    float sine;
    float cosine;
    sincosf(static_cast<float>(place.position) * task.inv_freq[i], &sine, &cosine);
    shared.cosines[i] = cosine * task.magnitude;
    shared.sines[i] = sine * task.magnitude;
  }
  Scaling q_scaling;
  Scaling k_scaling;
  if (task.norm == RopeNorm::kRow) {
    q_scaling = scaling_of_row(shared, task, in, task.heads * task.head_dim);
    k_scaling = scaling_of_row(shared, task, in + int64_t{task.heads} * task.head_dim, task.kv_heads * task.head_dim);
  }
  __syncthreads();

  std::byte* const slot = task.kv + place.block * task.block_bytes + int64_t{place.within} * task.head_dim * 2;
  const int32_t heads = task.heads + 2 * task.kv_heads;
  const auto step = static_cast<int32_t>(gridDim.y) * kWarps;
  for (int32_t head = static_cast<int32_t>(blockIdx.y) * kWarps + warp; head < heads; head += step) {
    float x[kPairs][2] = {};
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int32_t dim = i * 64 + lane * 2;
      if (dim >= task.head_dim) continue;
      const float2 two = *reinterpret_cast<const float2*>(in + int64_t{head} * task.head_dim + dim);
      x[i][0] = two.x;
      x[i][1] = two.y;
    }
    const int32_t kv_head = (head - task.heads) % task.kv_heads;
    if (head < task.heads) {
      const int64_t at = int64_t{head} * task.head_dim;
      write_rotated<Element>(task, shared, shared.heads[warp], x, q_scaling, task.q_norm + at,
                             static_cast<uint16_t*>(task.q) + row * task.q_stride + at, lane);
    } else if (head < task.heads + task.kv_heads) {
      write_rotated<Element>(task, shared, shared.heads[warp], x, k_scaling,
                             task.k_norm + int64_t{kv_head} * task.head_dim,
                             reinterpret_cast<uint16_t*>(slot + kv_head * task.head_bytes), lane);
    } else {
      write_value<Element>(task, x, reinterpret_cast<uint16_t*>(slot + kv_head * task.head_bytes + task.value_bytes),
                           lane);
    }
  }
  let_next_begin();
}

}  // namespace

void rope_write(const RopeTask& task, cudaStream_t stream, bool overlap) {
  if (task.rows == 0) return;
  constexpr int32_t kHeads = kWarps * kHeadsPerWarp;
  Launch how;
  how.grid = dim3(static_cast<unsigned>(task.rows),
                  static_cast<unsigned>((task.heads + 2 * task.kv_heads + kHeads - 1) / kHeads));
  how.block = dim3(kThreads);
  how.stream = stream;
  how.overlap = overlap;
  launch("rope_write", task.half ? rope_kernel<__half> : rope_kernel<__nv_bfloat16>, how, task);
}

}  // namespace splitfuse::cuda
