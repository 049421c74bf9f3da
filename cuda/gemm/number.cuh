// The two 16-bit formats, as the kernels see them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace splitfuse::cuda {

/// Two floats to the nearest, `low` in the lower half.
template <class Element>
__device__ __forceinline__ uint32_t pack_two(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack_two<__nv_bfloat16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <>
__device__ __forceinline__ uint32_t pack_two<__half>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

template <class Element>
__device__ __forceinline__ float widen(uint16_t bits);

template <>
__device__ __forceinline__ float widen<__nv_bfloat16>(uint16_t bits) {
  return __uint_as_float(uint32_t{bits} << 16);
}
template <>
__device__ __forceinline__ float widen<__half>(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

}  // namespace splitfuse::cuda
