#include "base/integer_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/check.h"
#include "base/numeric.h"

namespace splitfuse {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int32_t kMost4 = 15;
constexpr int64_t kHalf = kWeightGroup / 2;

const std::byte* bytes_of(const void* data, int64_t offset) { return static_cast<const std::byte*>(data) + offset; }

template <class T>
T number(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

/// A scale or minimum.
float load(DType dtype, const std::byte* at) {
  return dtype == DType::kF32 ? number<float>(at) : f16_to_float(number<uint16_t>(at));
}

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

/// One group of up to 32 as int8, and its scale, which is rounded up so that no weight is beyond 127 of it.
void quantize8(std::span<const float> x, std::byte* codes, std::byte* scale) {
  float largest = 0.0f;
  bool finite = true;
  for (const float value : x) {
    largest = std::max(largest, std::fabs(value));
    finite &= std::isfinite(value);
  }
  uint16_t half = float_to_f16(finite ? largest / 127.0f : kNaN);
  if (f16_to_float(half) * 127.0f < largest) ++half;
  std::memcpy(scale, &half, sizeof half);
  const float step = f16_to_float(half);
  const float inverse = finite && step > 0.0f ? 1.0f / step : 0.0f;
  for (size_t k = 0; k < x.size(); ++k) {
    codes[k] = static_cast<std::byte>(static_cast<int32_t>(finite ? nearest(x[k] * inverse) : 0.0f));
  }
}

/// One group as int4: its codes [16], scale and minimum.
void quantize4(std::span<const float> x, std::byte* codes, std::byte* scale, std::byte* minimum) {
  const Fit fit = fit_int4(x);
  const float inverse = fit.scale > 0.0f ? 1.0f / fit.scale : 0.0f;
  const auto code = [&](int64_t i) {
    if (static_cast<size_t>(i) >= x.size() || inverse == 0.0f) return 0;
    return static_cast<int32_t>(
        std::clamp(nearest((x[static_cast<size_t>(i)] - fit.minimum) * inverse), 0.0f, static_cast<float>(kMost4)));
  };
  for (int64_t i = 0; i < kHalf; ++i) codes[i] = static_cast<std::byte>(code(i) | code(kHalf + i) << 4);
  const uint16_t halves[2] = {float_to_f16(fit.scale), float_to_f16(fit.minimum)};
  std::memcpy(scale, halves, 2);
  std::memcpy(minimum, halves + 1, 2);
}

}  // namespace

int64_t row_bytes(WeightFormat format, DType dtype, int64_t depth) {
  switch (format) {
    case WeightFormat::kDense:
      return depth * dtype_size(dtype);
    case WeightFormat::kInt8:
      return depth;
    case WeightFormat::kInt4:
      return ceil_div<int64_t>(depth, kWeightGroup) * kHalf;
  }
  SPLITFUSE_ASSERT(!"a WeightFormat outside the enumeration");
  return 0;
}

int64_t row_scales(WeightFormat format, int64_t depth) {
  return format == WeightFormat::kDense ? 0 : ceil_div<int64_t>(depth, kWeightGroup);
}

TensorView row_range(const TensorView& matrix, int64_t first, int64_t count) {
  TensorView part = matrix;
  part.shape[0] = count;
  part.data = bytes_of(matrix.data, first * row_bytes(matrix.format, matrix.dtype, matrix.shape[1]));
  const int64_t scales = first * row_scales(matrix.format, matrix.shape[1]) * dtype_size(matrix.dtype);
  if (matrix.scales != nullptr) part.scales = bytes_of(matrix.scales, scales);
  if (matrix.minima != nullptr) part.minima = bytes_of(matrix.minima, scales);
  return part;
}

void row_to_f32(const TensorView& matrix, int64_t row, float* out) {
  const int64_t depth = matrix.shape[1];
  const TensorView one = row_range(matrix, row, 1);
  const std::byte* data = bytes_of(one.data, 0);
  const int64_t size = dtype_size(matrix.dtype);
  if (matrix.format == WeightFormat::kDense) {
    switch (matrix.dtype) {
      case DType::kF32:
        std::memcpy(out, data, static_cast<size_t>(depth * size));
        return;
      case DType::kBF16:
        for (int64_t k = 0; k < depth; ++k) out[k] = bf16_to_float(number<uint16_t>(data + k * size));
        return;
      case DType::kF16:
        for (int64_t k = 0; k < depth; ++k) out[k] = f16_to_float(number<uint16_t>(data + k * size));
        return;
    }
  }
  for (int64_t g = 0; g * kWeightGroup < depth; ++g) {
    const float scale = load(matrix.dtype, bytes_of(one.scales, g * size));
    const int64_t count = std::min<int64_t>(kWeightGroup, depth - g * kWeightGroup);
    if (matrix.format == WeightFormat::kInt8) {
      const int64_t end = g * kWeightGroup + count;
      for (int64_t k = g * kWeightGroup; k < end; ++k) out[k] = scale * static_cast<float>(number<int8_t>(data + k));
      continue;
    }
    const float minimum = load(matrix.dtype, bytes_of(one.minima, g * size));
    for (int64_t i = 0; i < count; ++i) {
      const auto both = static_cast<int32_t>(data[g * kHalf + i % kHalf]);
      out[g * kWeightGroup + i] = scale * static_cast<float>(i < kHalf ? both & kMost4 : both >> 4) + minimum;
    }
  }
}

void dequantize(const TensorView& matrix, float* out) {
  for (int64_t row = 0; row < matrix.shape[0]; ++row) row_to_f32(matrix, row, out + row * matrix.shape[1]);
}

IntegerRow::IntegerRow(WeightFormat format, int64_t depth)
    : format_(format), floats_(static_cast<size_t>(depth)),
      codes_(static_cast<size_t>(row_bytes(format, DType::kF32, depth))) {
  SPLITFUSE_ASSERT(format != WeightFormat::kDense);
  scales_.resize(static_cast<size_t>(row_scales(format, depth)) * sizeof(uint16_t));
  if (format == WeightFormat::kInt4) minima_.resize(scales_.size());
}

void IntegerRow::set(const TensorView& matrix, int64_t row) {
  if (matrix.format == format_) return take(matrix, row);
  row_to_f32(matrix, row, floats_.data());
  const std::span<const float> all = floats_;
  for (size_t g = 0; g * kWeightGroup < all.size(); ++g) {
    const size_t first = g * kWeightGroup;
    const auto part = all.subspan(first, std::min<size_t>(kWeightGroup, all.size() - first));
    if (format_ == WeightFormat::kInt8) {
      quantize8(part, &codes_[first], &scales_[2 * g]);
    } else {
      quantize4(part, &codes_[g * kHalf], &scales_[2 * g], &minima_[2 * g]);
    }
  }
}

bool IntegerRow::overflows() const {
  const auto infinite = [](const std::vector<std::byte>& halves) {
    for (size_t at = 0; at < halves.size(); at += 2) {
      if (std::isinf(load(DType::kF16, &halves[at]))) return true;
    }
    return false;
  };
  return infinite(scales_) || infinite(minima_);
}

void IntegerRow::take(const TensorView& matrix, int64_t row) {
  const TensorView one = row_range(matrix, row, 1);
  std::memcpy(codes_.data(), one.data, codes_.size());
  const int64_t size = dtype_size(matrix.dtype);
  const auto in_half = [&](const void* from, std::vector<std::byte>& to) {
    for (size_t g = 0; 2 * g < to.size(); ++g) {
      const uint16_t half = float_to_f16(load(matrix.dtype, bytes_of(from, static_cast<int64_t>(g) * size)));
      std::memcpy(&to[2 * g], &half, sizeof half);
    }
  };
  in_half(one.scales, scales_);
  in_half(one.minima, minima_);
}

}  // namespace splitfuse
