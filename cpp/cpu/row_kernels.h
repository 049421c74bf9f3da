// What rows.cc and sampler.cc ask of an instruction set.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "splitfuse/types.h"

namespace splitfuse {

/// The largest value of a row and the lowest index that has it; only `nan` counts if the row holds a NaN.
struct RowMax {
  float value = 0.0f;
  int32_t index = 0;
  bool nan = false;
};

/// norm(x) = x if there is no weight. Else (x - m) * weight / sqrt(mean((x - m)^2) + eps) + bias, with m = mean(x) if
/// `centered`, else 0; bias may be missing.
struct RowNorm {
  const float* weight = nullptr;
  const float* bias = nullptr;
  int32_t columns = 0;
  float eps = 0.0f;
  bool centered = false;
};

struct RowKernels {
  Isa isa = Isa::kRef;  // whose they are
  /// out [columns] = norm(x), in the format the table was made for.
  void (*norm)(const RowNorm& norm, const float* x, void* out) = nullptr;
  /// x [columns] = norm(x)
  void (*norm_in_place)(const RowNorm& norm, float* x) = nullptr;
  /// x [columns] += scale * norm(y)
  void (*add)(const RowNorm& norm, const float* y, float scale, float* x) = nullptr;
  /// x [count] *= scale; then, if cap is not 0, cap * tanh(x / cap).
  void (*scale_and_cap)(float* x, int32_t count, float scale, float cap) = nullptr;
  /// Over x [count], count >= 1.
  RowMax (*max)(const float* x, int32_t count) = nullptr;
  /// out [count] = 2^((x - max) * scale) where x >= floor, else 0. Returns their sum, added in double.
  double (*weigh)(const float* x, int32_t count, float max, float scale, float floor, float* out) = nullptr;
  /// The i with x[i] >= floor, ascending, into `out` [count]. Returns their number.
  int32_t (*find)(const float* x, int32_t count, float floor, int32_t* out) = nullptr;
};

/// Each replaces the entries it improves. `dtype`: float32 or bfloat16, of norm's output.
void row_kernels_ref(DType dtype, RowKernels& kernels);
void row_kernels_avx2(DType dtype, RowKernels& kernels);
void row_kernels_avx512(DType dtype, RowKernels& kernels);
void row_kernels_neon(DType dtype, RowKernels& kernels);

/// The table for a rung of the ladder.
RowKernels make_row_kernels(DType dtype, Isa isa);

}  // namespace splitfuse
