#include "cpu/pack_integer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>

#include "base/check.h"
#include "base/numeric.h"
#include "cpu/gemm.h"

namespace splitfuse {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int32_t kMost4 = 15;

int64_t group_bytes(WeightFormat format, int32_t width) {
  return format == WeightFormat::kInt8 ? kQuantGroup * width : (kQuantGroup / 2 + 4) * width;
}

/// Where weight k of a column lies in its group, in bytes.
int64_t place(int32_t k, int32_t column, int32_t width) { return (int64_t{k} / 4 * width + column) * 4 + k % 4; }

/// Rounds to the nearest whole number, ties to even, for magnitudes far below 2^22; the compiler can vectorize it.
float nearest(float x) { return x + 0x1.8p23f - 0x1.8p23f; }

struct Fit {
  float scale = 0.0f;
  float minimum = 0.0f;
  float error = 0.0f;   // sum of squares
};

/// Rounds scale and minimum to half precision and tells the error of the best integers for them.
Fit rounded(std::span<const float> x, float scale, float minimum) {
  Fit fit = {f16_to_float(float_to_f16(scale)), f16_to_float(float_to_f16(minimum)), 0.0f};
  const float inverse = fit.scale > 0.0f ? 1.0f / fit.scale : 0.0f;
  for (const float value : x) {
    const float q = std::clamp(nearest((value - fit.minimum) * inverse), 0.0f, static_cast<float>(kMost4));
    const float error = value - (fit.minimum + q * fit.scale);
    fit.error += error * error;
  }
  return fit;
}

/// Scale and minimum for up to 32 weights: from the range, taken a little narrower each time, the integers; to these
/// the line of least squares; the best of all counts. So are the fits of llama.cpp's 4-bit formats found, over more
/// ranges.
Fit fit_int4(std::span<const float> x) {
  if (!std::all_of(x.begin(), x.end(), [](float value) { return std::isfinite(value); })) return {kNaN, kNaN, 0.0f};
  const auto [low, high] = std::minmax_element(x.begin(), x.end());
  Fit best = rounded(x, (*high - *low) / kMost4, *low);
  if (!(best.scale > 0.0f)) return best;
  const auto count = static_cast<float>(x.size());
  for (const float levels : {15.0f, 15.9f, 16.8f}) {
    const float inverse = levels / (*high - *low);
    const float shift = *low + (*high - *low) * (1.0f - kMost4 / levels) * 0.5f;
    float sum_q = 0, sum_x = 0, sum_qq = 0, sum_qx = 0;
    for (const float value : x) {
      const float q = std::clamp(nearest((value - shift) * inverse), 0.0f, static_cast<float>(kMost4));
      sum_q += q;
      sum_x += value;
      sum_qq += q * q;
      sum_qx += q * value;
    }
    const float spread = count * sum_qq - sum_q * sum_q;
    if (!(spread > 0.0f)) continue;
    const float scale = (count * sum_qx - sum_q * sum_x) / spread;
    const Fit fit = rounded(x, scale, (sum_x - scale * sum_q) / count);
    if (fit.error < best.error) best = fit;
  }
  return best;
}

void quantize8(std::span<const float> x, int32_t column, int32_t width, std::byte* panel) {
  float largest = 0.0f;
  bool finite = true;
  for (const float value : x) {
    largest = std::max(largest, std::fabs(value));
    finite &= std::isfinite(value);
  }
  const float inverse = finite && largest >= 0x1p-100f ? 127.0f / largest : 0.0f;
  for (size_t k = 0; k < x.size(); ++k) {
    const auto q = static_cast<int32_t>(finite ? nearest(x[k] * inverse) : 0.0f);
    panel[place(static_cast<int32_t>(k), column, width)] = static_cast<std::byte>(q + kWeightBias);
  }
  const float scale = finite ? largest / 127.0f : kNaN;
  const int64_t groups = ceil_div(static_cast<int64_t>(x.size()), int64_t{kQuantGroup});
  std::memcpy(panel + groups * kQuantGroup * width + column * 4, &scale, sizeof scale);
}

void quantize4(std::span<const float> x, int32_t column, int32_t width, std::byte* group) {
  const Fit fit = fit_int4(x);
  const float inverse = fit.scale > 0.0f ? 1.0f / fit.scale : 0.0f;
  constexpr int32_t kHalf = kQuantGroup / 2;
  for (int32_t k = 0; k < kHalf; ++k) {
    const auto code = [&](int32_t i) {
      if (static_cast<size_t>(i) >= x.size() || inverse == 0.0f) return 0;
      return static_cast<int32_t>(
          std::clamp(nearest((x[static_cast<size_t>(i)] - fit.minimum) * inverse), 0.0f, static_cast<float>(kMost4)));
    };
    group[place(k, column, width)] = static_cast<std::byte>(code(k) | code(kHalf + k) << 4);
  }
  const uint16_t halves[2] = {float_to_f16(fit.scale), float_to_f16(fit.minimum)};
  for (int32_t i = 0; i < 2; ++i) std::memcpy(group + kHalf * width + (i * width + column) * 2, halves + i, 2);
}

}  // namespace

int64_t integer_panel_bytes(WeightFormat format, int32_t depth, int32_t width) {
  const int64_t groups = ceil_div(depth, kQuantGroup);
  return groups * group_bytes(format, width) + (format == WeightFormat::kInt8 ? 4 * width : 0);
}

void quantize_channel(const float* weights, WeightFormat format, int32_t depth, int32_t column, int32_t width,
                      std::byte* panel) {
  const std::span<const float> all(weights, static_cast<size_t>(depth));
  if (format == WeightFormat::kInt8) return quantize8(all, column, width, panel);
  for (int32_t k = 0; k < depth; k += kQuantGroup) {
    const auto count = static_cast<size_t>(std::min(kQuantGroup, depth - k));
    quantize4(all.subspan(static_cast<size_t>(k), count), column, width,
              panel + k / kQuantGroup * group_bytes(format, width));
  }
}

void dequantize_channel(const std::byte* panel, WeightFormat format, int32_t depth, int32_t column, int32_t width,
                        float* out) {
  if (format == WeightFormat::kInt8) {
    float scale = 0;
    const int64_t groups = ceil_div(depth, kQuantGroup);
    std::memcpy(&scale, panel + groups * kQuantGroup * width + column * 4, sizeof scale);
    for (int32_t k = 0; k < depth; ++k) {
      out[k] = scale * static_cast<float>(static_cast<int32_t>(panel[place(k, column, width)]) - kWeightBias);
    }
    return;
  }
  constexpr int32_t kHalf = kQuantGroup / 2;
  for (int32_t k = 0; k < depth; ++k) {
    const std::byte* group = panel + k / kQuantGroup * group_bytes(format, width);
    const int32_t i = k % kQuantGroup;
    const auto both = static_cast<int32_t>(group[place(i % kHalf, column, width)]);
    uint16_t halves[2];
    for (int32_t h = 0; h < 2; ++h) std::memcpy(halves + h, group + kHalf * width + (h * width + column) * 2, 2);
    out[k] =
        f16_to_float(halves[0]) * static_cast<float>(i < kHalf ? both & kMost4 : both >> 4) + f16_to_float(halves[1]);
  }
}

}  // namespace splitfuse
