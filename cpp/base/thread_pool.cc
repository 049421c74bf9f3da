#include "base/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <system_error>

#include "base/cgroup.h"
#include "base/check.h"
#include "splitfuse/config.h"
#include "splitfuse/types.h"

namespace splitfuse {
namespace {

using Clock = std::chrono::steady_clock;

// A worker looks for work this long before it sleeps; longer than an engine's pause between two steps.
constexpr auto kSpin = std::chrono::microseconds(100);
// The caller hands its core on after this long: a worker may be waiting for one.
constexpr auto kPatience = std::chrono::microseconds(50);
constexpr int kLooksPerClock = 64;
constexpr int kMaxThreads = 1024;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Looks until done() or the time is over; true if done.
template <class Done>
bool spin(std::chrono::microseconds time, const Done& done) {
  for (int look = 0; look < kLooksPerClock; ++look) {
    if (done()) return true;
    relax();
  }
  const auto end = Clock::now() + time;
  do {
    for (int look = 0; look < kLooksPerClock; ++look) {
      if (done()) return true;
      relax();
    }
  } while (Clock::now() < end);
  return done();
}

// The CPUs that the calling thread may run on, ascending; empty if the system does not say.
std::vector<size_t> allowed_cpus() {
  std::vector<size_t> allowed;
  for (size_t cpus = 1024; cpus <= 1 << 20; cpus *= 2) {
    cpu_set_t* set = CPU_ALLOC(cpus);
    const size_t bytes = CPU_ALLOC_SIZE(cpus);
    const bool known = sched_getaffinity(0, bytes, set) == 0;
    for (size_t cpu = 0; known && cpu < cpus; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, set)) allowed.push_back(cpu);
    }
    CPU_FREE(set);
    if (known) break;
  }
  return allowed;
}

void pin_to(std::thread& thread, size_t cpu) {
  cpu_set_t* set = CPU_ALLOC(cpu + 1);
  const size_t bytes = CPU_ALLOC_SIZE(cpu + 1);
  CPU_ZERO_S(bytes, set);
  CPU_SET_S(cpu, bytes, set);
  const int error = pthread_setaffinity_np(thread.native_handle(), bytes, set);
  CPU_FREE(set);
  if (error != 0) throw std::system_error(error, std::generic_category(), cat("on CPU ", cpu));
}

}  // namespace

int usable_cores() {
  auto cores = static_cast<int64_t>(allowed_cpus().size());
  if (cores == 0) cores = std::thread::hardware_concurrency();
  const auto limit = [&](std::optional<int64_t> quota, std::optional<int64_t> period) {
    if (quota && period && *quota > 0 && *period > 0) cores = std::min(cores, *quota / *period);
  };
  for_each_cgroup("", [&](const std::string& folder) {
    std::ifstream in(folder + "/cpu.max");   // "quota period", or "max period"
    int64_t quota = 0;
    int64_t period = 0;
    if (in >> quota >> period) limit(quota, period);
  });
  for_each_cgroup("cpu", [&](const std::string& folder) {
    limit(read_number(folder + "/cpu.cfs_quota_us"), read_number(folder + "/cpu.cfs_period_us"));
  });
  return static_cast<int>(std::max<int64_t>(cores, 1));
}

// Padded, so that workers who look at `region` are not disturbed by those who count themselves out of `running`.
// NOLINTNEXTLINE(clang-analyzer-optin.performance.Padding)
struct ThreadPool::Shared {
  // Written by the caller before it moves `region` on, read by workers after they saw it move.
  void (*function)(void*, int) = nullptr;
  void* context = nullptr;
  alignas(64) std::atomic<uint32_t> region{0};
  std::atomic<int> sleepers{0};
  std::atomic<bool> stop{false};
  alignas(64) std::atomic<int> running{0};   // workers still in the region
  std::mutex mutex;
  std::condition_variable wake;

  void open_region() {
    // Sequentially consistent with sleep(): either this sees the sleeper or the sleeper sees the region.
    region.fetch_add(1);
    if (sleepers.load() == 0) return;
    {
      std::lock_guard lock(mutex);
    }
    wake.notify_all();
  }

  void sleep(uint32_t seen) {
    std::unique_lock lock(mutex);
    sleepers.fetch_add(1);
    wake.wait(lock, [&] { return region.load() != seen; });
    sleepers.fetch_sub(1);
  }

  void work(int thread) {
    for (uint32_t seen = 0;; ++seen) {
      if (!spin(kSpin, [&] { return region.load(std::memory_order_acquire) != seen; })) sleep(seen);
      if (stop.load(std::memory_order_relaxed)) return;
      function(context, thread);
      running.fetch_sub(1, std::memory_order_release);
    }
  }

  void end(std::vector<std::thread>& workers) {
    stop.store(true, std::memory_order_relaxed);
    open_region();
    for (std::thread& worker : workers) worker.join();
  }
};

ThreadPool::ThreadPool(int threads, bool pin) : size_(threads == 0 ? usable_cores() : threads), pinned_(pin) {
  if (size_ < 1 || size_ > kMaxThreads) {
    throw ConfigError(cat("threads = ", threads, ": expected 0 (the cores this process may use) to ", kMaxThreads));
  }
  const std::vector<size_t> cpus = pin ? allowed_cpus() : std::vector<size_t>();
  if (pin && static_cast<size_t>(size_) > cpus.size()) {
    throw ConfigError(cat("pin_threads: there are ", size_, " threads, and ", cpus.size(),
                          " CPUs that this process may use; ask for fewer threads"));
  }
  shared_ = std::make_unique<Shared>();
  workers_.reserve(static_cast<size_t>(size_ - 1));
  try {
    for (int thread = 1; thread < size_; ++thread) {
      workers_.emplace_back([shared = shared_.get(), thread] { shared->work(thread); });
      if (pin) pin_to(workers_.back(), cpus[static_cast<size_t>(thread)]);
    }
  } catch (const std::system_error& error) {
    const size_t started = workers_.size();
    shared_->end(workers_);
    throw ConfigError(
        cat("threads = ", threads, ": the system gave only ", started + 1, " (", error.what(), "); ask for fewer"));
  }
}

ThreadPool::~ThreadPool() { shared_->end(workers_); }

uint32_t ThreadPool::barriers() const { return shared_->region.load(std::memory_order_relaxed); }

void ThreadPool::run_raw(void (*function)(void*, int), void* context) {
  if (size_ == 1) return function(context, 0);
  shared_->function = function;
  shared_->context = context;
  shared_->running.store(size_ - 1, std::memory_order_relaxed);
  shared_->open_region();
  function(context, 0);
  const auto done = [&] { return shared_->running.load(std::memory_order_acquire) == 0; };
  if (spin(kPatience, done)) return;
  while (!done()) std::this_thread::yield();
}

}  // namespace splitfuse
