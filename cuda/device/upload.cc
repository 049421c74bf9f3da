#include "cuda/device/upload.h"

#include "cuda/device/check.h"

namespace splitfuse::cuda {

Uploader::Uploader(cudaStream_t stream) : stream_(stream), slabs_{PinnedMemory(kSlabBytes), PinnedMemory(kSlabBytes)} {}

Uploader::~Uploader() { (void)cudaStreamSynchronize(stream_); }

std::byte* Uploader::slab() {
  sent_[current_].synchronize();
  return slabs_[current_].data();
}

void Uploader::send(const std::byte* from, std::byte* to, int64_t bytes, int64_t count, int64_t pitch) {
  if (count == 1) {
    SPLITFUSE_CUDA_CALL(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream_));
    return;
  }
  const auto width = static_cast<size_t>(bytes);
  SPLITFUSE_CUDA_CALL(cudaMemcpy2DAsync(to, static_cast<size_t>(pitch), from, width, width, static_cast<size_t>(count),
                                        cudaMemcpyHostToDevice, stream_));
}

void Uploader::turn() {
  sent_[current_].record(stream_);
  current_ = 1 - current_;
}

}  // namespace splitfuse::cuda
