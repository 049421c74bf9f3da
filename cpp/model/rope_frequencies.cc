#include <cmath>

#include "base/check.h"
#include "splitfuse/config.h"

namespace splitfuse {

std::vector<float> rope_frequencies(float theta, int32_t dims) {
  if (!(theta > 1.0f) || std::isinf(theta)) throw ConfigError(cat("RoPE theta is ", theta, "; expected more than 1"));
  if (dims < 2 || dims > 1024) throw ConfigError(cat("RoPE of ", dims, " dimensions; expected 2 to 1024"));
  std::vector<float> result(static_cast<size_t>(dims / 2));
  for (int32_t i = 0; i < dims / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(dims);
    // Powers of float32 differ between math libraries; those of double, once rounded, do not.
    const auto power = static_cast<float>(std::pow(static_cast<double>(theta), static_cast<double>(exponent)));
    result[static_cast<size_t>(i)] = 1.0f / power;
  }
  return result;
}

}  // namespace splitfuse
