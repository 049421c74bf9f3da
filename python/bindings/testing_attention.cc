#include "testing_attention.h"

#include "splitfuse/config.h"

namespace py = pybind11;
using namespace splitfuse;

AttentionShape AttentionOptions::shape(const KvShape& kv) const {
  AttentionShape result;
  result.kv = kv;
  result.heads = heads;
  result.scale = scale;
  result.softcap = softcap;
  result.alibi_slopes = alibi_slopes;
  for (const auto& [inv_freq, magnitude] : ropes) result.ropes.push_back({inv_freq, magnitude});
  result.qk_norm_kind = config_enum<NormKind>(norm_kind);
  result.qk_norm_eps = norm_eps;
  for (size_t i = 0; i < windows.size(); ++i) {
    AttentionLayer layer;
    layer.window = windows[i];
    layer.rope = layer_ropes[i];
    layer.qk_norm = config_enum<QkNorm>(qk_norm);
    if (!q_norm.empty()) layer.q_norm = q_norm.data();
    if (!k_norm.empty()) layer.k_norm = k_norm.data();
    if (!sinks.empty()) layer.sinks = sinks.data();
    result.layers.push_back(layer);
  }
  return result;
}

AttentionOptions attention_options(int32_t heads, float scale, int32_t layers, const std::vector<float>& inv_freq,
                                   const py::kwargs& given) {
  AttentionOptions options;
  options.heads = heads;
  options.scale = scale;
  options.ropes = {{inv_freq, 1.0f}};
  options.windows.assign(static_cast<size_t>(layers), 0);
  options.layer_ropes.assign(static_cast<size_t>(layers), 0);
  for (const auto& [key, value] : given) {
    const auto name = key.cast<std::string>();
    const auto take = [&]<class T>(const char* field, T& out) {
      if (name == field) out = value.cast<T>();
      return name == field;
    };
    const bool known =
        take("ropes", options.ropes) || take("windows", options.windows) || take("layer_ropes", options.layer_ropes) ||
        take("softcap", options.softcap) || take("alibi_slopes", options.alibi_slopes) ||
        take("sinks", options.sinks) || take("q_norm", options.q_norm) || take("k_norm", options.k_norm) ||
        take("qk_norm", options.qk_norm) || take("norm_kind", options.norm_kind) || take("norm_eps", options.norm_eps);
    if (!known) throw py::type_error("paged() has no argument " + name);
  }
  const auto count = static_cast<size_t>(layers);
  if (options.windows.size() != count || options.layer_ropes.size() != count) {
    throw InvalidArgument("windows and layer_ropes must have an entry for each layer");
  }
  return options;
}
