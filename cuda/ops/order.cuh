// The order of floats as that of integers, and the larger of two.
#pragma once

#include <cstdint>

namespace splitfuse::cuda {

using Wide = unsigned long long;

struct Max {
  __device__ __forceinline__ Wide operator()(Wide a, Wide b) const { return a > b ? a : b; }
};

/// Orders as the floats do; both zeros are one.
__device__ __forceinline__ uint32_t key_of(float x) {
  uint32_t bits = __float_as_uint(x);
  if (bits == 0x80000000u) bits = 0;
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

/// Of equal values the one of lower index is larger.
__device__ __forceinline__ Wide value_and_index(uint32_t key, int32_t index) {
  return Wide{key} << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}
__device__ __forceinline__ int32_t index_of(Wide pair) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(pair));
}

}  // namespace splitfuse::cuda
