// The fork-join pool: every thread once per region, memory in order across regions, sleep and wake. Meant to be run
// under ThreadSanitizer too.
#include "base/thread_pool.h"

#include <gtest/gtest.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <numeric>
#include <thread>
#include <vector>

#include "splitfuse/config.h"
#include "splitfuse/types.h"

namespace splitfuse {
namespace {

using std::chrono::milliseconds;

double process_seconds() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

TEST(ThreadPool, EveryThreadRunsOnceInEachRegion) {
  for (int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    ASSERT_EQ(pool.size(), threads);
    std::vector<int> runs(static_cast<size_t>(threads));  // each written by one thread: the pool must order the regions
    for (int region = 1; region <= 500; ++region) {
      pool.run([&](int thread) { ++runs[static_cast<size_t>(thread)]; });
      ASSERT_EQ(std::count(runs.begin(), runs.end(), region), threads);
    }
  }
}

TEST(ThreadPool, TheCallerIsThreadZero) {
  ThreadPool pool(4);
  std::vector<std::thread::id> ids(4);
  pool.run([&](int thread) { ids[static_cast<size_t>(thread)] = std::this_thread::get_id(); });
  EXPECT_EQ(ids[0], std::this_thread::get_id());
  std::sort(ids.begin(), ids.end());
  EXPECT_EQ(std::unique(ids.begin(), ids.end()), ids.end());
}

TEST(ThreadPool, ARegionSeesWhatTheLastOneWrote) {
  ThreadPool pool(3);
  // Each region reads what another thread wrote in the one before.
  std::vector<int64_t> from(3);
  std::vector<int64_t> to(3);
  std::iota(from.begin(), from.end(), 0);
  for (int region = 0; region < 2000; ++region) {
    pool.run([&](int thread) {
      const auto i = static_cast<size_t>(thread);
      to[i] = from[(i + 1) % 3] + 1;
    });
    std::swap(from, to);
  }
  EXPECT_EQ(std::accumulate(from.begin(), from.end(), int64_t{0}), 3 * 2000 + 3);
}

TEST(ThreadPool, WorkersWakeFromSleep) {
  ThreadPool pool(3);
  std::atomic<int> runs{0};
  for (int pause : {0, 1, 0, 3, 0, 0, 10, 1, 1}) {
    std::this_thread::sleep_for(milliseconds(pause));
    pool.run([&](int) { runs.fetch_add(1, std::memory_order_relaxed); });
  }
  EXPECT_EQ(runs.load(), 9 * 3);
}

TEST(ThreadPool, WakesAtTheMomentOfFallingAsleep) {
  // Pauses around the time after which workers sleep, where a lost wake-up would hang.
  ThreadPool pool(2);
  int64_t total = 0;
  for (int i = 0; i < 400; ++i) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(80 + i % 80);
    while (std::chrono::steady_clock::now() < end) {
    }
    std::atomic<int> runs{0};
    pool.run([&](int) { runs.fetch_add(1, std::memory_order_relaxed); });
    total += runs.load();
  }
  EXPECT_EQ(total, 800);
}

TEST(ThreadPool, PartsAreEvenAndComplete) {
  ThreadPool pool(3);
  for (int64_t count : {0, 1, 2, 3, 7, 100}) {
    std::vector<std::atomic<int>> runs(static_cast<size_t>(count));
    std::atomic<int64_t> longest{0};
    pool.run_parts(count, [&](int, int64_t first, int64_t past) {
      for (int64_t i = first; i < past; ++i) runs[static_cast<size_t>(i)].fetch_add(1);
      if (past - first > longest.load()) longest.store(past - first);
    });
    for (const auto& run : runs) EXPECT_EQ(run.load(), 1);
    EXPECT_LE(longest.load(), (count + 2) / 3);
  }
}

TEST(ThreadPool, OneItemIsTheCallersAlone) {
  ThreadPool pool(3);
  const uint32_t before = pool.barriers();
  std::thread::id id;
  pool.run_parts(1, [&](int thread, int64_t, int64_t) {
    EXPECT_EQ(thread, 0);
    id = std::this_thread::get_id();
  });
  EXPECT_EQ(id, std::this_thread::get_id());
  EXPECT_EQ(pool.barriers(), before);
}

TEST(ThreadPool, CountsItsBarriers) {
  ThreadPool pool(2);
  const uint32_t before = pool.barriers();
  for (int i = 0; i < 5; ++i) pool.run([](int) {});
  EXPECT_EQ(pool.barriers() - before, 5u);
  ThreadPool alone(1);
  alone.run([](int) {});
  EXPECT_EQ(alone.barriers(), 0u);
}

TEST(ThreadPool, PinsNoMoreThreadsThanThereAreCpus) {
  const int cores = usable_cores();
  EXPECT_TRUE(ThreadPool(cores, true).pinned());
  EXPECT_THROW(ThreadPool(1024, true), ConfigError);
}

TEST(ThreadPool, AnIdlePoolBurnsNoCore) {
  ThreadPool pool(4);
  pool.run([](int) {});
  std::this_thread::sleep_for(milliseconds(50));
  const double before = process_seconds();
  std::this_thread::sleep_for(milliseconds(300));
  EXPECT_LT(process_seconds() - before, 0.05);
}

TEST(ThreadPool, EndsAwakeAndAsleep) {
  for (int i = 0; i < 50; ++i) {
    ThreadPool pool(3);
    if (i % 2 == 0) pool.run([](int) {});
    if (i % 10 == 0) std::this_thread::sleep_for(milliseconds(2));
  }
}

TEST(ThreadPool, PoolsAreIndependent) {
  ThreadPool first(2);
  ThreadPool second(3);
  std::atomic<int> runs{0};
  std::thread other([&] {
    for (int i = 0; i < 300; ++i) second.run([&](int) { runs.fetch_add(1, std::memory_order_relaxed); });
  });
  for (int i = 0; i < 300; ++i) first.run([&](int) { runs.fetch_add(1, std::memory_order_relaxed); });
  other.join();
  EXPECT_EQ(runs.load(), 300 * 5);
}

TEST(ThreadPool, ZeroThreadsMeansTheUsableCores) {
  EXPECT_EQ(ThreadPool(0).size(), usable_cores());
  EXPECT_GE(usable_cores(), 1);
  EXPECT_LE(usable_cores(), static_cast<int>(std::thread::hardware_concurrency()));
}

TEST(ThreadPool, RefusesSillyNumbers) {
  EXPECT_THROW(ThreadPool(-1), ConfigError);
  EXPECT_THROW(ThreadPool(1'000'000), ConfigError);
}

}  // namespace
}  // namespace splitfuse
