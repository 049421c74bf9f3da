// Attention on a CUDA device, with what feeds it: rotation of queries and keys, and the paged KV cache.
//
// Each step the host cuts the batch into work items (work_list.h), one list for each window that layers have, and sends
// them with the block tables in one copy; a layer is then three launches: rope, attention, and the joining of what was
// split, where something was.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "backend/batch.h"
#include "cuda/attention/paged.h"
#include "cuda/attention/rope.h"
#include "cuda/attention/work_list.h"
#include "cuda/device/device.h"
#include "cuda/device/memory.h"
#include "cuda/device/stream.h"

namespace splitfuse::cuda {

class CudaAttention {
 public:
  /// `dtype`: of activations and KV cache, kBF16 or kF16. All work goes to `stream`. Throws ConfigError for any other.
  CudaAttention(DType dtype, const Device& device, cudaStream_t stream);

  /// Bytes of one KV block over all layers. Throws ConfigError, naming the field, for a cache that the kernels cannot
  /// have: in int8, or with a head_dim above kMaxHeadDim.
  static int64_t block_bytes(const KvShape& shape, DType dtype);
  /// Bytes of device memory that prepare() will take.
  int64_t scratch_bytes(const AttentionShape& shape, const StepLimits& limits) const;
  /// Takes all memory. `kv`: block_bytes * blocks, device memory, zeroed, at a multiple of 16 bytes.
  void prepare(const AttentionShape& shape, const StepLimits& limits, std::byte* kv);

  /// Plans the step and sends the plan. `batch` may go when it returns.
  void begin(const RaggedBatch& batch);
  /// As Backend's operations of these names, on rows of row_stride().
  void rope_write_kv(const float* qkv, int32_t layer, void* q);
  void attention(const void* q, int32_t layer, void* out);

  /// For people: the instruction that multiplies.
  static const char* kernel() { return "mma.sync"; }

 private:
  /// What a step has room for, on the device.
  struct Room {
    WorkShape work;
    int64_t constants = 0;  // floats
    int64_t tables = 0;  // entries
    int64_t step_bytes = 0;  // of what is sent
    int64_t states = 0;  // bytes of partial results
  };
  /// A list that is on the device.
  struct SentList {
    const WorkItem* items = nullptr;
    const JoinItem* joins = nullptr;
    int32_t item_count = 0;
    int32_t join_count = 0;
  };
  /// The copy of a step's plan: host memory that is being filled, and where it will be.
  struct Sending {
    std::byte* from;
    const std::byte* to;
    int64_t used = 0;
  };

  Room room(const AttentionShape& shape, const StepLimits& limits) const;
  template <class T>
  T* put(Sending& sending, int64_t count, const T*& on_device) const;
  void put_places(Sending& sending, const RaggedBatch& batch);
  void put_tables(Sending& sending, const RaggedBatch& batch);
  void put_lists(Sending& sending, const RaggedBatch& batch);
  void send_constants();
  const AttentionLayer& layer_of(int32_t layer) const { return shape_.layers[static_cast<size_t>(layer)]; }
  std::byte* layer_kv(int32_t layer) const { return kv_ + layer * head_bytes_ * shape_.kv.kv_heads; }

  DType dtype_;
  int processors_;
  int64_t shared_memory_;
  bool overlap_;
  cudaStream_t stream_;

  AttentionShape shape_;
  std::byte* kv_ = nullptr;
  int64_t value_bytes_ = 0;  // of a head's keys in a block, and so from them to its values
  int64_t head_bytes_ = 0;
  int64_t block_bytes_ = 0;
  Room room_;
  Memory memory_;
  const float* slopes_ = nullptr;  // device memory, as are all below
  std::vector<const float*> inv_freqs_;  // of the shape's ropes
  std::byte* step_memory_ = nullptr;
  float* state_values_ = nullptr;
  float* state_sums_ = nullptr;

  std::vector<int32_t> windows_;  // that layers have, each once
  std::vector<int32_t> list_of_layer_;  // index into windows_
  std::unique_ptr<WorkPlanner> planner_;
  WorkList list_;
  std::vector<int32_t> table_starts_;  // [seqs]
  std::vector<SentList> sent_lists_;  // [windows]
  const RowPlace* places_ = nullptr;
  const int32_t* tables_ = nullptr;
  int32_t rows_ = 0;
  PinnedMemory staging_[2];  // one may still be on its way
  Event staged_[2];
  int next_staging_ = 0;
};

}  // namespace splitfuse::cuda
