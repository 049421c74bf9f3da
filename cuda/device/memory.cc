#include "cuda/device/memory.h"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "base/check.h"
#include "cuda/device/check.h"
#include "splitfuse/types.h"

namespace splitfuse::cuda {
namespace {

constexpr int64_t kReserve = int64_t{512} << 20;

int64_t free_device_memory() {
  size_t free = 0;
  size_t total = 0;
  SPLITFUSE_CUDA_CALL(cudaMemGetInfo(&free, &total));
  return static_cast<int64_t>(free);
}

}  // namespace

Memory::Memory(int64_t bytes) {
  SPLITFUSE_ASSERT(bytes >= 0);
  if (bytes == 0) return;
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, static_cast<size_t>(bytes));
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    throw MemoryError(cat("the CUDA device has no ", bytes, " bytes in one piece; ", free_device_memory(),
                          " are free: ask for less, or end other programs on it"));
  }
  check(status, "cudaMalloc");
  data_ = static_cast<std::byte*>(data);
  size_ = bytes;
  try {
    // On the default stream, which the streams of this library don't wait for.
    SPLITFUSE_CUDA_CALL(cudaMemset(data_, 0, static_cast<size_t>(bytes)));
    SPLITFUSE_CUDA_CALL(cudaStreamSynchronize(nullptr));
  } catch (...) {
    (void)cudaFree(data_);
    throw;
  }
}

Memory::~Memory() {
  if (data_ != nullptr) (void)cudaFree(data_);
}

PinnedMemory::PinnedMemory(int64_t bytes) {
  SPLITFUSE_ASSERT(bytes >= 0);
  if (bytes == 0) return;
  void* data = nullptr;
  const cudaError_t status = cudaHostAlloc(&data, static_cast<size_t>(bytes), cudaHostAllocDefault);
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    throw MemoryError(cat("the system has no ", bytes, " bytes to lock for copies to the CUDA device"));
  }
  check(status, "cudaHostAlloc");
  data_ = static_cast<std::byte*>(data);
  size_ = bytes;
}

PinnedMemory::~PinnedMemory() {
  if (data_ != nullptr) (void)cudaFreeHost(data_);
}

int64_t available_device_memory() { return std::max<int64_t>(free_device_memory() - kReserve, 0); }

}  // namespace splitfuse::cuda
