#include "model/rope.h"

#include <cmath>
#include <numbers>

namespace splitfuse {
namespace {

float llama3_scaled(const RopeConfig& rope, float inv_freq) {
  const auto original = static_cast<float>(rope.original_max_position);
  const float wavelength = 2.0f * std::numbers::pi_v<float> / inv_freq;
  if (wavelength < original / rope.high_freq_factor) return inv_freq;
  if (wavelength > original / rope.low_freq_factor) return inv_freq / rope.factor;
  const float smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  return (1.0f - smooth) * inv_freq / rope.factor + smooth * inv_freq;
}

}  // namespace

std::vector<float> rope_inv_freq(const RopeConfig& rope, int32_t head_dim) {
  std::vector<float> result(head_dim / 2);
  for (int32_t i = 0; i < head_dim / 2; ++i) {
    // In float32 throughout, step by step as the reference does: at position 8000 one ulp here is an error of
    // 5e-4 in the angle.
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    float inv_freq = 1.0f / std::pow(rope.theta, exponent);
    if (rope.scaling == "linear") inv_freq /= rope.factor;
    if (rope.scaling == "llama3") inv_freq = llama3_scaled(rope, inv_freq);
    result[i] = inv_freq;
  }
  return result;
}

}  // namespace splitfuse
