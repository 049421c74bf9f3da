// Owners of CUDA streams and events. All throw Error if the runtime refuses.
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

namespace splitfuse::cuda {

/// A stream that does not wait for the default stream.
class Stream {
 public:
  Stream();
  ~Stream();
  Stream(Stream&& other) noexcept : stream_(std::exchange(other.stream_, nullptr)) {}
  Stream& operator=(Stream&& other) noexcept {
    std::swap(stream_, other.stream_);
    return *this;
  }

  cudaStream_t get() const { return stream_; }
  /// Waits until all that was given to it is done; faults of its kernels are thrown here.
  void synchronize() const;

 private:
  cudaStream_t stream_ = nullptr;
};

/// A point in a stream's work. kTiming costs a little each time; without it two events have no distance.
class Event {
 public:
  enum class Kind { kOrder, kTiming };
  explicit Event(Kind kind = Kind::kOrder);
  ~Event();
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }

  cudaEvent_t get() const { return event_; }
  /// Marks what `stream` has been given so far.
  void record(cudaStream_t stream) const;
  /// Waits until what was marked is done; at once if nothing was.
  void synchronize() const;
  /// What `stream` is given from now on waits for what was marked.
  void hold(cudaStream_t stream) const;

 private:
  cudaEvent_t event_ = nullptr;
};

/// Between two events of kTiming, both reached.
float milliseconds(const Event& from, const Event& to);

}  // namespace splitfuse::cuda
