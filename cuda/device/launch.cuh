// How kernels are launched: one way, checked.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <nv/target>
#include <utility>

#include "cuda/device/check.h"

namespace splitfuse::cuda {

/// Where, and on what a kernel runs.
struct Launch {
  dim3 grid = 1;
  dim3 block = 1;
  cudaStream_t stream = nullptr;
  size_t shared_bytes = 0;   // dynamic; above 48 KiB after allow_shared_memory()
  unsigned cluster = 1;      // blocks along x that share their memory; from compute capability 9.0 on
  /// The kernel may begin while the one before it in the stream still runs; it calls wait_for_inputs() before it
  /// touches what that one reads or writes. From compute capability 9.0 on.
  bool overlap = false;
};

/// Launches `kernel` and throws Error with `name` if that is refused. Faults while it runs come up later, at the next
/// call that waits.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Launch& how, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  config.attrs = attributes;
  if (how.overlap) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  if (how.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = how.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
  check(cudaGetLastError(), name);
}

/// Lets `kernel` be launched with up to `bytes` of dynamic shared memory; once for each kernel, before the first step.
template <class... Parameters>
void allow_shared_memory(void (*kernel)(Parameters...), size_t bytes) {
  SPLITFUSE_CUDA_CALL(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

/// In a kernel: returns when the kernels before it in the stream are done and their writes are seen. Every thread that
/// reads or writes global memory calls it first; only weights may be read before.
__device__ __forceinline__ void wait_for_inputs() {
  NV_IF_TARGET(NV_PROVIDES_SM_90, (asm volatile("griddepcontrol.wait;" :: : "memory");))
}

/// In a kernel: the next one may begin once every block has said so or ended. It still waits for this one's end where
/// it calls wait_for_inputs().
__device__ __forceinline__ void let_next_begin() {
  NV_IF_TARGET(NV_PROVIDES_SM_90, (asm volatile("griddepcontrol.launch_dependents;" :: : "memory");))
}

}  // namespace splitfuse::cuda
