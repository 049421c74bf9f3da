// Integer GEMM that says what is meant, in portable scalar code. Every other one is held to it.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/numeric.h"
#include "cpu/activation_ref.h"
#include "cpu/gemm.h"

namespace splitfuse {
namespace {

constexpr int32_t kWidth = 16;
static_assert(kWidth == 2 * kGateGroup && kWidth <= kWidestPanel);

template <class T>
T number(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

/// Weight k of column c of a group, as the integer that is in the panel.
struct Int8 {
  static constexpr int32_t kGroupBytes = (kQuantGroup + 2) * kWidth;
  static int32_t weight(const std::byte* group, int32_t k, int32_t c) {
    return static_cast<int32_t>(group[(k / 4 * kWidth + c) * 4 + k % 4]) - kWeightBias;
  }
  /// What a group adds to a sum: `dot` of its integers, `scale` and `total` of the row.
  static float add(const std::byte* group, int32_t c, int32_t dot, float scale, float) {
    return static_cast<float>(dot) * scale * f16_to_float(number<uint16_t>(group + kQuantGroup * kWidth + 2 * c));
  }
};

struct Int4 {
  static constexpr int32_t kGroupBytes = (kQuantGroup / 2 + 4) * kWidth;
  static int32_t weight(const std::byte* group, int32_t k, int32_t c) {
    const int32_t step = k / 4 % 4;
    const auto both = static_cast<int32_t>(group[(step * kWidth + c) * 4 + k % 4]);
    return k < kQuantGroup / 2 ? both & 15 : both >> 4;
  }
  static float add(const std::byte* group, int32_t c, int32_t dot, float scale, float total) {
    const std::byte* halves = group + kQuantGroup / 2 * kWidth;
    return static_cast<float>(dot) * scale * f16_to_float(number<uint16_t>(halves + 2 * c)) +
           total * f16_to_float(number<uint16_t>(halves + 2 * (kWidth + c)));
  }
};

/// sums[c] = row . column c of the panel
template <class Format>
void dot(const std::byte* row, const std::byte* panel, const RowRecord& record, float (&sums)[kWidth]) {
  for (float& sum : sums) sum = 0.0f;
  for (int32_t g = 0; g < record.groups; ++g) {
    const auto* values = reinterpret_cast<const signed char*>(row + g * kQuantGroup);
    const std::byte* group = panel + int64_t{g} * Format::kGroupBytes;
    for (int32_t c = 0; c < kWidth; ++c) {
      int32_t integer = 0;
      for (int32_t k = 0; k < kQuantGroup; ++k) integer += Format::weight(group, k, c) * values[k];
      sums[c] += Format::add(group, c, integer, number<float>(row + record.scales + 4 * g),
                             number<float>(row + record.totals + 4 * g));
    }
  }
}

template <class Format>
void multiply(const GemmTask& task) {
  const RowRecord record = row_record(task.depth);
  const int64_t panel_bytes = int64_t{record.groups} * Format::kGroupBytes;
  const int32_t outputs = task.gated ? kWidth / 2 : kWidth;   // of one panel
  for (int32_t p = task.panel_begin; p < task.panel_end; ++p) {
    for (int32_t r = 0; r < task.rows; ++r) {
      float sums[kWidth];
      dot<Format>(static_cast<const std::byte*>(task.in) + r * task.in_stride, task.panels + p * panel_bytes, record,
                  sums);
      for (int32_t c = 0; task.bias != nullptr && c < kWidth; ++c) sums[c] += task.bias[p * kWidth + c];
      for (int32_t c = 0; c < outputs && p * outputs + c < task.columns; ++c) {
        const int64_t at = r * task.out_stride + p * outputs + c;
        if (task.epilogue == Epilogue::kStore) {
          static_cast<float*>(task.out)[at] = sums[c];
        } else if (task.epilogue == Epilogue::kAdd) {
          static_cast<float*>(task.out)[at] += sums[c];
        } else {
          const float value =
              task.gated ? gated(task.activation, sums[c], sums[kGateGroup + c]) : activated(task.activation, sums[c]);
          if (task.narrow) {
            static_cast<uint16_t*>(task.out)[at] = float_to_bf16(value);
          } else {
            static_cast<float*>(task.out)[at] = value;
          }
        }
      }
    }
  }
}

float as_float(float value) { return value; }
float as_float(uint16_t value) { return bf16_to_float(value); }

template <class Cell>
void quantize(const void* in, int32_t depth, std::byte* out) {
  const RowRecord record = row_record(depth);
  const auto* cells = static_cast<const Cell*>(in);
  for (int32_t g = 0; g < record.groups; ++g) {
    float largest = 0.0f;
    for (int32_t i = 0; i < kQuantGroup; ++i) {
      const float magnitude = std::fabs(as_float(cells[g * kQuantGroup + i]));
      largest = std::isnan(magnitude) || std::isnan(largest) ? std::numeric_limits<float>::quiet_NaN()
                                                             : std::max(largest, magnitude);
    }
    const bool finite = largest < std::numeric_limits<float>::infinity();
    const float inverse = finite && largest >= 0x1p-100f ? 127.0f / largest : 0.0f;
    int32_t sum = 0;
    for (int32_t i = 0; i < kQuantGroup; ++i) {
      const float value = as_float(cells[g * kQuantGroup + i]) * inverse;
      const int32_t whole = finite ? static_cast<int32_t>(std::nearbyint(value)) : 0;
      out[g * kQuantGroup + i] = static_cast<std::byte>(whole);
      sum += whole;
    }
    const float scale = finite ? largest * (1.0f / 127.0f) : std::numeric_limits<float>::quiet_NaN();
    const float total = scale * static_cast<float>(sum);
    const int32_t offset = -kWeightBias * sum;
    std::memcpy(out + record.scales + 4 * g, &scale, 4);
    std::memcpy(out + record.offsets + 4 * g, &offset, 4);
    std::memcpy(out + record.totals + 4 * g, &total, 4);
  }
}

double peak(int64_t rounds) {
  constexpr int32_t kLanes = 32;
  int32_t sums[kLanes] = {};
  for (int64_t i = 0; i < rounds; ++i) {
    for (int32_t& sum : sums) sum = sum * 3 + 1;
    asm volatile("" : "+m"(sums));
  }
  return 2.0 * kLanes * static_cast<double>(rounds);
}

template <class Format>
GemmKernel kernel() {
  return {.width = kWidth,
          .together = 4,
          .row_tile = 1,
          .multiply = multiply<Format>,
          .widen = nullptr,
          .quantize_f32 = quantize<float>,
          .quantize_bf16 = quantize<uint16_t>,
          .peak = peak};
}

}  // namespace

void add_integer_gemm_ref(GemmTable& table) {
  table.int8 = kernel<Int8>();
  table.int4 = kernel<Int4>();
}

}  // namespace splitfuse
