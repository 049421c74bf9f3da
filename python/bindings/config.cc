// Errors and plain configuration data.
#include <pybind11/operators.h>

#include "bindings.h"

namespace py = pybind11;
using namespace splitfuse;

void set_fields(const py::object& self, const py::kwargs& fields) {
  for (const auto& [name, value] : fields) {
    if (!py::hasattr(py::type::of(self), name)) {
      throw py::type_error(py::str("{} has no field '{}'").format(py::type::of(self).attr("__name__"), name));
    }
    self.attr(name) = value;
  }
}

ProgressFn progress_from(const py::object& callback) {
  if (callback.is_none()) return {};
  return [callback](int64_t done, int64_t total) {
    py::gil_scoped_acquire gil;
    callback(done, total);
  };
}

void register_errors(py::module_& module) {
  // Each is also the built-in exception that callers would catch for its kind of fault.
  const py::object base = py::register_exception<Error>(module, "Error", PyExc_RuntimeError);
  const auto derive = [&](PyObject* builtin) {
    return py::make_tuple(base, py::reinterpret_borrow<py::object>(builtin));
  };
  py::register_exception<ConfigError>(module, "ConfigError", derive(PyExc_ValueError));
  py::register_exception<CheckpointError>(module, "CheckpointError", base);
  py::register_exception<splitfuse::MemoryError>(module, "MemoryError", derive(PyExc_MemoryError));
  py::register_exception<InvalidArgument>(module, "InvalidArgument", derive(PyExc_ValueError));
  py::register_exception<StateError>(module, "StateError", base);
}

namespace {

/// dtype fields are strings in Python.
template <class T, class Class>
void def_dtype(Class& type, const char* name, DType T::* field) {
  type.def_property(
      name, [field](const T& self) { return dtype_name(self.*field); },
      [field](T& self, const std::string& value) { self.*field = dtype_from_name(value); });
}

/// Enumerators are words in Python.
template <class T, class Enum, class Class>
void def_word(Class& type, const char* name, Enum T::* field) {
  type.def_property(
      name, [field](const T& self) { return config_word(self.*field); },
      [field, name](T& self, const std::string& value) {
        try {
          self.*field = config_enum<Enum>(value);
        } catch (const ConfigError& error) {
          throw ConfigError(std::string(name) + ": " + error.what());
        }
      });
}

/// T(**fields)
template <class T>
py::class_<T> def_data(py::module_& module, const char* name) {
  py::class_<T> type(module, name);
  type.def(py::init<>());
  const py::object plain = type.attr("__init__");
  type.attr("__init__") = py::cpp_function(
      [plain](const py::object& self, const py::kwargs& fields) {
        plain(self);
        set_fields(self, fields);
      },
      py::name("__init__"), py::is_method(type));
  return type;
}

void register_parts(py::module_& module) {
  def_data<RopeConfig>(module, "RopeConfig")
      .def_readwrite("inv_freq", &RopeConfig::inv_freq)
      .def_readwrite("magnitude", &RopeConfig::magnitude)
      .def_readwrite("long_from", &RopeConfig::long_from)
      .def_readwrite("long_inv_freq", &RopeConfig::long_inv_freq)
      .def_readwrite("long_magnitude", &RopeConfig::long_magnitude)
      .def(py::self == py::self);

  def_data<LayerConfig>(module, "LayerConfig")
      .def_readwrite("window", &LayerConfig::window)
      .def_readwrite("rope", &LayerConfig::rope)
      .def_readwrite("moe", &LayerConfig::moe)
      .def(py::self == py::self);

  auto moe = def_data<MoeConfig>(module, "MoeConfig");
  def_word(moe, "scoring", &MoeConfig::scoring);
  moe.def_readwrite("experts", &MoeConfig::experts)
      .def_readwrite("top_k", &MoeConfig::top_k)
      .def_readwrite("intermediate_size", &MoeConfig::intermediate_size)
      .def_readwrite("normalize", &MoeConfig::normalize)
      .def_readwrite("scale", &MoeConfig::scale)
      .def_readwrite("groups", &MoeConfig::groups)
      .def_readwrite("top_groups", &MoeConfig::top_groups)
      .def_readwrite("correction", &MoeConfig::correction)
      .def_readwrite("router_bias", &MoeConfig::router_bias)
      .def_readwrite("expert_bias", &MoeConfig::expert_bias)
      .def_readwrite("shared_intermediate_size", &MoeConfig::shared_intermediate_size)
      .def_readwrite("shared_gate", &MoeConfig::shared_gate)
      .def(py::self == py::self);
}

void register_model(py::module_& module) {
  auto model = def_data<ModelConfig>(module, "ModelConfig");
  def_word(model, "norm", &ModelConfig::norm);
  def_word(model, "norm_place", &ModelConfig::norm_place);
  def_word(model, "parallel", &ModelConfig::parallel);
  def_word(model, "qk_norm", &ModelConfig::qk_norm);
  def_word(model, "activation", &ModelConfig::activation);
  model.def_readwrite("family", &ModelConfig::family)
      .def_readwrite("vocab_size", &ModelConfig::vocab_size)
      .def_readwrite("hidden_size", &ModelConfig::hidden_size)
      .def_readwrite("num_layers", &ModelConfig::num_layers)
      .def_readwrite("num_heads", &ModelConfig::num_heads)
      .def_readwrite("num_kv_heads", &ModelConfig::num_kv_heads)
      .def_readwrite("head_dim", &ModelConfig::head_dim)
      .def_readwrite("intermediate_size", &ModelConfig::intermediate_size)
      .def_readwrite("max_position", &ModelConfig::max_position)
      .def_readwrite("ropes", &ModelConfig::ropes)
      .def_readwrite("layers", &ModelConfig::layers)
      .def_readwrite("embed_size", &ModelConfig::embed_size)
      .def_readwrite("embed_scale", &ModelConfig::embed_scale)
      .def_readwrite("embed_norm", &ModelConfig::embed_norm)
      .def_readwrite("learned_positions", &ModelConfig::learned_positions)
      .def_readwrite("position_offset", &ModelConfig::position_offset)
      .def_readwrite("norm_bias", &ModelConfig::norm_bias)
      .def_readwrite("final_norm", &ModelConfig::final_norm)
      .def_readwrite("norm_eps", &ModelConfig::norm_eps)
      .def_readwrite("residual_scale", &ModelConfig::residual_scale)
      .def_readwrite("attention_scale", &ModelConfig::attention_scale)
      .def_readwrite("attention_softcap", &ModelConfig::attention_softcap)
      .def_readwrite("alibi_slopes", &ModelConfig::alibi_slopes)
      .def_readwrite("attention_sinks", &ModelConfig::attention_sinks)
      .def_readwrite("qkv_bias", &ModelConfig::qkv_bias)
      .def_readwrite("o_bias", &ModelConfig::o_bias)
      .def_readwrite("gated", &ModelConfig::gated)
      .def_readwrite("mlp_bias", &ModelConfig::mlp_bias)
      .def_readwrite("moe", &ModelConfig::moe)
      .def_readwrite("tie_embeddings", &ModelConfig::tie_embeddings)
      .def_readwrite("lm_head_bias", &ModelConfig::lm_head_bias)
      .def_readwrite("logit_scale", &ModelConfig::logit_scale)
      .def_readwrite("logit_softcap", &ModelConfig::logit_softcap)
      .def_readwrite("eos_token_ids", &ModelConfig::eos_token_ids)
      .def("validate", [](const ModelConfig& self) { validate(self); })
      .def("to_json", [](const ModelConfig& self) { return to_json(self); })
      .def_static("from_json", &model_config_from_json, py::arg("text"))
      .def(py::self == py::self);
}

}  // namespace

