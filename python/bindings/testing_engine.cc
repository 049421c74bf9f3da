// _core.testing for the engine: faults on demand, logits as they reach the sampler, invariants, allocations.
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "bindings.h"
#include "engine/engine_impl.h"
#include "engine/make_backend.h"

namespace py = pybind11;
using namespace splitfuse;

namespace {

struct Captured {
  int32_t position = 0;   // the logits speak of the token at this position
  std::vector<float> logits;
};

/// What a test asks of its engine's backend, and what it saw.
struct Probe {
  int64_t fail_after = -1;      // operations until one throws; -1: never
  bool poison_logits = false;   // the next sample() sees NaN in its first row
  bool capture = false;
  std::vector<Captured> captured;
};

/// Passes every operation on, unless it is to fail.
class ProbedBackend : public Backend {
 public:
  ProbedBackend(std::unique_ptr<Backend> inner, std::shared_ptr<Probe> probe)
      : inner_(std::move(inner)), probe_(std::move(probe)) {}

  std::string describe() const override { return inner_->describe(); }
  std::vector<KernelChoice> kernels(WeightFormat weights, WeightFormat head, KvDType kv) const override {
    return inner_->kernels(weights, head, kv);
  }
  DType dtype() const override { return inner_->dtype(); }
  uint32_t barriers() const override { return inner_->barriers(); }
  int64_t available() const override { return inner_->available(); }
  int64_t linear_bytes(const LinearShape& shape) const override { return inner_->linear_bytes(shape); }
  int64_t kv_block_bytes(const KvShape& shape) const override { return inner_->kv_block_bytes(shape); }
  int64_t scratch_bytes(const AttentionShape& attention, const StepLimits& limits) const override {
    return inner_->scratch_bytes(attention, limits);
  }
  DeviceBuffer allocate(int64_t bytes) override { return inner_->allocate(bytes); }
  void prepare(const AttentionShape& attention, const StepLimits& limits, std::byte* kv) override {
    vocab_ = limits.vocab;
    inner_->prepare(attention, limits, kv);
  }
  void pack(const Linear& linear, Rows which, int32_t row, const TensorView& weight) override {
    inner_->pack(linear, which, row, weight);
  }
  void pack_bias(const Linear& linear, Rows which, int32_t row, const TensorView& bias) override {
    inner_->pack_bias(linear, which, row, bias);
  }
  void upload(const TensorView& vector, float* out) override { inner_->upload(vector, out); }
  void read(const void* from, std::span<std::byte> out) override { inner_->read(from, out); }
  void write(std::span<const std::byte> bytes, void* to) override { inner_->write(bytes, to); }

  void begin(const RaggedBatch& batch) override {
    count();
    inner_->begin(batch);
  }
  void embed(const Linear& table, float scale, float* x) override {
    count();
    inner_->embed(table, scale, x);
  }
  void embed_positions(const Linear& table, int32_t offset, float* x) override {
    count();
    inner_->embed_positions(table, offset, x);
  }
  void norm(const Norm& norm, const float* x, std::span<const int32_t> rows, void* out) override {
    count();
    inner_->norm(norm, x, rows, out);
  }
  void norm_in_place(const Norm& norm, float* x) override {
    count();
    inner_->norm_in_place(norm, x);
  }
  void add(const Norm& norm, const float* y, float scale, float* x) override {
    count();
    inner_->add(norm, y, scale, x);
  }
  void linear(const Linear& linear, const void* in, int32_t rows, float* out) override {
    count();
    inner_->linear(linear, in, rows, out);
  }
  void linear_add(const Linear& linear, const void* in, int32_t rows, float* x) override {
    count();
    inner_->linear_add(linear, in, rows, x);
  }
  void linear_act(const Linear& linear, const void* in, int32_t rows, void* out) override {
    count();
    inner_->linear_act(linear, in, rows, out);
  }
  void rope_write_kv(float* qkv, int32_t layer, void* q) override {
    count();
    inner_->rope_write_kv(qkv, layer, q);
  }
  void attention(const void* q, int32_t layer, void* out) override {
    count();
    inner_->attention(q, layer, out);
  }
  void experts(const Experts& experts, const void* in, int32_t rows, float* out) override {
    count();
    inner_->experts(experts, in, rows, out);
  }
  void scale_logits(float* logits, int32_t rows, float scale, float softcap) override {
    count();
    inner_->scale_logits(logits, rows, scale, softcap);
  }
  void sample(float* logits, std::span<const SampleRow> rows, std::span<SampleResult> results) override {
    count();
    const float nan = std::numeric_limits<float>::quiet_NaN();
    if (probe_->poison_logits) inner_->write(std::as_bytes(std::span(&nan, 1)), logits);
    probe_->poison_logits = false;
    for (size_t i = 0; probe_->capture && i < rows.size(); ++i) {
      std::vector<float> row(static_cast<size_t>(vocab_));
      inner_->read(logits + i * row_stride(vocab_), std::as_writable_bytes(std::span(row)));
      probe_->captured.push_back({static_cast<int32_t>(rows[i].tokens.size()), std::move(row)});
    }
    inner_->sample(logits, rows, results);
  }

 private:
  void count() {
    if (probe_->fail_after < 0) return;
    if (probe_->fail_after-- == 0) throw Error("a fault that the test asked for");
  }

  std::unique_ptr<Backend> inner_;
  std::shared_ptr<Probe> probe_;
  int32_t vocab_ = 0;
};

}  // namespace

void register_engine_testing(py::module_& module) {
  py::module_ testing = module.attr("testing").cast<py::module_>();
  py::class_<Probe, std::shared_ptr<Probe>>(testing, "Probe", "What a test asks of an engine's backend.")
      .def_readwrite("fail_after", &Probe::fail_after)
      .def_readwrite("poison_logits", &Probe::poison_logits)
      .def_readwrite("capture", &Probe::capture)
      .def(
          "take",
          [](Probe& self) {
            py::list list;
            for (const Captured& row : self.captured) {
              py::array_t<float> logits(static_cast<py::ssize_t>(row.logits.size()));
              std::memcpy(logits.mutable_data(), row.logits.data(), row.logits.size() * sizeof(float));
              list.append(py::make_tuple(row.position, logits));
            }
            self.captured.clear();
            return list;
          },
          "[(position, logits [vocab])] in the order they were sampled from, and forgets them.");
  testing.def(
      "probed_engine",
      [](const ModelConfig& model, WeightSource& weights, const EngineConfig& config) {
        auto probe = std::make_shared<Probe>();
        auto backend = std::make_unique<ProbedBackend>(make_backend(config), probe);
        auto impl = std::make_unique<Engine::Impl>(model, weights, config, ProgressFn(), std::move(backend));
        return py::make_tuple(EngineAccess::make(std::move(impl)), probe);
      },
      py::arg("model"), py::arg("weights"), py::arg("config"), "(Engine, Probe)");
  testing.def(
      "check", [](Engine& engine) { return EngineAccess::impl(engine).check(); }, py::arg("engine"),
      "Empty if every count, list and block table agrees; else what is wrong.");
}
