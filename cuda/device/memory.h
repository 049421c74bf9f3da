// Owners of device memory and of page-locked host memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace splitfuse::cuda {

/// Device memory from one cudaMalloc, zeroed, at a multiple of 256 bytes.
class Memory {
 public:
  Memory() = default;
  /// Throws MemoryError, with the numbers, if the device has not that much left.
  explicit Memory(int64_t bytes);
  ~Memory();
  Memory(Memory&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  std::byte* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  int64_t size_ = 0;
};

/// Page-locked host memory, not zeroed: copies between it and the device run beside the host.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  /// Throws MemoryError if the system has not that much to lock.
  explicit PinnedMemory(int64_t bytes);
  ~PinnedMemory();
  PinnedMemory(PinnedMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  PinnedMemory& operator=(PinnedMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  std::byte* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  int64_t size_ = 0;
};

/// Bytes of device memory that one more cudaMalloc could have, less a reserve for what the driver takes by itself:
/// local memory of kernels, launch queues, graphs.
int64_t available_device_memory();

}  // namespace splitfuse::cuda
