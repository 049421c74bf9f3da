// Conversions between float and the 16-bit formats, in portable scalar code.
#pragma once

#include <bit>
#include <cstdint>

namespace splitfuse {

/// bfloat16 is the upper half of a float.
inline float bf16_to_float(uint16_t value) { return std::bit_cast<float>(static_cast<uint32_t>(value) << 16); }

/// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t float_to_bf16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/// IEEE half precision to float, exact.
float f16_to_float(uint16_t value);
/// Round to nearest, ties to even; overflow becomes infinity.
uint16_t float_to_f16(float value);

}  // namespace splitfuse
