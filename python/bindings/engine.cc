// The engine, its plans and what a step returns.
#include <pybind11/operators.h>

#include <limits>
#include <memory>

#include "bindings.h"

namespace py = pybind11;
using namespace splitfuse;

namespace {

py::object finish_name(Finish finish) {
  static constexpr const char* kNames[] = {nullptr, "stop", "length", "error"};
  const char* name = kNames[static_cast<int>(finish)];
  return name ? py::object(py::str(name)) : py::object(py::none());
}

py::list top_list(const std::vector<TokenLogprob>& top, int32_t begin, int32_t count) {
  py::list list;
  for (int32_t i = begin; i < begin + count; ++i) list.append(py::make_tuple(top[i].token, top[i].logprob));
  return list;
}

py::list pairs(const std::vector<Chunk>& chunks) {
  py::list list;
  for (const Chunk& chunk : chunks) list.append(py::make_tuple(chunk.id, chunk.tokens));
  return list;
}

template <class T, class Field>
py::array_t<T> column(const std::vector<Sampled>& sampled, Field field) {
  py::array_t<T> array(static_cast<py::ssize_t>(sampled.size()));
  T* out = array.mutable_data();
  for (size_t i = 0; i < sampled.size(); ++i) out[i] = static_cast<T>(field(sampled[i]));
  return array;
}

struct PySampled {
  Sampled sampled;
  py::list top;
};
struct PyPromptLogprob {
  PromptLogprob row;
  py::list top;
};

Token to_token(int64_t id, size_t index) {
  if (id < std::numeric_limits<Token>::min() || id > std::numeric_limits<Token>::max()) {
    throw InvalidArgument("token " + std::to_string(index) + " of the prompt is " + std::to_string(id) +
                          ", no vocabulary has such an id");
  }
  return static_cast<Token>(id);
}

/// Ids from any sequence of integers, or from an integer array.
std::vector<Token> tokens_from(const py::object& object) {
  if (py::isinstance<py::array>(object)) {
    const auto kind = py::cast<py::array>(object).dtype().kind();
    if (kind != 'i' && kind != 'u') throw InvalidArgument("the prompt is an array that does not hold integers");
    const auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(object);
    if (!wide || wide.ndim() != 1) throw InvalidArgument("the prompt is an array that is not one-dimensional");
    std::vector<Token> tokens(static_cast<size_t>(wide.size()));
    for (size_t i = 0; i < tokens.size(); ++i) {
      tokens[i] = to_token(wide.data()[i], i);
    }
    return tokens;
  }
  try {
    const auto wide = object.cast<std::vector<int64_t>>();
    std::vector<Token> tokens(wide.size());
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = to_token(wide[i], i);
    return tokens;
  } catch (const py::cast_error&) {
    throw InvalidArgument("the prompt must be a sequence of token ids, not " +
                          py::repr(object).cast<std::string>().substr(0, 80));
  }
}

void register_plan(py::module_& module) {
  py::class_<SeqView>(module, "SeqView")
      .def(py::init<SeqId, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t>(), py::arg("id"), py::arg("known"),
           py::arg("computed"), py::arg("blocks") = 0, py::arg("shared") = 0, py::arg("priority") = 0,
           py::arg("behind") = 0)
      .def_readwrite("id", &SeqView::id)
      .def_readwrite("known", &SeqView::known)
      .def_readwrite("computed", &SeqView::computed)
      .def_readwrite("blocks", &SeqView::blocks)
      .def_readwrite("shared", &SeqView::shared)
      .def_readwrite("behind", &SeqView::behind)
      .def_property_readonly("own", &SeqView::own)
      .def_readwrite("priority", &SeqView::priority)
      .def(py::self == py::self)
      .def("__repr__", [](const SeqView& view) {
        return py::str("SeqView(id={}, known={}, computed={}, blocks={}, shared={}, priority={}, behind={})")
            .format(view.id, view.known, view.computed, view.blocks, view.shared, view.priority, view.behind);
      });
  py::class_<Limits>(module, "Limits")
      .def(py::init<int32_t, int32_t, int32_t, int32_t, int32_t>(), py::arg("max_tokens"), py::arg("max_seqs"),
           py::arg("free_blocks"), py::arg("total_blocks"), py::arg("block_size"))
      .def_readwrite("max_tokens", &Limits::max_tokens)
      .def_readwrite("max_seqs", &Limits::max_seqs)
      .def_readwrite("free_blocks", &Limits::free_blocks)
      .def_readwrite("total_blocks", &Limits::total_blocks)
      .def_readwrite("block_size", &Limits::block_size);
  py::class_<StepPlan>(module, "StepPlan")
      .def(py::init([](const std::vector<std::pair<SeqId, int32_t>>& chunks, std::vector<SeqId> preempt) {
             StepPlan plan;
             for (const auto& [id, tokens] : chunks) plan.chunks.push_back({id, tokens});
             plan.preempt = std::move(preempt);
             return plan;
           }),
           py::arg("chunks") = py::tuple(), py::arg("preempt") = py::tuple())
      .def_property_readonly("chunks", [](const StepPlan& plan) { return pairs(plan.chunks); })
      .def_property_readonly("preempt", [](const StepPlan& plan) { return plan.preempt; })
      .def(py::self == py::self)
      .def("__repr__", [](const StepPlan& plan) {
        return py::str("StepPlan(chunks={}, preempt={})").format(pairs(plan.chunks), plan.preempt);
      });
  module.def(
      "plan_splitfuse",
      [](const std::vector<SeqView>& in_order, const Limits& limits) {
        StepPlan plan;
        plan_splitfuse(in_order, limits, plan);
        return plan;
      },
      py::arg("in_order"), py::arg("limits"));
}

void register_output(py::module_& module) {
  py::class_<PySampled>(module, "Sampled")
      .def_property_readonly("id", [](const PySampled& self) { return self.sampled.id; })
      .def_property_readonly("token", [](const PySampled& self) { return self.sampled.token; })
      .def_property_readonly("finish", [](const PySampled& self) { return finish_name(self.sampled.finish); })
      .def_property_readonly("logprob", [](const PySampled& self) { return self.sampled.logprob; })
      .def_property_readonly("rank", [](const PySampled& self) { return self.sampled.rank; })
      .def_readonly("top", &PySampled::top);
  py::class_<PyPromptLogprob>(module, "PromptLogprob")
      .def_property_readonly("id", [](const PyPromptLogprob& self) { return self.row.id; })
      .def_property_readonly("position", [](const PyPromptLogprob& self) { return self.row.position; })
      .def_property_readonly("token", [](const PyPromptLogprob& self) { return self.row.token; })
      .def_property_readonly("logprob", [](const PyPromptLogprob& self) { return self.row.logprob; })
      .def_property_readonly("rank", [](const PyPromptLogprob& self) { return self.row.rank; })
      .def_readonly("top", &PyPromptLogprob::top);
  py::class_<StepOutput>(module, "StepOutput")
      .def_property_readonly("ids",
                             [](const StepOutput& self) {
                               return column<int64_t>(self.sampled, [](const Sampled& row) { return row.id; });
                             })
      .def_property_readonly("tokens",
                             [](const StepOutput& self) {
                               return column<int32_t>(self.sampled, [](const Sampled& row) { return row.token; });
                             })
      .def_property_readonly("finish",
                             [](const StepOutput& self) {
                               return column<uint8_t>(
                                   self.sampled, [](const Sampled& row) { return static_cast<uint8_t>(row.finish); });
                             })
      .def_property_readonly("sampled",
                             [](const StepOutput& self) {
                               py::list list;
                               for (const Sampled& row : self.sampled) {
                                 list.append(PySampled{row, top_list(self.top, row.top_begin, row.top_count)});
                               }
                               return list;
                             })
      .def_property_readonly("prompt",
                             [](const StepOutput& self) {
                               py::list list;
                               for (const PromptLogprob& row : self.prompt) {
                                 list.append(PyPromptLogprob{row, top_list(self.top, row.top_begin, row.top_count)});
                               }
                               return list;
                             })
      .def_property_readonly("chunks", [](const StepOutput& self) { return pairs(self.chunks); })
      .def_readonly("preempted", &StepOutput::preempted)
      .def_readonly("decode_tokens", &StepOutput::decode_tokens)
      .def_readonly("prefill_tokens", &StepOutput::prefill_tokens)
      .def_readonly("cached_tokens", &StepOutput::cached_tokens)
      .def_readonly("host_us", &StepOutput::host_us)
      .def_readonly("forward_us", &StepOutput::forward_us)
      .def_readonly("barriers", &StepOutput::barriers);
}

void register_state(py::module_& module) {
  py::class_<Capacity>(module, "Capacity")
      .def_readonly("total_blocks", &Capacity::total_blocks)
      .def_readonly("free_blocks", &Capacity::free_blocks)
      .def_readonly("cached_blocks", &Capacity::cached_blocks)
      .def_readonly("used_blocks", &Capacity::used_blocks)
      .def_readonly("running", &Capacity::running)
      .def_readonly("waiting", &Capacity::waiting)
      .def_readonly("token_budget", &Capacity::token_budget)
      .def_readonly("max_step_tokens", &Capacity::max_step_tokens)
      .def_readonly("max_sequences", &Capacity::max_sequences)
      .def_readonly("max_model_len", &Capacity::max_model_len)
      .def_readonly("block_size", &Capacity::block_size)
      .def_readonly("prefix_queries", &Capacity::prefix_queries)
      .def_readonly("prefix_hits", &Capacity::prefix_hits);
  py::class_<Progress>(module, "Progress")
      .def_readonly("prompt", &Progress::prompt)
      .def_readonly("known", &Progress::known)
      .def_readonly("computed", &Progress::computed)
      .def_readonly("cached", &Progress::cached)
      .def_readonly("blocks", &Progress::blocks)
      .def_readonly("preemptions", &Progress::preemptions)
      .def_property_readonly("finish", [](const Progress& self) { return finish_name(self.finish); });
  py::class_<MemoryPlan>(module, "MemoryPlan")
      .def_readonly("weights", &MemoryPlan::weights)
      .def_readonly("kv_pool", &MemoryPlan::kv_pool)
      .def_readonly("workspace", &MemoryPlan::workspace)
      .def_readonly("host", &MemoryPlan::host)
      .def_readonly("available", &MemoryPlan::available)
      .def_readonly("kv_bytes_per_token", &MemoryPlan::kv_bytes_per_token)
      .def_readonly("blocks", &MemoryPlan::blocks)
      .def_readonly("max_model_len", &MemoryPlan::max_model_len)
      .def_readonly("token_budget", &MemoryPlan::token_budget)
      .def_readonly("max_step_tokens", &MemoryPlan::max_step_tokens)
      .def_property_readonly("total", &MemoryPlan::total)
      .def("__str__", &MemoryPlan::to_string);
}

}  // namespace

