// Norms and the like: memory is all they cost. A block has a row and keeps it in registers, so that it is read once:
// 4 bytes for each element, and 2 to write it (a norm for a matrix multiplication) or 8 (a sum).
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "base/check.h"
#include "cuda/device/launch.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/ops/reduce.cuh"
#include "cuda/ops/rows.h"
#include "splitfuse/types.h"

namespace splitfuse::cuda {
namespace {

/// Rows by number, as a parameter of the kernel: no copy has to come before it.
struct RowList {
  static constexpr int32_t kMost = 64;
  int32_t row[kMost];
};

__device__ __forceinline__ float4 zeros() { return {0.0f, 0.0f, 0.0f, 0.0f}; }
__device__ __forceinline__ float4 minus(const float4& a, float b) { return {a.x - b, a.y - b, a.z - b, a.w - b}; }
__device__ __forceinline__ float4 times(const float4& a, float b) { return {a.x * b, a.y * b, a.z * b, a.w * b}; }
__device__ __forceinline__ float4 times(const float4& a, const float4& b) {
  return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w};
}
__device__ __forceinline__ float sum_of(const float4& a) { return (a.x + a.y) + (a.z + a.w); }

/// Four neighbouring values of a vector that ends after `left` of them; zero behind.
__device__ __forceinline__ float4 load_vector(const float* from, int32_t left) {
  if (left >= 4) return *reinterpret_cast<const float4*>(from);
  return {left > 0 ? from[0] : 0.0f, left > 1 ? from[1] : 0.0f, left > 2 ? from[2] : 0.0f, 0.0f};
}

/// Zero from the `left`-th of four on.
__device__ __forceinline__ float4 first_of(const float4& a, int32_t left) {
  return {left > 0 ? a.x : 0.0f, left > 1 ? a.y : 0.0f, left > 2 ? a.z : 0.0f, left > 3 ? a.w : 0.0f};
}

template <NormUse kUse>
__device__ __forceinline__ void use(void* out, int64_t place, int32_t left, float scale, const float4& value) {
  if (kUse == NormUse::kBF16) {
    put_elements<__nv_bfloat16>(static_cast<uint16_t*>(out) + place, left, value);
  } else if (kUse == NormUse::kF16) {
    put_elements<__half>(static_cast<uint16_t*>(out) + place, left, value);
  } else if (kUse == NormUse::kStore) {
    put_floats(static_cast<float*>(out) + place, left, false, value);
  } else {
    put_floats(static_cast<float*>(out) + place, left, true, times(value, scale));
  }
}

/// Turns a thread's part of a row, quads threadIdx.x + i * kThreads, into that of its norm.
template <int kThreads, int kQuads>
__device__ __forceinline__ void apply(const RowNorm& norm, float* room, float4 (&x)[kQuads]) {
  const auto columns = static_cast<float>(norm.columns);
  const int32_t first = static_cast<int32_t>(threadIdx.x) * 4;
  if (norm.centered) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) sum += sum_of(x[i]);
    const float mean = over_block<kThreads>(sum, 0.0f, room, Plus()) / columns;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) x[i] = first_of(minus(x[i], mean), norm.columns - first - i * kThreads * 4);
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) squares += sum_of(times(x[i], x[i]));
  const float mean_square = over_block<kThreads>(squares, 0.0f, room, Plus()) / columns;
  const float scale = 1.0f / sqrtf(mean_square + norm.eps);
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int32_t column = first + i * kThreads * 4;
    const int32_t left = norm.columns - column;
    if (left <= 0) continue;
    x[i] = times(times(x[i], scale), load_vector(norm.weight + column, left));
    if (norm.bias != nullptr) x[i] = plus(x[i], load_vector(norm.bias + column, left));
  }
}

template <NormUse kUse, int kThreads, int kQuads>
__global__ __launch_bounds__(kThreads) void norm_kernel(const NormTask task, const RowList list) {
  __shared__ float room[kThreads / kLanes];
  wait_for_inputs();
  let_next_begin();
  const int64_t row = blockIdx.x;
  const float* from = task.x + (task.list != nullptr ? list.row[row] : row) * task.stride;
  const int32_t first = static_cast<int32_t>(threadIdx.x) * 4;
  float4 x[kQuads];
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int32_t column = first + i * kThreads * 4;
    x[i] = column < task.norm.columns ? load_vector(from + column, task.norm.columns - column) : zeros();
  }
  if (task.norm.weight != nullptr) apply<kThreads>(task.norm, room, x);
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int32_t column = first + i * kThreads * 4;
    const int32_t left = task.norm.columns - column;
    if (left > 0) use<kUse>(task.out, row * task.stride + column, left, task.scale, x[i]);
  }
}

