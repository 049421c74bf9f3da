// What an attention of _core.testing is, from keyword arguments.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "bindings.h"

/// An AttentionShape, less its KV cache, and all that it points to.
struct AttentionOptions {
  int32_t heads = 0;
  float scale = 1.0f;
  std::vector<std::pair<std::vector<float>, float>> ropes;   // inv_freq, magnitude
  std::vector<int32_t> windows;       // [layers]
  std::vector<int32_t> layer_ropes;   // [layers]
  float softcap = 0.0f;
  std::vector<float> alibi_slopes, sinks, q_norm, k_norm;
  std::string qk_norm = "none";
  std::string norm_kind = "rms";
  float norm_eps = 0.0f;

  bool operator==(const AttentionOptions&) const = default;

  /// Points into this.
  splitfuse::AttentionShape shape(const splitfuse::KvShape& kv) const;
};

/// From `ropes` [(inv_freq, magnitude)] and `inv_freq`, the only one if there are none; `layer_ropes` and `windows`
/// [layers]; softcap, alibi_slopes, sinks, qk_norm, norm_kind, norm_eps, q_norm, k_norm as in AttentionShape.
AttentionOptions attention_options(int32_t heads, float scale, int32_t layers, const std::vector<float>& inv_freq,
                                   const pybind11::kwargs& given);
