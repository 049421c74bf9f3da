// A ring of stages in shared memory between a thread that has TMA fill them and warps that use them up.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cstdint>

namespace splitfuse::cuda {

template <int kStages>
struct Ring {
  using Full = cutlass::arch::ClusterTransactionBarrier;
  using Empty = cutlass::arch::ClusterBarrier;

  Full full[kStages];
  Empty empty[kStages];

  /// By one thread, before all others; `users`: warps that call release().
  __device__ __forceinline__ void begin(int users) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      full[s].init(1);
      empty[s].init(static_cast<uint32_t>(users));
    }
    cutlass::arch::fence_barrier_init();
  }

  /// The filler, for its `index`th filling: waits until the stage is used up and says how many bytes will come.
  __device__ __forceinline__ void claim(int32_t index, uint32_t bytes) {
    const int32_t round = index / kStages;
    if (round > 0) empty[index % kStages].wait(static_cast<uint32_t>((round - 1) % 2));
    full[index % kStages].arrive_and_expect_tx(bytes);
  }
  __device__ __forceinline__ uint64_t* barrier(int32_t index) {
    return reinterpret_cast<uint64_t*>(&full[index % kStages]);
  }

  /// A user: waits until the `index`th filling is there.
  __device__ __forceinline__ void wait(int32_t index) {
    full[index % kStages].wait(static_cast<uint32_t>(index / kStages % 2));
  }
  /// One lane of each warp that is done with it.
  __device__ __forceinline__ void release(int32_t index) { empty[index % kStages].arrive(); }
};

}  // namespace splitfuse::cuda
