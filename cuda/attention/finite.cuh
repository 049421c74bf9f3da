// What is no finite number, in the 16-bit formats, two at a time.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace splitfuse::cuda {

/// The exponents of two numbers, all ones.
template <class Element>
inline constexpr uint32_t kExponents = 0x7f807f80;
template <>
inline constexpr uint32_t kExponents<__half> = 0x7c007c00;
/// Two ones.
template <class Element>
inline constexpr uint32_t kOnes = 0x3f803f80;
template <>
inline constexpr uint32_t kOnes<__half> = 0x3c003c00;

/// All ones in each half that is no finite number.
template <class Element>
__device__ __forceinline__ uint32_t not_finite(uint32_t two) {
  return __vcmpeq2(two & kExponents<Element>, kExponents<Element>);
}

}  // namespace splitfuse::cuda
