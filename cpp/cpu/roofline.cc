#include "cpu/roofline.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "base/memory.h"
#include "base/thread_pool.h"
#include "cpu/linear.h"

namespace splitfuse {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// Largest work per second of any pass; `pass` returns its work. One pass goes before, to warm up.
template <class Pass>
double best_rate(double seconds, Pass&& pass) {
  pass();
  double best = 0;
  const double end = now() + seconds;
  do {
    const double begin = now();
    const double work = pass();
    best = std::max(best, work / (now() - begin));
  } while (now() < end);
  return best;
}

}  // namespace

Roofline measure_roofline(DType dtype, WeightFormat format, int threads, Isa isa, double seconds) {
  constexpr int64_t kReadBytes = int64_t{512} << 20;
  constexpr int64_t kPassBytes = int64_t{32} << 20;   // short passes, so that some run undisturbed
  constexpr int64_t kLine = 512;
  constexpr int64_t kRounds = 100000;
  ThreadPool pool(threads);
  const GemmTable table = gemm_table(isa);
  const GemmKernel& kernel = gemm_kernel(table, dtype, format);
  std::atomic<uint64_t> sink{0};   // keeps the reads from being left out

  const Memory memory(kReadBytes);
  int64_t place = 0;
  const auto read = [&] {
    const std::byte* data = memory.data() + place;
    place = (place + kPassBytes) % kReadBytes;
    pool.run([&](int thread) {
      const int64_t begin = kPassBytes / kLine * thread / pool.size() * kLine;
      const int64_t end = kPassBytes / kLine * (thread + 1) / pool.size() * kLine;
      sink.fetch_or(table.read(data + begin, end - begin), std::memory_order_relaxed);
    });
    return static_cast<double>(kPassBytes);
  };
  const auto peak = [&] {
    std::atomic<double> done{0};
    pool.run([&](int) { done.fetch_add(kernel.peak(kRounds)); });
    return done.load();
  };
  return {.read_gbps = 1e-9 * best_rate(seconds / 2, read), .peak_gflops = 1e-9 * best_rate(seconds / 2, peak)};
}

}  // namespace splitfuse
