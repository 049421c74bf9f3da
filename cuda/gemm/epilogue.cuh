// What becomes of the sums of a tile: the same for every kernel. They are laid down in shared memory, input row by
// input row, and then taken up in fours of neighbouring columns, so that global memory is met in whole sectors.
#pragma once

#include <cstdint>

#include "cuda/gemm/gemm.h"
#include "cuda/gemm/number.cuh"

namespace splitfuse::cuda {

/// Floats from one input row to the next in shared memory. 4 more than the weight rows, a multiple of 64: then the 32
/// lanes of store_fragment() meet 32 banks.
constexpr int32_t staged_stride(int32_t weight_rows) { return weight_rows + 4; }

/// A lane's four sums of an instruction's 16 weight rows x 8 input rows: `sums` are those of weight rows g and g + 8
/// and of input rows 2t and 2t + 1, where g = lane / 4 and t = lane % 4. `staged`: the first of the 16 and of the 8.
template <int kWeightRows>
__device__ __forceinline__ void store_fragment(float* staged, int lane, float s0, float s1, float s2, float s3) {
  float* to = staged + (lane % 4) * 2 * staged_stride(kWeightRows) + lane / 4;
  to[0] = s0;
  to[staged_stride(kWeightRows)] = s1;
  to[8] = s2;
  to[staged_stride(kWeightRows) + 8] = s3;
}

__device__ __forceinline__ float4 plus(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/// Comparisons are written so that a NaN stays one.
__device__ __forceinline__ float activate(GemmActivation activation, float x) {
  switch (activation) {
    case GemmActivation::kNone:
      break;
    case GemmActivation::kSilu:
      return x / (1.0f + expf(-x));
    case GemmActivation::kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case GemmActivation::kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case GemmActivation::kRelu:
      return x < 0.0f ? 0.0f : x;
    case GemmActivation::kSwigluClamped: {
      const float gate = x > 7.0f ? 7.0f : x;
      return gate * sigmoid(1.702f * gate);
    }
  }
  return x;
}

__device__ __forceinline__ float activate_gated(GemmActivation activation, float gate, float up) {
  if (activation == GemmActivation::kSwigluClamped) {
    up = up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up;
    return activate(activation, gate) * (up + 1.0f);
  }
  return activate(activation, gate) * up;
}

/// Four columns of f32; beyond `columns` nothing is written.
__device__ __forceinline__ void put_floats(float* out, int32_t columns, bool add, const float4& value) {
  if (columns >= 4) {
    float4* to = reinterpret_cast<float4*>(out);
    *to = add ? plus(*to, value) : value;
    return;
  }
  const float values[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < columns) out[i] = add ? out[i] + values[i] : values[i];
  }
}

template <class Element>
__device__ __forceinline__ void put_elements(uint16_t* out, int32_t columns, const float4& value) {
  const uint32_t low = pack_two<Element>(value.x, value.y);
  const uint32_t high = pack_two<Element>(value.z, value.w);
  if (columns >= 4) {
    *reinterpret_cast<uint2*>(out) = make_uint2(low, high);
    return;
  }
  if (columns >= 1) out[0] = static_cast<uint16_t>(low);
  if (columns >= 2) out[1] = static_cast<uint16_t>(low >> 16);
  if (columns >= 3) out[2] = static_cast<uint16_t>(high);
}

__device__ __forceinline__ float4 bias_of(const GemmTask& task, int32_t weight_row) {
  if (task.bias == nullptr) return {0.0f, 0.0f, 0.0f, 0.0f};
  return *reinterpret_cast<const float4*>(task.bias + weight_row);
}

/// Finishes a tile that begins at (weight_row, row). `sum(row, weight_row)` gives four sums of neighbouring weight
/// rows, both counted from the tile's beginning. The work is shared by threads number `thread`, of `threads`.
template <class Element, int kWeightRows, int kRows, class Sum>
__device__ __forceinline__ void finish_tile(const GemmTask& task, int32_t weight_row, int32_t row, int thread,
                                            int threads, const Sum& sum) {
  const bool gated = task.gated;
  const int32_t quads = gated ? kWeightRows / 8 : kWeightRows / 4;   // of output columns
  const int32_t first_column = gated ? weight_row / 2 : weight_row;
  const int32_t rows = task.rows - row < kRows ? task.rows - row : kRows;
  for (int32_t i = thread; i < rows * quads; i += threads) {
    const int32_t r = i / quads;
    const int32_t column = i % quads * 4;
    const int32_t left = task.columns - first_column - column;
    if (left <= 0) continue;
    const int64_t place = (row + r) * task.out_stride + first_column + column;
    if (gated) {
      const int32_t gate_row = column / kGateGroup * 2 * kGateGroup + column % kGateGroup;
      const int32_t up_row = gate_row + kGateGroup;
      const float4 gate = plus(sum(r, gate_row), bias_of(task, weight_row + gate_row));
      const float4 up = plus(sum(r, up_row), bias_of(task, weight_row + up_row));
      const float4 value = {
          activate_gated(task.activation, gate.x, up.x), activate_gated(task.activation, gate.y, up.y),
          activate_gated(task.activation, gate.z, up.z), activate_gated(task.activation, gate.w, up.w)};
      put_elements<Element>(static_cast<uint16_t*>(task.out) + place, left, value);
      continue;
    }
    const float4 value = plus(sum(r, column), bias_of(task, weight_row + column));
    if (task.epilogue == GemmEpilogue::kActivate) {
      const float4 result = {activate(task.activation, value.x), activate(task.activation, value.y),
                             activate(task.activation, value.z), activate(task.activation, value.w)};
      put_elements<Element>(static_cast<uint16_t*>(task.out) + place, left, result);
    } else {
      put_floats(static_cast<float*>(task.out) + place, left, task.epilogue == GemmEpilogue::kAdd, value);
    }
  }
}

}  // namespace splitfuse::cuda
