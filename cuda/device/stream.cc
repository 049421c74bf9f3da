#include "cuda/device/stream.h"

#include "cuda/device/check.h"

namespace splitfuse::cuda {

// Destructors drop errors: at the end of a process the runtime may be gone before they run.

Stream::Stream() { SPLITFUSE_CUDA_CALL(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }

Stream::~Stream() {
  if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
}

void Stream::synchronize() const { SPLITFUSE_CUDA_CALL(cudaStreamSynchronize(stream_)); }

Event::Event(Kind kind) {
  SPLITFUSE_CUDA_CALL(
      cudaEventCreateWithFlags(&event_, kind == Kind::kTiming ? cudaEventDefault : cudaEventDisableTiming));
}

Event::~Event() {
  if (event_ != nullptr) (void)cudaEventDestroy(event_);
}

void Event::record(cudaStream_t stream) const { SPLITFUSE_CUDA_CALL(cudaEventRecord(event_, stream)); }

void Event::synchronize() const { SPLITFUSE_CUDA_CALL(cudaEventSynchronize(event_)); }

void Event::hold(cudaStream_t stream) const { SPLITFUSE_CUDA_CALL(cudaStreamWaitEvent(stream, event_, 0)); }

float milliseconds(const Event& from, const Event& to) {
  float result = 0.0f;
  SPLITFUSE_CUDA_CALL(cudaEventElapsedTime(&result, from.get(), to.get()));
  return result;
}

}  // namespace splitfuse::cuda
