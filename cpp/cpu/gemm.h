// What a GEMM kernel is: one table of functions for each number format. The tables are all that leaves the files
// compiled for one instruction set; this header stays free of inline functions, which those files would emit too.
//
// Weights [n, k] lie in panels of `width` columns, one after another, each of them read once from front to back:
//   f32    panel[k][width]
//   bf16   panel[k / 2][width][2]      two neighbours along k, as the bf16 dot product instructions want them
// A gated linear's columns alternate in groups of kGateGroup: 8 of gate, then the same 8 of up. What is missing
// to a whole panel or an even k is zero. Every sum runs over k in ascending order, for every row by itself.
#pragma once

#include <cstddef>
#include <cstdint>

namespace splitfuse {

inline constexpr int32_t kGateGroup = 8;

/// What becomes of the sums.
enum class Epilogue : uint8_t {
  kStore,   // out f32 = sum + bias
  kAdd,     // out f32 += sum + bias
  kGate,    // out, in the kernel's own format = silu(gate sum + bias) * (up sum + bias)
};

/// Rows times a range of panels.
struct GemmTask {
  const void* in = nullptr;      // first row: of the kernel's format, or what `widen` made of it
  int64_t in_stride = 0;         // elements
  int32_t rows = 0;
  const std::byte* panels = nullptr;   // panel 0 of the matrix
  const float* bias = nullptr;   // [panels * width], or none
  int32_t depth = 0;             // k
  int32_t columns = 0;           // of out, n; nothing is written beyond
  int32_t panel_begin = 0;
  int32_t panel_end = 0;
  void* out = nullptr;           // first row, column 0
  int64_t out_stride = 0;        // elements
  Epilogue epilogue = Epilogue::kStore;
  float* sums = nullptr;         // scratch, kSumFloats
};

/// k is walked in blocks of about this many bytes of a row: those of a tile then stay in the first cache.
inline constexpr int32_t kDepthBytes = 3072;
/// Most rows of one task, and the scratch it needs: a panel's sums while k is walked in blocks.
inline constexpr int32_t kTaskRows = 512;
inline constexpr int32_t kWidestPanel = 48;
inline constexpr int64_t kSumFloats = int64_t{kTaskRows} * kWidestPanel + 64;

/// The kernels of one number format.
struct GemmKernel {
  int32_t width = 0;      // columns of a panel
  int32_t row_tile = 0;   // rows that share one reading of a panel
  void (*multiply)(const GemmTask& task) = nullptr;
  /// Where `multiply` wants f32 rows though the format is bf16: `count` elements from bf16 to f32. Null elsewhere.
  void (*widen)(const void* in, int64_t count, float* out) = nullptr;
  /// Runs the format's multiply-add on registers alone and returns the operations done, two for each product.
  double (*peak)(int64_t rounds) = nullptr;
};

struct GemmTable {
  GemmKernel f32;
  GemmKernel bf16;
  /// Reads `bytes` (a multiple of 512) and returns something that depends on all of them.
  uint64_t (*read)(const std::byte* data, int64_t bytes) = nullptr;
};

/// Each fills in the entries that its instruction set improves.
void add_gemm_ref(GemmTable& table);
void add_gemm_avx2(GemmTable& table);
void add_gemm_avx512(GemmTable& table);
void add_gemm_avx512_bf16(GemmTable& table);

}  // namespace splitfuse
