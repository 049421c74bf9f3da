// Paged attention of the CUDA backend, as its host and its kernels see it.
//
// A KV block is [layer][kv head] keys [block_size][head_dim], then values the same, of 16-bit floats. What is not
// finite among values is NaN.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/attention/work_item.h"

namespace splitfuse::cuda {

inline constexpr int32_t kMaxHeadDim = 256;

/// The kernels' own head_dim: more dimensions are zeros.
constexpr int32_t paged_dim(int32_t head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }
/// Keys that are met at once; the running maximum of a row moves once for each such tile.
constexpr int32_t paged_tile_keys(int32_t head_dim) { return head_dim <= 128 ? 64 : 32; }
/// Shared memory of a block of so many rows: two stages of keys and values, and for each row its sums, and beyond
/// 128 dimensions its query.
constexpr int64_t paged_shared_bytes(int32_t head_dim, int32_t rows) {
  const int64_t dim = paged_dim(head_dim);
  return 8 * paged_tile_keys(head_dim) * dim + rows * dim * (dim <= 128 ? 4 : 6);
}
/// Rows of a block on a device where one may have so many bytes of shared memory.
constexpr int32_t paged_tile_rows(int32_t head_dim, int64_t shared_memory) {
  return paged_shared_bytes(head_dim, 64) + 256 <= shared_memory ? 64 : 16;
}
/// Blocks that a multiprocessor of so many bytes runs at once.
constexpr int32_t paged_blocks(int32_t head_dim, int64_t shared_memory) {
  const int64_t bytes = paged_shared_bytes(head_dim, paged_tile_rows(head_dim, shared_memory)) + 1024;
  const int64_t blocks = shared_memory / bytes;
  return blocks < 1 ? 1 : blocks > 3 ? 3 : static_cast<int32_t>(blocks);
}

/// One layer's attention over a work list. Pointers are to device memory.
struct PagedTask {
  const void* q = nullptr;             // [rows, heads * head_dim], 16-bit
  void* out = nullptr;                 // the same
  const std::byte* kv = nullptr;       // the layer's part of block 0
  const int32_t* tables = nullptr;     // block tables of all sequences, where WorkItem::table says
  const WorkItem* items = nullptr;
  const JoinItem* joins = nullptr;
  float* state_values = nullptr;       // [kv_heads][states][head_dim]: weighted sums of values
  float* state_sums = nullptr;         // [kv_heads][states][2]: maximum of scores in units of log2, sum of weights
  const float* slopes = nullptr;       // [heads], of ALiBi, or none
  const float* sinks = nullptr;        // [heads], or none
  int64_t row_stride = 0;              // elements between rows of q and out
  int64_t block_bytes = 0;
  int64_t head_bytes = 0;
  int64_t value_bytes = 0;             // from a head's keys to its values
  int64_t states = 0;
  int32_t item_count = 0;
  int32_t join_count = 0;
  int32_t head_dim = 0;                // a multiple of 8, up to kMaxHeadDim
  int32_t block_size = 0;              // a multiple of 16
  int32_t kv_heads = 0;
  int32_t group = 0;                   // query heads per KV head
  int32_t window = 0;                  // 0: none
  int32_t tile_rows = 0;               // paged_tile_rows(), most rows of an item
  float scale = 1.0f;
  float softcap = 0.0f;                // 0: none
  bool half = false;                   // the 16 bits are float16, not bfloat16
};

/// Before the first call: takes the shared memory that the kernels for this head_dim need.
void prepare_paged(int32_t head_dim, int32_t tile_rows, bool half);
/// out = attention of q, for the rows of items without states; else their states. `overlap`: as Launch::overlap.
void attend_paged(const PagedTask& task, cudaStream_t stream, bool overlap);
/// out, for the rows of the joins, from their states.
void join_states(const PagedTask& task, cudaStream_t stream, bool overlap);

}  // namespace splitfuse::cuda
