// A fork-join pool: one caller and its workers run the same function, each with its own index.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace splitfuse {

/// Workers spin briefly between regions and then sleep, so that a busy step pays no wake-up and an idle
/// engine burns no core. One caller at a time.
class ThreadPool {
 public:
  /// `threads` >= 1, the caller among them; 0: the cores this process may use (affinity, cgroup quota). `pin`: thread i
  /// of the pool stays on the i-th CPU that the caller may use; the caller itself, thread 0, is left as it is. Throws
  /// ConfigError if there are not that many threads or CPUs.
  explicit ThreadPool(int threads, bool pin = false);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }
  bool pinned() const { return pinned_; }

  /// Runs body(thread) once for each thread in [0, size()) and returns when all are done. `body` must not throw.
  template <class Body>
  void run(Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run_raw([](void* context, int thread) { (*static_cast<Plain*>(context))(thread); },
            const_cast<void*>(static_cast<const void*>(&body)));
  }

  /// Runs body(thread, first, past) over even parts of [0, count). One item is the caller's alone: one thread would
  /// work on it while all wait, in any case.
  template <class Body>
  void run_parts(int64_t count, Body&& body) {
    if (count <= 1) return body(0, int64_t{0}, count);
    run([&](int thread) { body(thread, count * thread / size_, count * (thread + 1) / size_); });
  }

  /// How often all threads have waited for each other so far, modulo 2^32. A pool of one never does.
  uint32_t barriers() const;

 private:
  void run_raw(void (*function)(void*, int), void* context);
  struct Shared;
  int size_;
  bool pinned_;
  std::unique_ptr<Shared> shared_;
  std::vector<std::thread> workers_;
};

}  // namespace splitfuse
