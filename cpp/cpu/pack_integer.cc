#include "cpu/pack_integer.h"

#include <cstring>

#include "base/check.h"
#include "base/numeric.h"
#include "cpu/gemm.h"

namespace splitfuse {
namespace {

static_assert(kQuantGroup == kWeightGroup);
constexpr int32_t kMost4 = 15;

int64_t group_bytes(WeightFormat format, int32_t width) {
  return (format == WeightFormat::kInt8 ? kQuantGroup + 2 : kQuantGroup / 2 + 4) * width;
}

void place8(const IntegerRow& row, int32_t depth, int32_t column, const PackedLayout& layout, std::byte* panel) {
  const int32_t width = layout.width();
  const int64_t bytes = group_bytes(WeightFormat::kInt8, width);
  for (int32_t k = 0; k < depth; ++k) {
    const auto code = static_cast<int8_t>(row.codes()[static_cast<size_t>(k)]);
    panel[k / kQuantGroup * bytes + layout.place(k % kQuantGroup, column)] = static_cast<std::byte>(code + kWeightBias);
  }
  for (int32_t g = 0; g < ceil_div(depth, kQuantGroup); ++g) {
    std::memcpy(panel + g * bytes + kQuantGroup * width + column * 2, row.scales().data() + 2 * g, 2);
  }
}

void place4(const IntegerRow& row, int32_t depth, int32_t column, const PackedLayout& layout, std::byte* panel) {
  const int32_t width = layout.width();
  constexpr int32_t kHalf = kQuantGroup / 2;
  for (int32_t g = 0; g < ceil_div(depth, kQuantGroup); ++g) {
    std::byte* group = panel + g * group_bytes(WeightFormat::kInt4, width);
    const std::byte* codes = row.codes().data() + g * kHalf;
    for (int32_t k = 0; k < kHalf; ++k) group[layout.place(k, column)] = codes[k];
    std::byte* const scales = group + kHalf * width;
    std::memcpy(scales + column * 2, row.scales().data() + 2 * g, 2);
    std::memcpy(scales + (width + column) * 2, row.minima().data() + 2 * g, 2);
  }
}

}  // namespace

int64_t integer_panel_bytes(WeightFormat format, int32_t depth, int32_t width) {
  return ceil_div(depth, kQuantGroup) * group_bytes(format, width);
}

void place_channel(const IntegerRow& row, WeightFormat format, int32_t depth, int32_t column,
                   const PackedLayout& layout, std::byte* panel) {
  format == WeightFormat::kInt8 ? place8(row, depth, column, layout, panel) : place4(row, depth, column, layout, panel);
}

void dequantize_channel(const std::byte* panel, WeightFormat format, int32_t first, int32_t count, int32_t column,
                        const PackedLayout& layout, float* out) {
  const int32_t width = layout.width();
  if (format == WeightFormat::kInt8) {
    for (int32_t k = first; k < first + count; ++k) {
      const std::byte* group = panel + k / kQuantGroup * group_bytes(format, width);
      uint16_t half = 0;
      std::memcpy(&half, group + kQuantGroup * width + column * 2, sizeof half);
      const auto code = static_cast<int32_t>(group[layout.place(k % kQuantGroup, column)]) - kWeightBias;
      out[k - first] = f16_to_float(half) * static_cast<float>(code);
    }
    return;
  }
  constexpr int32_t kHalf = kQuantGroup / 2;
  for (int32_t k = first; k < first + count; ++k) {
    const std::byte* group = panel + k / kQuantGroup * group_bytes(format, width);
    const int32_t i = k % kQuantGroup;
    const auto both = static_cast<int32_t>(group[layout.place(i % kHalf, column)]);
    uint16_t halves[2];
    for (int32_t h = 0; h < 2; ++h) std::memcpy(halves + h, group + kHalf * width + (h * width + column) * 2, 2);
    out[k - first] =
        f16_to_float(halves[0]) * static_cast<float>(i < kHalf ? both & kMost4 : both >> 4) + f16_to_float(halves[1]);
  }
}

}  // namespace splitfuse
