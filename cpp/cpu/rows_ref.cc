// The readable ones.
#include <cmath>

#include "base/numeric.h"
#include "cpu/row_kernels.h"

namespace splitfuse {
namespace {

void assign(float& out, float x) { out = x; }
void assign(uint16_t& out, float x) { out = float_to_bf16(x); }

/// Calls use(i, norm(x)[i]) for all of a row.
template <class Use>
void for_normed(const RowNorm& norm, const float* x, const Use& use) {
  if (norm.weight == nullptr) {
    for (int32_t i = 0; i < norm.columns; ++i) use(i, x[i]);
    return;
  }
  double mean = 0.0;
  for (int32_t i = 0; norm.centered && i < norm.columns; ++i) mean += x[i];
  mean /= norm.columns;
  double squares = 0.0;
  for (int32_t i = 0; i < norm.columns; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const auto scale = static_cast<float>(1.0 / std::sqrt(squares / norm.columns + norm.eps));
  for (int32_t i = 0; i < norm.columns; ++i) {
    const float value = static_cast<float>(x[i] - mean) * scale * norm.weight[i];
    use(i, norm.bias != nullptr ? value + norm.bias[i] : value);
  }
}

template <class Cell>
void norm(const RowNorm& norm, const float* x, void* out) {
  for_normed(norm, x, [&](int32_t i, float value) { assign(static_cast<Cell*>(out)[i], value); });
}

void norm_in_place(const RowNorm& row_norm, float* x) { norm<float>(row_norm, x, x); }

void add(const RowNorm& norm, const float* y, float scale, float* x) {
  for_normed(norm, y, [&](int32_t i, float value) { x[i] += scale * value; });
}

void scale_and_cap(float* x, int32_t count, float scale, float cap) {
  for (int32_t i = 0; i < count; ++i) {
    x[i] *= scale;
    if (cap != 0.0f) x[i] = cap * std::tanh(x[i] / cap);
  }
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
  kernels.norm = dtype == DType::kF32 ? norm<float> : norm<uint16_t>;
  kernels.norm_in_place = norm_in_place;
  kernels.add = add;
  kernels.scale_and_cap = scale_and_cap;
  kernels.max = max;
  kernels.weigh = weigh;
  kernels.find = find;
}

}  // namespace splitfuse
