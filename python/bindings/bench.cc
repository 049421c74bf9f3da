// _core.bench: what the machine can do and what single operations take, on the engine's own threads and memory.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>

#include "backend/backend.h"
#include "base/check.h"
#include "base/numeric.h"
#include "base/thread_pool.h"
#include "bindings.h"
#include "cpu/isa.h"
#include "cpu/roofline.h"

namespace py = pybind11;
using namespace splitfuse;

namespace {

constexpr int64_t kColdBytes = int64_t{160} << 20;   // more than any last-level cache that copies could stay in

double now_us() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Times {
  double median = 0;   // microseconds
  double best = 0;
};

/// Calls `body` until `seconds` are over, at least five times after one for warming up.
template <class Body>
Times time_calls(double seconds, Body&& body) {
  body();
  std::vector<double> times;
  const double end = now_us() + 1e6 * seconds;
  while (times.size() < 5 || now_us() < end) {
    const double begin = now_us();
    body();
    times.push_back(now_us() - begin);
  }
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front()};
}

py::dict result_of(const Times& times, double operations, double bytes) {
  py::dict result;
  result["us"] = times.median;
  result["best_us"] = times.best;
  result["gflops"] = 1e-3 * operations / times.median;
  result["gbps"] = 1e-3 * bytes / times.median;
  return result;
}

/// Noise of about unit size in the backend's format, rows padded with zeros.
void fill_noise(DType dtype, int64_t rows, int64_t columns, std::byte* out) {
  std::minstd_rand engine(7);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t at = r * row_stride(columns) + c;
      if (dtype == DType::kF32) {
        reinterpret_cast<float*>(out)[at] = uniform(engine);
      } else {
        reinterpret_cast<uint16_t*>(out)[at] = float_to_bf16(uniform(engine));
      }
    }
  }
}

struct Prepared {
  std::unique_ptr<Backend> backend;
  DeviceBuffer cache;
};

Prepared prepare(const std::string& dtype, int threads, const std::string& isa, const AttentionShape& shape,
                 const StepLimits& limits) {
  Prepared prepared;
  prepared.backend = make_cpu_backend(dtype_from_name(dtype), threads, isa);
  Backend& backend = *prepared.backend;
  prepared.cache = backend.allocate(backend.kv_block_bytes(shape.kv) * shape.kv.blocks);
  backend.prepare(shape, limits, prepared.cache.data());
  return prepared;
}

py::dict linear_us(int32_t n, int32_t k, bool gated, int32_t rows, const std::string& dtype, const std::string& format,
                   int threads, const std::string& isa, double seconds, bool cold) {
  AttentionShape shape;
  shape.kv = {1, 1, 8, 16, 1};
  shape.heads = 1;
  shape.layers.resize(1);
  Prepared prepared = prepare(dtype, threads, isa, shape, {rows, 1, 16, 1, 1, k});
  Backend& backend = *prepared.backend;
  Linear linear;
  static_cast<LinearShape&>(linear) = {
      n, k, false, gated, weight_format_from_name(format), gated ? Activation::kSilu : Activation::kNone};
  const int64_t bytes = backend.linear_bytes(linear);
  const int64_t copies = cold ? kColdBytes / bytes + 1 : 1;
  DeviceBuffer weights = backend.allocate(bytes * copies);
  fill_noise(backend.dtype(), 1, bytes / dtype_size(backend.dtype()) / 32 * 32, weights.data());
  for (int64_t i = 1; i < copies; ++i) {
    std::memcpy(weights.data() + i * bytes, weights.data(), static_cast<size_t>(bytes));
  }
  DeviceBuffer in = backend.allocate(rows * row_stride(k) * dtype_size(backend.dtype()));
  fill_noise(backend.dtype(), rows, k, in.data());
  DeviceBuffer out = backend.allocate(rows * row_stride(n) * int64_t{sizeof(float)});

  int64_t turn = 0;
  const Times times = time_calls(seconds, [&] {
    linear.data = weights.data() + turn++ % copies * bytes;
    if (gated) {
      backend.linear_act(linear, in.data(), rows, out.data());
    } else {
      backend.linear(linear, in.data(), rows, reinterpret_cast<float*>(out.data()));
    }
  });
  const double weight_count = static_cast<double>(n) * k * (gated ? 2 : 1);
  return result_of(times, 2.0 * rows * weight_count, static_cast<double>(bytes));
}

