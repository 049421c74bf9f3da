// The arithmetic of a row's softmax that more than one kernel does, and must do alike to the bit.
#pragma once

#include <cstdint>

namespace splitfuse::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float no_score() { return __int_as_float(0xff800000); }   // minus infinity

/// 2^x within 2^-22; 0 of minus infinity, and 1 of 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// What weights are relative to where `top` is the largest score; a row without scores has weights 0, not NaN.
__device__ __forceinline__ float base_of(float top) { return top == no_score() ? 0.0f : top; }

/// Two states of a row become one: what each side's sums are multiplied by. Joining with a state that has seen no key,
/// (minus infinity, 0, 0), changes nothing. Plain operations, which nothing fuses: see --fmad=false.
struct Join {
  float top;
  float first;
  float second;

  __device__ __forceinline__ Join(float first_top, float second_top) : top(fmaxf(first_top, second_top)) {
    const float base = base_of(top);
    first = exp2_fast(first_top - base);
    second = exp2_fast(second_top - base);
  }
  __device__ __forceinline__ float operator()(float a, float b) const { return a * first + b * second; }
};

/// What weighted sums of values are multiplied by to be the row's result. `sink`: a score that takes part with nothing
/// behind it, or null.
__device__ __forceinline__ float result_scale(float top, float sum, const float* sink) {
  if (sink == nullptr) return 1.0f / sum;
  const float score = *sink * kLog2e;
  const float base = fmaxf(top, score);
  const float factor = exp2_fast(top - base);
  return factor / (sum * factor + exp2_fast(score - base));
}

/// A result; zero has no sign, as one that was added to zeros has lost it.
__device__ __forceinline__ float result_of(float value, float scale) { return value * scale + 0.0f; }

}  // namespace splitfuse::cuda
