// Sums and the like over the threads of a block, in an order that its size alone decides.
#pragma once

#include <cstdint>

namespace splitfuse::cuda {

inline constexpr int kLanes = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

/// combine(a, b) over all lanes of a warp, in every one of them; a butterfly, so combine() must commute.
template <class Value, class Combine>
__device__ __forceinline__ Value over_warp(Value value, const Combine& combine) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

/// The same over all kThreads threads of a block, in every one. `room`: shared memory [kThreads / 32], which may be
/// used again at once. `none`: what combine() leaves the other as it is with.
template <int kThreads, class Value, class Combine>
__device__ __forceinline__ Value over_block(Value value, Value none, Value* room, const Combine& combine) {
  constexpr int kWarps = kThreads / kLanes;
  static_assert(kThreads % kLanes == 0 && kWarps <= kLanes);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  value = over_warp(value, combine);
  __syncthreads();   // what was there before has been read
  if (lane == 0) room[threadIdx.x / kLanes] = value;
  __syncthreads();
  value = lane < kWarps ? room[lane] : none;
  return over_warp(value, combine);
}

struct Plus {
  template <class Value>
  __device__ __forceinline__ Value operator()(const Value& a, const Value& b) const {
    return a + b;
  }
};

}  // namespace splitfuse::cuda
