// What a GEMM kernel is: one table of functions for each number format. The tables are all that leaves the files
// compiled for one instruction set; this header stays free of inline functions, which those files would emit too.
//
// Weights [n, k] lie in panels of `width` columns, one after another, each of them read once from front to back:
//   f32    panel[k][width]
//   bf16   panel[k / t][width][t]      t neighbours along k: 2 where an instruction multiplies pairs, 4 for BFMMLA
//   int8   for each group of 32 along k: panel[32 / t][width][t] of weight + 128, then scale[width] in half precision;
//          t of 4 where an instruction adds four products, 8 for USMMLA
//   int4   for each group of 32 along k: panel[16 / t][width][t], t as for int8, of bytes that hold a column's first 16
//          weights in their low halves and its last in the high ones, then scale[width] and minimum[width] in half
//          precision
// Against int8 and int4 the rows are integers too: see RowRecord. A group is summed exactly, so only the order of the
// groups counts.
// A gated linear's columns alternate in groups of kGateGroup: 8 of gate, then the same 8 of up. What is missing
// to a whole panel or a whole t is zero. Every sum runs over k in ascending order, for every row by itself.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"
#include "splitfuse/types.h"

namespace splitfuse {

inline constexpr int32_t kGateGroup = 8;
/// Neighbours along k that share a scale, in rows and in weights.
inline constexpr int32_t kQuantGroup = 32;
/// What is added to int8 weights in a panel: the dot product instructions want one side unsigned.
inline constexpr int32_t kWeightBias = 128;

/// A row as integers: `groups` of 32 values in 8 bits, in [-127, 127]; then for each group, in arrays of their own,
/// its scale (f32), -kWeightBias times the sum of its values (int32), and scale times that sum (f32). Row by row, at
/// multiples of 64 bytes. A group that holds a NaN or an infinity has a scale of NaN.
struct RowRecord {
  int32_t groups = 0;
  int32_t scales = 0;  // bytes from the row's beginning
  int32_t offsets = 0;
  int32_t totals = 0;
  int32_t bytes = 0;
};
constexpr RowRecord row_record(int32_t depth) {
  const int32_t groups = (depth + kQuantGroup - 1) / kQuantGroup;
  return {groups, 32 * groups, 36 * groups, 40 * groups, (44 * groups + 63) / 64 * 64};
}

/// What becomes of the sums.
enum class Epilogue : uint8_t {
  kStore,  // out f32 = sum + bias
  kAdd,  // out f32 += sum + bias
  kAct,  // out, in the format of activations = act(sum + bias), or act(gate sum + bias) * (up sum + bias) if gated
};

/// Rows times a range of panels.
struct GemmTask {
  const void* in = nullptr;  // first row: of the kernel's format, or what `widen` or `quantize` made of it
  int64_t in_stride = 0;  // elements; bytes where rows are records
  int32_t rows = 0;
  const std::byte* panels = nullptr;  // panel 0 of the matrix
  const float* bias = nullptr;  // [panels * width], or none
  int32_t depth = 0;  // k
  int32_t columns = 0;  // of out, n; nothing is written beyond
  int32_t panel_begin = 0;
  int32_t panel_end = 0;
  void* out = nullptr;  // first row, column 0
  int64_t out_stride = 0;  // elements
  Epilogue epilogue = Epilogue::kStore;
  bool gated = false;  // kAct alone
  Activation activation = Activation::kNone;
  bool narrow = false;  // kAct on records: out is bf16, not f32
  float* sums = nullptr;  // scratch, kSumFloats
};

/// k is walked in blocks of about this many bytes of a row: those of a tile then stay in the first cache.
inline constexpr int32_t kDepthBytes = 3072;
/// Most rows of one task, and the scratch it needs: a panel's sums while k is walked in blocks.
inline constexpr int32_t kTaskRows = 512;
inline constexpr int32_t kWidestPanel = 48;
inline constexpr int64_t kSumFloats = int64_t{kTaskRows} * kWidestPanel + 64;

/// The kernels of one number format.
struct GemmKernel {
  Isa isa = Isa::kRef;  // whose it is
  int32_t width = 0;  // columns of a panel
  int32_t together = 0;  // t of the panels, a power of two; 1 for f32
  int32_t row_tile = 0;  // rows that share one reading of a panel
  void (*multiply)(const GemmTask& task) = nullptr;
  /// Where `multiply` wants f32 rows though the format is bf16: `count` elements from bf16 to f32. Null elsewhere.
  void (*widen)(const void* in, int64_t count, float* out) = nullptr;
  /// Where rows are records: makes one of `depth` f32 or bf16 elements, followed by zeros to a multiple of 32. Null
  /// elsewhere.
  void (*quantize_f32)(const void* in, int32_t depth, std::byte* record) = nullptr;
  void (*quantize_bf16)(const void* in, int32_t depth, std::byte* record) = nullptr;
  /// Runs the format's multiply-add on registers alone and returns the operations done, two for each product.
  double (*peak)(int64_t rounds) = nullptr;
};

struct GemmTable {
  GemmKernel f32;
  GemmKernel bf16;
  GemmKernel int8;
  GemmKernel int4;
  /// Reads `bytes` (a multiple of 512) and returns something that depends on all of them.
  uint64_t (*read)(const std::byte* data, int64_t bytes) = nullptr;
};

/// Each fills in the entries that its instruction set improves.
void add_gemm_ref(GemmTable& table);
void add_gemm_avx2(GemmTable& table);
void add_gemm_avx512(GemmTable& table);
void add_gemm_avx512_bf16(GemmTable& table);
void add_gemm_neon(GemmTable& table);
void add_gemm_neon_bf16(GemmTable& table);
void add_integer_gemm_ref(GemmTable& table);
void add_integer_gemm_avx2(GemmTable& table);
void add_integer_gemm_avx_vnni(GemmTable& table);
void add_integer_gemm_avx512(GemmTable& table);
void add_integer_gemm_avx512_vnni(GemmTable& table);
void add_integer_gemm_neon(GemmTable& table);
void add_integer_gemm_neon_i8mm(GemmTable& table);

}  // namespace splitfuse
