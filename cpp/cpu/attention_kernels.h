// What attention.cc asks of an instruction set: plain data and function pointers, so that nothing compiled with
// wide-vector flags is ever shared between files.
//
// Layout of one KV head in one block, K then V, in columns of 16 keys (a block holds a whole number of them):
//   float32    K [head_dim][block_size]            V [block_size][padded_dim]
//   bfloat16   K [head_dim / 2][block_size][2]     V [block_size / 2][padded_dim][2]
//   int8       the same, then the float32 scales of K [block_size] and of V [block_size]
// So lanes are keys in q K^T and dimensions in p V, and in bfloat16 and int8 a lane holds the two factors of one
// step of a pairwise dot product: adjacent dimensions of K, adjacent keys of V.
// A block is [layer][kv head][K, V].
//
// A key or value in int8 is round(x / scale), to nearest, with scale = max |x| / 127 over its head_dim elements. Where
// one of them is not finite, both scales of that position are NaN: all who see it get NaN.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"
#include "splitfuse/types.h"

namespace splitfuse {

/// Keys of one column; block_size is a multiple of it.
inline constexpr int32_t kAttentionColumn = 16;
/// Keys between two updates of a row's running maximum; tiles start at multiples of it.
inline constexpr int32_t kAttentionTile = 256;
/// Keys that are summed on their own before they join a row's result; segments start at multiples of it. Only
/// whole segments are given to different threads, and they always join in ascending order.
inline constexpr int32_t kAttentionSegment = 512;
/// Query rows of one register tile, on every instruction set.
inline constexpr int32_t kAttentionRows = 6;
/// Items of up to this many query rows wait for memory rather than for arithmetic.
inline constexpr int32_t kAttentionFewRows = 4 * kAttentionRows;
/// Lines of memory that are fetched at once.
inline constexpr int32_t kAheadLines = 4;
/// Largest magnitude of a key or value in int8.
inline constexpr float kMostInt8 = 127.0f;

struct KvLayout {
  int32_t head_dim = 0;
  int32_t padded_dim = 0;      // head_dim rounded up to 16
  int32_t block_size = 0;
  int64_t value_offset = 0;    // bytes from a head's K to its V
  int64_t scale_offset = 0;    // bytes from a head's K to its scales, in int8
  int64_t head_bytes = 0;
  int64_t layer_bytes = 0;
  int64_t block_bytes = 0;
};

/// Where a thread's fetching of keys and values has come to, some lines ahead of their use.
struct AttentionAhead {
  const std::byte* kv = nullptr;        // as an item's
  const int32_t* block_table = nullptr;
  int32_t first = 0;                    // its first key
  int32_t begin = 0;                    // the tile's
  int32_t past = 0;                     // one past the item's last
  bool in_next = false;                 // whether it is in the item that comes next
  bool values = false;                  // or keys
  int32_t column = 0;                   // the tile's first that is not in `lines`
  int32_t columns = 0;                  // of the tile
  const char* lines[kAheadLines] = {};  // fetched at `offset`, which then grows by `stride`, `rows` times
  int64_t offset = 0;
  int64_t stride = 0;
  int32_t rows = 0;
};

/// The running softmax of `rows` rows: floats m [rows up to 16], l [same], o [rows][padded_dim]; m the maximum
/// of the scores in units of log2, l the sum and o the weighted sum of values, both relative to 2^m.
struct AttentionItem {
  KvLayout layout;
  const std::byte* kv = nullptr;        // the head's K in block 0
  const int32_t* block_table = nullptr;
  const void* q = nullptr;              // first query position, first head of the group
  void* out = nullptr;
  int64_t row_stride = 0;               // elements from one position's q or out to the next
  int32_t group = 0;                    // query heads that share the KV head
  int32_t positions = 0;                // query positions
  int32_t first = 0;                    // absolute position of the first
  int32_t window = 0;                   // keys that a position sees, itself the last
  int32_t begin = 0;                    // the first key: what lies before it is not read
  int32_t first_segment = 0;
  int32_t last_segment = 0;             // one past the last
  float scale = 0.0f;                   // of scores, with log2(e) in it
  float softcap = 0.0f;                 // 0: none
  const float* slopes = nullptr;        // [group], of ALiBi, or null
  const float* sinks = nullptr;         // [group], or null
  float* partials = nullptr;            // null: write `out`; else one state per segment, from the item's first
  int64_t state_floats = 0;
  float* scratch = nullptr;             // attention_scratch_floats()
  AttentionAhead* ahead = nullptr;      // the thread's, where the item waits for memory
  const std::byte* next_kv = nullptr;   // the item that the thread comes to next, for it to be fetched; or none
  const int32_t* next_block_table = nullptr;
  int32_t next_begin = 0;               // its first key
  int32_t next_past = 0;                // one past its last
};

struct AttentionKernels {
  Isa isa = Isa::kRef;  // whose `attend` is
  /// Attends over the item's segments.
  void (*attend)(const AttentionItem& item) = nullptr;
  /// Merges partials of segments [first_segment, last_segment) into `out`.
  void (*merge)(const AttentionItem& item) = nullptr;
  /// x [columns] = x / rms(x) * weight; `centered`: (x - mean) / deviation * weight. eps is added to the mean square.
  void (*norm)(float* x, const float* weight, int32_t columns, bool centered, float eps) = nullptr;
  /// x [2 * pairs] is rotated by cos, sin [pairs]: element i with i + pairs.
  void (*rotate)(float* x, const float* cos, const float* sin, int32_t pairs) = nullptr;
  /// out [count], a multiple of 8, in the activations' format = in.
  void (*convert)(const float* in, int32_t count, void* out) = nullptr;
  /// out [count], a multiple of 8, in int8 with one `scale`, NaN if `in` holds NaN or infinity.
  void (*quantize)(const float* in, int32_t count, int8_t* out, float* scale) = nullptr;
};

/// Each replaces the entries it improves for activations of `dtype` (float32 or bfloat16) and a KV cache of `kv`.
void attention_kernels_ref(DType dtype, KvDType kv, AttentionKernels& kernels);
void attention_kernels_avx2(DType dtype, KvDType kv, AttentionKernels& kernels);
void attention_kernels_avx512(DType dtype, KvDType kv, AttentionKernels& kernels);
void attention_kernels_avx512_bf16(DType dtype, KvDType kv, AttentionKernels& kernels);
void attention_kernels_neon(DType dtype, KvDType kv, AttentionKernels& kernels);
void attention_kernels_neon_bf16(DType dtype, KvDType kv, AttentionKernels& kernels);

constexpr int64_t attention_padded_rows(int64_t rows) { return (rows + 15) / 16 * 16; }
constexpr int64_t attention_state_floats(int64_t rows, int64_t padded_dim) {
  return 2 * attention_padded_rows(rows) + rows * padded_dim;
}
/// Two states, and the queries of an item in a kernel's own order, with a scale each.
constexpr int64_t attention_scratch_floats(int64_t rows, int64_t padded_dim) {
  return 2 * attention_state_floats(rows, padded_dim) + attention_padded_rows(rows) + rows * padded_dim;
}

}  // namespace splitfuse