template <NormUse kUse, int kThreads, int kQuads>
void run(const NormTask& task, const GemmPlace& place) {
  RowList list{};
  for (int32_t i = 0; task.list != nullptr && i < task.rows; ++i) list.row[i] = task.list[i];
  Launch how;
  how.grid = dim3(static_cast<unsigned>(task.rows));
  how.block = dim3(kThreads);
  how.stream = place.stream;
  how.overlap = place.overlap;
  launch("norm_rows", norm_kernel<kUse, kThreads, kQuads>, how, task, list);
}

/// The number of threads follows from the columns alone, as the order of sums does.
template <NormUse kUse>
void choose(const NormTask& task, const GemmPlace& place) {
  const int32_t columns = task.norm.columns;
  if (columns <= 1024) return run<kUse, 256, 1>(task, place);
  if (columns <= 2048) return run<kUse, 256, 2>(task, place);
  if (columns <= 4096) return run<kUse, 256, 4>(task, place);
  if (columns <= 8192) return run<kUse, 512, 4>(task, place);
  if (columns <= 16384) return run<kUse, 1024, 4>(task, place);
  run<kUse, 1024, 8>(task, place);
}

void run_listed(const NormTask& task, const GemmPlace& place) {
  switch (task.use) {
    case NormUse::kBF16:
      return choose<NormUse::kBF16>(task, place);
    case NormUse::kF16:
      return choose<NormUse::kF16>(task, place);
    case NormUse::kStore:
      return choose<NormUse::kStore>(task, place);
    case NormUse::kAdd:
      return choose<NormUse::kAdd>(task, place);
  }
}

constexpr int kScaleThreads = 256;

__global__ __launch_bounds__(kScaleThreads) void scale_kernel(const ScaleTask task) {
  wait_for_inputs();
  let_next_begin();
  const int32_t column = static_cast<int32_t>(blockIdx.x * kScaleThreads + threadIdx.x) * 4;
  const int32_t left = task.columns - column;
  if (left <= 0) return;
  float* place = task.logits + blockIdx.y * task.stride + column;
  float4 value = times(load_vector(place, left), task.scale);
  if (task.cap != 0.0f) {
    value = {task.cap * tanhf(value.x / task.cap), task.cap * tanhf(value.y / task.cap),
             task.cap * tanhf(value.z / task.cap), task.cap * tanhf(value.w / task.cap)};
  }
  put_floats(place, left, false, value);
}

}  // namespace

void norm_rows(const NormTask& task, const GemmPlace& place) {
  if (task.norm.columns > kMaxNormColumns) {
    throw ConfigError(
        cat("a norm over ", task.norm.columns, " columns: the CUDA backend takes up to ", kMaxNormColumns));
  }
  const int64_t element = task.use == NormUse::kBF16 || task.use == NormUse::kF16 ? 2 : 4;
  const int32_t most = task.list == nullptr ? task.rows : RowList::kMost;
  for (int32_t done = 0; done < task.rows; done += most) {
    NormTask part = task;
    part.rows = std::min(most, task.rows - done);
    if (task.list != nullptr) part.list += done;
    part.out = static_cast<char*>(task.out) + done * task.stride * element;
    run_listed(part, place);
  }
}

void scale_rows(const ScaleTask& task, const GemmPlace& place) {
  if (task.rows == 0) return;
  Launch how;
  const int32_t quads = (task.columns + 3) / 4;
  how.grid = dim3(static_cast<unsigned>((quads + kScaleThreads - 1) / kScaleThreads), static_cast<unsigned>(task.rows));
  how.block = dim3(kScaleThreads);
  how.stream = place.stream;
  how.overlap = place.overlap;
  launch("scale_rows", scale_kernel, how, task);
}

}  // namespace splitfuse::cuda
