// Operations on whole rows, as their hosts and kernels see them. Pointers are to device memory, at multiples of 16
// bytes; rows lie `stride` elements apart, a multiple of 32, and what lies behind the columns is never written.
#pragma once

#include <cstdint>

#include "cuda/gemm/gemm.h"

namespace splitfuse::cuda {

/// norm(x) = x if there is no weight. Else (x - m) * weight / sqrt(mean((x - m)^2) + eps) + bias, with m = mean(x) if
/// `centered`, else 0; bias may be missing.
struct RowNorm {
  const float* weight = nullptr;
  const float* bias = nullptr;
  int32_t columns = 0;
  float eps = 0.0f;
  bool centered = false;
};

/// The most columns a norm takes.
inline constexpr int32_t kMaxNormColumns = 32768;

/// What becomes of a norm.
enum class NormUse : uint8_t {
  kBF16,  // out, bfloat16 = norm(x)
  kF16,  // out, float16 = norm(x)
  kStore,  // out f32 = norm(x); it may be x
  kAdd,  // out f32 += scale * norm(x)
};

struct NormTask {
  RowNorm norm;
  const float* x = nullptr;
  void* out = nullptr;
  int64_t stride = 0;  // of x and out
  const int32_t* list = nullptr;  // host memory [rows]: the rows of x, or none: all in their order
  int32_t rows = 0;  // of out
  float scale = 1.0f;
  NormUse use = NormUse::kStore;
};
void norm_rows(const NormTask& task, const GemmPlace& place);

/// logits [rows, columns] *= scale; then, if cap is not 0, cap * tanh(logits / cap).
struct ScaleTask {
  float* logits = nullptr;
  int64_t stride = 0;
  int32_t rows = 0;
  int32_t columns = 0;
  float scale = 1.0f;
  float cap = 0.0f;
};
void scale_rows(const ScaleTask& task, const GemmPlace& place);

}  // namespace splitfuse::cuda
