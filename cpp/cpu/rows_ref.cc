// The readable ones.
#include <cmath>

#include "base/numeric.h"
#include "cpu/row_kernels.h"

namespace splitfuse {
namespace {

void assign(float& out, float x) { out = x; }
void assign(uint16_t& out, float x) { out = float_to_bf16(x); }

template <class Cell>
void rms_norm(const float* x, const float* weight, float eps, int32_t columns, void* out) {
  double squares = 0.0;
  for (int32_t i = 0; i < columns; ++i) squares += double{x[i]} * x[i];
  const auto scale = static_cast<float>(1.0 / std::sqrt(squares / columns + eps));
  for (int32_t i = 0; i < columns; ++i) assign(static_cast<Cell*>(out)[i], x[i] * scale * weight[i]);
}

RowMax max(const float* x, int32_t count) {
  RowMax best{x[0], 0, false};
  for (int32_t i = 0; i < count; ++i) {
    best.nan |= std::isnan(x[i]);
    if (x[i] > best.value) {
      best.value = x[i];
      best.index = i;
    }
  }
  return best;
}

double weigh(const float* x, int32_t count, float max, float scale, float floor, float* out) {
  double sum = 0.0;
  for (int32_t i = 0; i < count; ++i) {
    out[i] = x[i] >= floor ? std::exp2((x[i] - max) * scale) : 0.0f;
    sum += out[i];
  }
  return sum;
}

int32_t find(const float* x, int32_t count, float floor, int32_t* out) {
  int32_t found = 0;
  for (int32_t i = 0; i < count; ++i) {
    if (x[i] >= floor) out[found++] = i;
  }
  return found;
}

}  // namespace

void row_kernels_ref(DType dtype, RowKernels& kernels) {
  kernels.rms_norm = dtype == DType::kF32 ? rms_norm<float> : rms_norm<uint16_t>;
  kernels.max = max;
  kernels.weigh = weigh;
  kernels.find = find;
}

}  // namespace splitfuse