py::dict attention_us(int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t context, int32_t seqs, int32_t chunk,
                      const std::string& dtype, int threads, const std::string& isa, double seconds, int32_t block_size,
                      const std::string& kv_dtype, bool cold) {
  const int32_t length = context + chunk;
  const int32_t blocks = ceil_div(length, block_size);
  const int32_t rows = seqs * chunk;
  const int32_t columns = (heads + 2 * kv_heads) * head_dim;
  AttentionShape shape;
  shape.kv = {1, kv_heads, head_dim, block_size, blocks * seqs, kv_dtype_from_name(kv_dtype)};
  shape.heads = heads;
  shape.scale = 0.125f;
  shape.ropes = {{std::vector<float>(static_cast<size_t>(head_dim / 2), 0.01f)}};
  const int64_t layer_bytes =
      blocks * seqs * make_cpu_backend(dtype_from_name(dtype), threads, isa)->kv_block_bytes(shape.kv);
  shape.kv.layers = cold ? static_cast<int32_t>(kColdBytes / layer_bytes) + 1 : 1;
  AttentionLayer layer;
  layer.rope = 0;
  shape.layers.assign(static_cast<size_t>(shape.kv.layers), layer);
  Prepared prepared = prepare(dtype, threads, isa, shape, {rows, seqs, length, 1, 1});
  Backend& backend = *prepared.backend;

  std::vector<std::vector<int32_t>> tables(static_cast<size_t>(seqs));
  std::vector<RaggedSeq> ragged;
  std::vector<int32_t> positions;
  for (int32_t s = 0; s < seqs; ++s) {
    auto& table = tables[static_cast<size_t>(s)];
    for (int32_t b = 0; b < blocks; ++b) table.push_back(b * seqs + s);   // neighbours in time, as an engine's are
    ragged.push_back({s * chunk, chunk, 0, table.data()});
  }
  positions.resize(static_cast<size_t>(rows));
  const std::vector<Token> tokens(positions.size());
  DeviceBuffer qkv = backend.allocate(rows * row_stride(columns) * int64_t{sizeof(float)});
  fill_noise(DType::kF32, rows, columns, qkv.data());
  const int64_t activation_bytes = rows * row_stride(heads * head_dim) * dtype_size(backend.dtype());
  DeviceBuffer q = backend.allocate(activation_bytes);
  DeviceBuffer out = backend.allocate(activation_bytes);
  for (int32_t computed = context % chunk; computed <= context; computed += chunk) {   // the past, then the chunk
    for (RaggedSeq& seq : ragged) seq.computed = computed;
    for (int32_t row = 0; row < rows; ++row) positions[static_cast<size_t>(row)] = computed + row % chunk;
    backend.begin({tokens, positions, ragged, {}});
    for (int32_t layer = 0; layer < shape.kv.layers; ++layer) {
      backend.rope_write_kv(reinterpret_cast<float*>(qkv.data()), layer, q.data());
    }
  }
  int32_t turn = 0;
  const Times times = time_calls(seconds, [&] { backend.attention(q.data(), turn++ % shape.kv.layers, out.data()); });

  const double pairs = static_cast<double>(seqs) * chunk * (context + 0.5 * (chunk + 1));
  const double keys = static_cast<double>(seqs) * length;
  const double kv_bytes = static_cast<double>(backend.kv_block_bytes(shape.kv)) / shape.kv.layers / block_size;
  return result_of(times, 4.0 * pairs * heads * head_dim, keys * kv_bytes);
}

double barrier_us(int threads) {
  constexpr int kRounds = 1000;
  ThreadPool pool(threads);
  const Times times = time_calls(0.05, [&] {
    for (int i = 0; i < kRounds; ++i) pool.run([](int) {});
  });
  return times.median / kRounds;
}

}  // namespace

void register_bench(py::module_& module) {
  py::module_ bench = module.def_submodule("bench", "Measures the machine and single operations.");
  bench.def(
      "roofline",
      [](const std::string& dtype, const std::string& format, int threads, const std::string& isa, double seconds) {
        Roofline roofline;
        {
          const py::gil_scoped_release release;
          roofline = measure_roofline(dtype_from_name(dtype), weight_format_from_name(format), threads,
                                      isa_from_name(isa), seconds);
        }
        py::dict result;
        result["read_gbps"] = roofline.read_gbps;
        result["peak_gflops"] = roofline.peak_gflops;
        return result;
      },
      py::arg("dtype") = "bfloat16", py::arg("format") = "dense", py::arg("threads") = 0, py::arg("isa") = "auto",
      py::arg("seconds") = 1.0,
      "Read bandwidth of memory (1e9 bytes/s) and peak of the multiply-add (1e9 operations/s), best of many passes.");
  bench.def(
      "linear_us", &linear_us, py::arg("n"), py::arg("k"), py::arg("gated") = false, py::arg("rows") = 1,
      py::arg("dtype") = "bfloat16", py::arg("format") = "dense", py::arg("threads") = 0, py::arg("isa") = "auto",
      py::arg("seconds") = 0.2, py::arg("cold") = true,
      "One linear layer: median (us) and best (best_us) time of a call, and at the median its rate of arithmetic\n"
      "(gflops) and of weights read (gbps). `cold`: every call finds its weights in memory, not in a cache.");
  bench.def("attention_us", &attention_us, py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"),
            py::arg("context"), py::arg("seqs") = 1, py::arg("chunk") = 1, py::arg("dtype") = "bfloat16",
            py::arg("threads") = 0, py::arg("isa") = "auto", py::arg("seconds") = 0.2, py::arg("block_size") = 32,
            py::arg("kv_dtype") = "auto", py::arg("cold") = true,
            "Attention of `seqs` chunks of `chunk` rows after `context` positions, as linear_us; gbps counts each\n"
            "sequence's keys and values once.");
  bench.def("barrier_us", &barrier_us, py::arg("threads") = 0, "One empty fork and join of the thread pool.");
}
