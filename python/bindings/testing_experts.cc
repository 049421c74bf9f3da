// _core.testing.Experts: a mixture of experts of a backend on numpy arrays. The output is full of NaN before, and
// what lies beyond its columns must be untouched after.
#include <algorithm>
#include <memory>
#include <optional>

#include "backend/backend.h"
#include "bindings.h"
#include "testing_arrays.h"

namespace py = pybind11;
using namespace splitfuse;
using namespace splitfuse::testing;

namespace {

using Matrices = std::vector<std::optional<Floats>>;  // gate (if gated), up and down, or their biases

class ExpertsOf {
 public:
  ExpertsOf(const MoeConfig& moe, int32_t hidden, int32_t max_rows, const std::string& activation, bool gated,
            const std::string& dtype, const std::string& isa, int threads, const std::string& format,
            const std::string& device)
      : backend_(make_device(device, dtype, isa, threads)), moe_(moe), hidden_(hidden), max_rows_(max_rows) {
    const bool shared = moe.shared_intermediate_size > 0;
    experts_.routing = {moe.experts, moe.top_k,      moe.scoring, moe.normalize, moe.scale,
                        moe.groups,  moe.top_groups, nullptr,     shared,        moe.shared_gate};
    experts_.router = room({moe.experts + (moe.shared_gate ? 1 : 0), hidden, moe.router_bias});
    for (int32_t e = 0; e < moe.experts + (shared ? 1 : 0); ++e) {
      const int32_t width = e < moe.experts ? moe.intermediate_size : moe.shared_intermediate_size;
      LinearShape in = {
          width, hidden, moe.expert_bias, gated, weight_format_from_name(format), config_enum<Activation>(activation)};
      experts_.in.push_back(room(in));
      experts_.out.push_back(room({hidden, width, moe.expert_bias, false, in.format}));
    }
    prepare(shared ? 1 : 0, in_width());
  }

  void set_router(const Floats& weight, const std::optional<Floats>& bias, const std::optional<Floats>& correction) {
    fill(experts_.router, Rows::kPlain, weight, bias);
    if (!correction) return;
    if (correction->size() != moe_.experts) throw InvalidArgument("correction must be [experts]");
    buffers_.push_back(backend_->allocate(moe_.experts * int64_t{sizeof(float)}));
    auto* place = reinterpret_cast<float*>(buffers_.back().data());
    backend_->upload(tensor_of(*correction), place);
    experts_.routing.correction = place;
  }

  void set_expert(int32_t expert, const std::optional<Floats>& gate, const Floats& up, const Floats& down,
                  const Matrices& biases) {
    const Linear& in = experts_.in.at(static_cast<size_t>(expert));
    const auto bias = [&](size_t i) { return biases.empty() ? std::nullopt : biases.at(i); };
    if (gate) fill(in, Rows::kGate, *gate, bias(0));
    fill(in, gate ? Rows::kUp : Rows::kPlain, up, bias(1));
    fill(experts_.out.at(static_cast<size_t>(expert)), Rows::kPlain, down, bias(2));
  }

  Floats run(const Floats& x) {
    const auto rows = static_cast<int32_t>(x.shape(0));
    if (x.ndim() != 2 || x.shape(1) != hidden_ || rows > max_rows_) {
      throw InvalidArgument("x must be [rows, hidden], of no more rows than max_rows");
    }
    Matrix in(*backend_, rows, hidden_, backend_->dtype());
    in.fill(x);
    Matrix out(*backend_, rows, hidden_, DType::kF32);
    out.poison();
    backend_->experts(experts_, in.data(), rows, out.floats());
    return out.result();
  }

  uint32_t barriers() const { return backend_->barriers(); }

 private:
  Linear room(const LinearShape& shape) {
    buffers_.push_back(backend_->allocate(backend_->linear_bytes(shape)));
    return {shape, buffers_.back().data()};
  }

  void fill(const Linear& linear, Rows which, const Floats& weight, const std::optional<Floats>& bias) {
    if (weight.shape(0) != linear.n) throw InvalidArgument("a weight has a wrong number of rows");
    backend_->pack(linear, which, 0, tensor_of(weight));
    if (bias) backend_->pack_bias(linear, which, 0, tensor_of(*bias));
  }

  int32_t in_width() const { return std::max(moe_.intermediate_size, moe_.shared_intermediate_size); }

  void prepare(int32_t shared, int32_t width) {
    AttentionShape shape;
    shape.kv = {.layers = 1, .kv_heads = 1, .head_dim = 8, .block_size = 16, .blocks = 1};
    shape.heads = 1;
    shape.layers.resize(1);
    cache_ = backend_->allocate(backend_->kv_block_bytes(shape.kv));
    const StepLimits limits = {.max_rows = max_rows_,
                               .max_seqs = 1,
                               .max_context = 16,
                               .max_logit_rows = 1,
                               .vocab = 1,
                               .integer_depth = std::max(hidden_, width),
                               .experts = moe_.experts + shared,
                               .experts_per_row = moe_.top_k + shared,
                               .expert_hidden = hidden_,
                               .expert_intermediate = width};
    backend_->prepare(shape, limits, cache_.data());
  }

  std::unique_ptr<Backend> backend_;
  MoeConfig moe_;
  int32_t hidden_;
  int32_t max_rows_;
  std::vector<DeviceBuffer> buffers_;
  DeviceBuffer cache_;
  Experts experts_;
};

}  // namespace

void register_experts_testing(py::module_& module) {
  auto testing = module.attr("testing").cast<py::module_>();
  const auto none = py::none();
  py::class_<ExpertsOf>(testing, "Experts", "A mixture of experts of a backend, on arrays of float32.")
      .def(py::init<const MoeConfig&, int32_t, int32_t, const std::string&, bool, const std::string&,
                    const std::string&, int, const std::string&, const std::string&>(),
           py::arg("moe"), py::arg("hidden"), py::arg("max_rows"), py::kw_only(), py::arg("activation") = "silu",
           py::arg("gated") = true, py::arg("dtype") = "float32", py::arg("isa") = "auto", py::arg("threads") = 1,
           py::arg("format") = "dense", py::arg("device") = "cpu")
      .def("set_router", &ExpertsOf::set_router, py::arg("weight"), py::arg("bias") = none,
           py::arg("correction") = none, "weight [experts (+ 1 for the shared one's gate), hidden]")
      .def("set_expert", &ExpertsOf::set_expert, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"),
           py::arg("biases") = Matrices(), "gate (or None) and up [intermediate, hidden], down [hidden, intermediate]")
      .def("run", &ExpertsOf::run, py::arg("x"), "x [rows, hidden] through each row's experts")
      .def("barriers", &ExpertsOf::barriers, "How often the threads have waited for each other so far.");
}