void register_config(py::module_& module) {
  register_parts(module);
  register_model(module);

  auto engine = def_data<EngineConfig>(module, "EngineConfig");
  def_dtype(engine, "dtype", &EngineConfig::dtype);
  engine.def_property(
      "quantize", [](const EngineConfig& self) { return weight_format_name(self.quantize); },
      [](EngineConfig& self, const std::string& value) { self.quantize = weight_format_from_name(value); });
  engine.def_property(
      "kv_dtype", [](const EngineConfig& self) { return kv_dtype_name(self.kv_dtype); },
      [](EngineConfig& self, const std::string& value) { self.kv_dtype = kv_dtype_from_name(value); });
  engine.def_readwrite("device", &EngineConfig::device)
      .def_readwrite("threads", &EngineConfig::threads)
      .def_readwrite("pin_threads", &EngineConfig::pin_threads)
      .def_readwrite("isa", &EngineConfig::isa)
      .def_readwrite("token_budget", &EngineConfig::token_budget)
      .def_readwrite("max_step_tokens", &EngineConfig::max_step_tokens)
      .def_readwrite("max_sequences", &EngineConfig::max_sequences)
      .def_readwrite("max_model_len", &EngineConfig::max_model_len)
      .def_readwrite("block_size", &EngineConfig::block_size)
      .def_readwrite("kv_bytes", &EngineConfig::kv_bytes)
      .def_readwrite("prefix_caching", &EngineConfig::prefix_caching);

  module.attr("MAX_LOGPROBS") = kMaxLogprobs;
  def_data<SamplingParams>(module, "SamplingParams")
      .def_readwrite("max_tokens", &SamplingParams::max_tokens)
      .def_readwrite("temperature", &SamplingParams::temperature)
      .def_readwrite("top_p", &SamplingParams::top_p)
      .def_readwrite("top_k", &SamplingParams::top_k)
      .def_readwrite("min_p", &SamplingParams::min_p)
      .def_readwrite("seed", &SamplingParams::seed)
      .def_readwrite("sample_index", &SamplingParams::sample_index)
      .def_readwrite("repetition_penalty", &SamplingParams::repetition_penalty)
      .def_readwrite("presence_penalty", &SamplingParams::presence_penalty)
      .def_readwrite("frequency_penalty", &SamplingParams::frequency_penalty)
      .def_readwrite("logit_bias", &SamplingParams::logit_bias)
      .def_readwrite("stop_token_ids", &SamplingParams::stop_token_ids)
      .def_readwrite("ignore_eos", &SamplingParams::ignore_eos)
      .def_readwrite("min_tokens", &SamplingParams::min_tokens)
      .def_readwrite("logprobs", &SamplingParams::logprobs)
      .def_readwrite("prompt_logprobs", &SamplingParams::prompt_logprobs);

  module.def("rope_frequencies", &rope_frequencies, py::arg("theta"), py::arg("dims"));
  module.def("cpu_isas", &cpu_isas);
  module.def("usable_cores", &usable_cores);
}
