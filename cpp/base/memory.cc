#include "base/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "base/cgroup.h"
#include "base/check.h"
#include "splitfuse/types.h"

namespace splitfuse {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kHugePage = int64_t{2} << 20;
#if defined(MADV_POPULATE_WRITE)
constexpr int kPopulateWrite = MADV_POPULATE_WRITE;
#else
constexpr int kPopulateWrite = 23;   // Linux 5.14; older systems refuse it with EINVAL
#endif

std::string mebibytes(int64_t bytes) { return cat(ceil_div(bytes, int64_t{1} << 20), " MiB"); }

[[noreturn]] void refuse(int64_t bytes, const std::string& why) {
  throw MemoryError(cat("cannot take ", mebibytes(bytes), " of memory: ", why, ". Available now: ",
                        mebibytes(available_memory()), ". Choose a smaller KV pool or model, or free memory."));
}

// Maps `size` bytes at a multiple of `alignment`; both are multiples of a page.
std::byte* map_aligned(int64_t size, int64_t alignment) {
  const int64_t room = size + alignment - kPage;
  void* at = mmap(nullptr, static_cast<size_t>(room), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) refuse(size, std::strerror(errno));
  auto* begin = static_cast<std::byte*>(at);
  const auto offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin) % static_cast<uintptr_t>(alignment));
  const int64_t head = offset == 0 ? 0 : alignment - offset;
  if (head > 0) munmap(begin, static_cast<size_t>(head));
  if (room > head + size) munmap(begin + head + size, static_cast<size_t>(room - head - size));
  return begin + head;
}

// 0, or the reason why the pages could not be had.
int touch(std::byte* data, int64_t size) {
  if (madvise(data, static_cast<size_t>(size), kPopulateWrite) == 0) return 0;
  if (errno != EINVAL) return errno;
  for (int64_t at = 0; at < size; at += kPage) *const_cast<volatile std::byte*>(data + at) = std::byte{0};
  return 0;
}

int touch_in_turn(std::byte* data, int64_t size, ThreadPool& pool) {
  std::atomic<int> error{0};
  pool.run([&](int thread) {
    for (int64_t at = thread * kHugePage; at < size && error.load() == 0; at += pool.size() * kHugePage) {
      if (const int failed = touch(data + at, std::min(kHugePage, size - at)); failed != 0) error.store(failed);
    }
  });
  return error.load();
}

// Room under a group's limit, counting its page cache as room.
void limit_by(std::optional<int64_t> limit, std::optional<int64_t> used, const std::string& stat,
              const std::string& prefix, int64_t& room) {
  if (!limit || !used) return;
  const int64_t cache = read_keyed_number(stat, prefix + "inactive_file").value_or(0) +
                        read_keyed_number(stat, prefix + "active_file").value_or(0);
  room = std::min(room, *limit - *used + cache);
}

}  // namespace

Memory::Memory(int64_t bytes, ThreadPool* pool) : size_(bytes) {
  SPLITFUSE_ASSERT(bytes >= 0);
  if (bytes == 0) return;
  // The system would promise more than it has, and end the process when the promise is called in.
  if (bytes > available_memory()) refuse(bytes, "there is not that much");
  const bool huge = bytes >= kHugePage;
  const int64_t mapped = round_up(bytes, kPage);
  data_ = map_aligned(mapped, huge ? kHugePage : kPage);
  if (huge) madvise(data_, static_cast<size_t>(mapped), MADV_HUGEPAGE);
  if (const int error = pool ? touch_in_turn(data_, mapped, *pool) : touch(data_, mapped); error != 0) {
    munmap(data_, static_cast<size_t>(mapped));
    data_ = nullptr;
    refuse(bytes, std::strerror(error));
  }
}

Memory::~Memory() {
  if (data_ != nullptr) munmap(data_, static_cast<size_t>(round_up(size_, kPage)));
}

Memory::Memory(Memory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

int64_t available_memory() {
  int64_t room = std::numeric_limits<int64_t>::max();
  if (const auto kib = read_keyed_number("/proc/meminfo", "MemAvailable")) room = *kib * 1024;
  for_each_cgroup("", [&](const std::string& folder) {
    limit_by(read_number(folder + "/memory.max"), read_number(folder + "/memory.current"), folder + "/memory.stat", "",
             room);
  });
  for_each_cgroup("memory", [&](const std::string& folder) {
    limit_by(read_number(folder + "/memory.limit_in_bytes"), read_number(folder + "/memory.usage_in_bytes"),
             folder + "/memory.stat", "total_", room);
  });
  return std::max<int64_t>(room, 0);
}

}  // namespace splitfuse
