// Large, page-aligned, resident host memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/thread_pool.h"

namespace splitfuse {

/// Owns zeroed memory, in huge pages where the system gives them. Every page is touched at once, so that
/// what was promised at start is really there later.
class Memory {
 public:
  Memory() = default;
  /// With a `pool` its threads touch the pages in turn: that is faster, and on a machine of several memory nodes each
  /// gives its share. Throws MemoryError if the system refuses.
  explicit Memory(int64_t bytes, ThreadPool* pool = nullptr);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;

  std::byte* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  int64_t size_ = 0;
};

/// Bytes this process could still take: the least of the system's available memory and the room in its
/// control groups (v1 and v2).
int64_t available_memory();

}  // namespace splitfuse