void register_engine(py::module_& module) {
  using Unlock = py::call_guard<py::gil_scoped_release>;
  register_plan(module);
  register_output(module);
  register_state(module);
  py::class_<Engine>(module, "Engine")
      .def(py::init([](const ModelConfig& model, WeightSource& weights, const py::object& config,
                       const py::object& progress) {
             const EngineConfig settings = config.is_none() ? EngineConfig{} : config.cast<EngineConfig>();
             const ProgressFn callback = progress_from(progress);
             py::gil_scoped_release release;
             return std::make_unique<Engine>(model, weights, settings, callback);
           }),
           py::arg("model"), py::arg("weights"), py::arg("config") = py::none(), py::kw_only(),
           py::arg("progress") = py::none())
      .def(
          "put",
          [](Engine& self, SeqId id, const py::object& tokens, const py::object& params, int32_t priority,
             const std::string& salt) {
            const std::vector<Token> ids = tokens_from(tokens);
            const SamplingParams sampling = params.is_none() ? SamplingParams{} : params.cast<SamplingParams>();
            py::gil_scoped_release release;
            const PutResult result = self.put(id, ids, sampling, priority, salt);
            if (!result) throw InvalidArgument(result.reason);
          },
          py::arg("id"), py::arg("tokens"), py::arg("params") = py::none(), py::arg("priority") = 0,
          py::arg("cache_salt") = "")
      .def(
          "step",
          [](Engine& self, const py::object& plan) {
            if (plan.is_none()) {
              py::gil_scoped_release release;
              return StepOutput(self.step());
            }
            if (!py::isinstance<StepPlan>(plan)) throw InvalidArgument("plan must be a StepPlan or None");
            const auto& given = plan.cast<const StepPlan&>();
            py::gil_scoped_release release;
            return StepOutput(self.step(given));
          },
          py::arg("plan") = py::none())
      .def(
          "query",
          [](const Engine& self, const py::object& id) -> py::object {
            if (id.is_none()) return py::cast(self.query());
            return py::cast(self.query(id.cast<SeqId>()));
          },
          py::arg("id") = py::none())
      .def("view",
           [](Engine& self) {
             std::vector<SeqView> views;
             const Limits limits = self.view(views);
             return py::make_tuple(std::move(views), limits);
           })
      .def("budget_curve",
           [](const Engine& self) {
             std::vector<std::pair<int32_t, double>> points;
             for (const BudgetPoint& p : self.budget_curve()) points.emplace_back(p.tokens, p.tokens_per_second);
             return points;
           })
      .def("has_work", &Engine::has_work, Unlock())
      .def("flush", &Engine::flush, py::arg("id"), Unlock())
      .def("close", &Engine::close, Unlock())
      .def("describe", &Engine::describe, Unlock())
      .def_property_readonly("memory_plan", &Engine::memory_plan, py::return_value_policy::copy)
      .def_property_readonly("model_config", &Engine::model_config, py::return_value_policy::copy);
  module.def("plan_memory", &plan_memory, py::arg("model"), py::arg("config"), Unlock());
  module.def(
      "chosen_kernels",
      [](const EngineConfig& config) {
        std::vector<std::tuple<std::string, std::string, std::string>> choices;
        for (const KernelChoice& c : chosen_kernels(config)) choices.emplace_back(c.operation, c.isa, c.detail);
        return choices;
      },
      py::arg("config"));
}
