// The matrix multiplication of the CUDA backend, as its hosts and its kernels see it.
//
// Weights are [weight_rows, depth] of 16-bit floats, row-major, each row followed by zeros to a multiple of 8 elements.
// Those of a gated linear alternate in groups of kGateGroup rows: 8 of gate, then the same 8 of up; what is missing to
// a whole group is zero. Sums are f32, over ascending depth, in an order that depends on weight_rows and depth alone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace splitfuse::cuda {

inline constexpr int32_t kGateGroup = 8;

/// What becomes of the sums.
enum class GemmEpilogue : uint8_t {
  kStore,  // out f32 = sum + bias
  kAdd,  // out f32 += sum + bias
  kActivate,  // out, 16 bits = act(sum + bias), or of a gated linear act(gate sum + bias) * (up sum + bias)
};
/// kGelu is x * Phi(x), kGeluTanh its approximation; kSwigluClamped, of gated linears alone, is
/// min(g, 7) * sigmoid(1.702 min(g, 7)) * (clamp(u, -7, 7) + 1).
enum class GemmActivation : uint8_t { kNone, kSilu, kGelu, kGeluTanh, kRelu, kSwigluClamped };

/// out [rows, columns] (epilogue) in [rows, depth] weights^T. Pointers are to device memory, at multiples of 16 bytes.
struct GemmTask {
  const void* weights = nullptr;
  const float* bias = nullptr;  // [weight_rows] in the order of weight rows, or none
  const void* in = nullptr;  // 16-bit, of the same format as the weights; zero from depth to a multiple of 8
  void* out = nullptr;
  int64_t in_stride = 0;  // elements from row to row, a multiple of 8
  int64_t out_stride = 0;  // a multiple of 4
  int32_t weight_stride = 0;  // a multiple of 8
  int32_t rows = 0;
  int32_t columns = 0;  // of out
  int32_t weight_rows = 0;
  int32_t depth = 0;
  GemmEpilogue epilogue = GemmEpilogue::kStore;
  GemmActivation activation = GemmActivation::kNone;
  bool gated = false;
  bool half = false;  // the 16 bits are float16, not bfloat16
};

/// Where a task runs.
struct GemmPlace {
  int processors = 0;  // of the device
  cudaStream_t stream = nullptr;
  bool overlap = false;  // as Launch::overlap
};

/// For compute capability 8.0 and later: mma.sync. prepare: once, before the first.
void prepare_gemm_sm80();
void gemm_sm80(const GemmTask& task, const GemmPlace& place);
/// For Hopper alone: wgmma and TMA.
void prepare_gemm_sm90a();
void gemm_sm90a(const GemmTask& task, const GemmPlace& place);

/// Rows of a table [*, depth] of 16-bit floats, by index: x [rows, depth] f32 = scale * table[indices[r]].
/// `add`: x += table[offset + indices[r]].
struct EmbedTask {
  const void* table = nullptr;
  const int32_t* indices = nullptr;  // [rows], device memory
  float* x = nullptr;
  int64_t x_stride = 0;
  int32_t table_stride = 0;
  int32_t rows = 0;
  int32_t depth = 0;
  int32_t offset = 0;
  float scale = 1.0f;
  bool add = false;
  bool half = false;
};
void embed_rows(const EmbedTask& task, const GemmPlace& place);

}  // namespace splitfuse::cuda
