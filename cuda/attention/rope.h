// What stands between the product with the weights of queries, keys and values, and attention.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace splitfuse::cuda {

/// Where a row of the batch stands, in its sequence and in the KV cache.
struct RowPlace {
  int32_t position = 0;
  int32_t block = 0;
  int32_t within = 0;   // the block
};

enum class RopeNorm : uint8_t { kNone, kHead, kRow };

/// For every row: norms and rotates queries and keys, and puts them and values where attention reads them. Pointers are
/// to device memory.
struct RopeTask {
  const float* qkv = nullptr;          // [rows, (heads + 2 kv_heads) * head_dim]
  void* q = nullptr;                   // [rows, heads * head_dim], 16-bit
  std::byte* kv = nullptr;             // the layer's part of block 0, as paged.h has it
  const RowPlace* places = nullptr;    // [rows]
  const float* inv_freq = nullptr;     // [pairs]
  const float* q_norm = nullptr;       // [heads * head_dim]
  const float* k_norm = nullptr;       // [kv_heads * head_dim]
  int64_t qkv_stride = 0;
  int64_t q_stride = 0;
  int64_t block_bytes = 0;
  int64_t head_bytes = 0;
  int64_t value_bytes = 0;
  int32_t rows = 0;
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;                // a multiple of 8, up to kMaxHeadDim
  int32_t pairs = 0;                   // dimension i is rotated with i + pairs; 0: nothing is
  float magnitude = 1.0f;
  float eps = 0.0f;
  RopeNorm norm = RopeNorm::kNone;
  bool centred = false;                // (x - mean) / deviation, not x / rms
  bool half = false;                   // the 16 bits are float16, not bfloat16
};
void rope_write(const RopeTask& task, cudaStream_t stream, bool overlap);

}  // namespace splitfuse::cuda
