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
  /// `threads` >= 1, the caller among them; 0: the cores this process may use (affinity, cgroup quota).
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  /// Runs body(thread) once for each thread in [0, size()) and returns when all are done. `body` must not throw.
  template <class Body>
  void run(Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run_raw([](void* context, int thread) { (*static_cast<Plain*>(context))(thread); },
            const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  void run_raw(void (*function)(void*, int), void* context);
  struct Shared;
  int size_;
  std::unique_ptr<Shared> shared_;
  std::vector<std::thread> workers_;
};

}  // namespace splitfuse
