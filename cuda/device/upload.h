// Copies from ordinary host memory to the device by way of two page-locked slabs: while one is on its way, the next is
// being filled.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/device/memory.h"
#include "cuda/device/stream.h"

namespace splitfuse::cuda {

class Uploader {
 public:
  /// Copies run in `stream`, so that what is given to it later sees them.
  explicit Uploader(cudaStream_t stream);
  /// Waits for the copies.
  ~Uploader();
  Uploader(Uploader&&) = delete;
  Uploader& operator=(Uploader&&) = delete;

  static constexpr int64_t kSlabBytes = int64_t{8} << 20;

  /// The slab to fill next, of kSlabBytes; waits until the copies out of it are done.
  std::byte* slab();
  /// Copies `count` pieces of `bytes` each that lie end to end at `from`, a place in the slab, to places `pitch` bytes
  /// apart.
  void send(const std::byte* from, std::byte* to, int64_t bytes, int64_t count = 1, int64_t pitch = 0);
  /// The slab has been filled and sent; the next call of slab() gives the other.
  void turn();

 private:
  cudaStream_t stream_;
  PinnedMemory slabs_[2];
  Event sent_[2];
  int current_ = 0;
};

}  // namespace splitfuse::cuda
