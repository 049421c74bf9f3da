// The GEMM that says what is meant, in portable scalar code. Every other one is held to it.
#include "base/numeric.h"
#include "cpu/activation_ref.h"
#include "cpu/gemm.h"

namespace splitfuse {
namespace {

constexpr int32_t kWidth = 16;
static_assert(kWidth == 2 * kGateGroup && kWidth <= kWidestPanel);

struct F32 {
  using Element = float;
  static constexpr int32_t kTogether = 1;   // neighbours along k that lie side by side in a panel
  static float load(float value) { return value; }
  static float store(float value) { return value; }
};

struct Bf16 {
  using Element = uint16_t;
  static constexpr int32_t kTogether = 2;
  static float load(uint16_t value) { return bf16_to_float(value); }
  static uint16_t store(float value) { return float_to_bf16(value); }
};

/// sums[c] = row . column c of the panel
template <class Format>
void dot(const typename Format::Element* row, const typename Format::Element* panel, int32_t depth,
         float (&sums)[kWidth]) {
  for (float& sum : sums) sum = 0.0f;
  for (int32_t k = 0; k < depth; ++k) {
    const auto* weights = panel + int64_t{k / Format::kTogether} * kWidth * Format::kTogether + k % Format::kTogether;
    const float x = Format::load(row[k]);
    for (int32_t c = 0; c < kWidth; ++c) sums[c] += x * Format::load(weights[c * Format::kTogether]);
  }
}

template <class Format>
void multiply(const GemmTask& task) {
  using Element = typename Format::Element;
  const int64_t panel_elements =
      int64_t{(task.depth + Format::kTogether - 1) / Format::kTogether} * Format::kTogether * kWidth;
  const int32_t outputs = task.gated ? kWidth / 2 : kWidth;   // of one panel
  for (int32_t p = task.panel_begin; p < task.panel_end; ++p) {
    const Element* panel = reinterpret_cast<const Element*>(task.panels) + p * panel_elements;
    for (int32_t r = 0; r < task.rows; ++r) {
      float sums[kWidth];
      dot<Format>(static_cast<const Element*>(task.in) + r * task.in_stride, panel, task.depth, sums);
      for (int32_t c = 0; task.bias != nullptr && c < kWidth; ++c) sums[c] += task.bias[p * kWidth + c];
      for (int32_t c = 0; c < outputs && p * outputs + c < task.columns; ++c) {
        const int64_t at = r * task.out_stride + p * outputs + c;
        switch (task.epilogue) {
          case Epilogue::kStore:
            static_cast<float*>(task.out)[at] = sums[c];
            break;
          case Epilogue::kAdd:
            static_cast<float*>(task.out)[at] += sums[c];
            break;
          case Epilogue::kAct:
            static_cast<Element*>(task.out)[at] =
                Format::store(task.gated ? gated(task.activation, sums[c], sums[kGateGroup + c])
                                         : activated(task.activation, sums[c]));
            break;
        }
      }
    }
  }
}

double peak(int64_t rounds) {
  constexpr int32_t kLanes = 32;
  float sums[kLanes] = {};
  for (int64_t i = 0; i < rounds; ++i) {
    for (float& sum : sums) sum = sum * 0.5f + 1.0f;
    asm volatile("" : "+m"(sums));
  }
  return 2.0 * kLanes * static_cast<double>(rounds);
}

uint64_t read(const std::byte* data, int64_t bytes) {
  uint64_t all = 0;
  const auto* words = reinterpret_cast<const uint64_t*>(data);
  for (int64_t i = 0; i < bytes / 8; ++i) all |= words[i];
  return all;
}

}  // namespace

void add_gemm_ref(GemmTable& table) {
  table.f32 = {.width = kWidth,
               .together = F32::kTogether,
               .row_tile = 1,
               .multiply = multiply<F32>,
               .widen = nullptr,
               .peak = peak};
  table.bf16 = {.width = kWidth,
                .together = Bf16::kTogether,
                .row_tile = 1,
                .multiply = multiply<Bf16>,
                .widen = nullptr,
                .peak = peak};
  table.read = read;
}

}  // namespace splitfuse
