// What the fields of a ModelConfig may be.
#include <algorithm>
#include <cmath>
#include <string>

#include "base/check.h"
#include "base/json.h"
#include "splitfuse/config.h"

namespace splitfuse {
namespace {

// Bounds far above any model that exists, low enough that every size made of them fits: widths such as
// (heads + 2 kv_heads) * head_dim in int32, bytes over all layers in int64.
constexpr int64_t kMaxVocab = int64_t{1} << 24;
constexpr int64_t kMaxHidden = int64_t{1} << 18;
constexpr int64_t kMaxIntermediate = int64_t{1} << 22;
constexpr int64_t kMaxLayers = int64_t{1} << 12;
constexpr int64_t kMaxHeads = int64_t{1} << 12;
constexpr int64_t kMaxHeadDim = 1024;
constexpr int64_t kMaxExperts = int64_t{1} << 14;
constexpr int64_t kMaxAllExperts = int64_t{1} << 17;   // over all layers
constexpr size_t kMaxRopes = 16;
// Rotary angles are products in float32, which is exact on integers up to here.
constexpr int64_t kMaxPosition = int64_t{1} << 24;
constexpr size_t kMaxEosIds = 1024;
constexpr size_t kMaxFamilyLength = 64;

template <class... Args>
[[noreturn]] void refuse(const Args&... args) {
  throw ConfigError(cat("model configuration: ", args...));
}

void check_range(const std::string& name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) refuse(name, " is ", value, "; expected ", low, " to ", high);
}

void check_positive(const std::string& name, float value) {
  if (!std::isfinite(value) || value <= 0) refuse(name, " is ", value, "; expected a finite number above 0");
}

void check_family(const std::string& family) {
  const auto fine = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' ||
           c == '.';
  };
  bool right = !family.empty() && family.size() <= kMaxFamilyLength;
  for (const char c : family) right = right && fine(c);
  if (!right) {
    refuse("family is ", json_quote(family), "; expected 1 to ", kMaxFamilyLength, " letters, digits, '_', '-' or '.'");
  }
}

void check_frequencies(const std::string& name, const std::vector<float>& frequencies) {
  for (const float frequency : frequencies) {
    if (!std::isfinite(frequency) || frequency < 0) {
      refuse(name, " holds ", frequency, "; expected finite numbers, not below 0");
    }
  }
}

void check_rope(const std::string& name, const RopeConfig& rope, int32_t head_dim) {
  const size_t most = static_cast<size_t>(head_dim) / 2;
  if (rope.inv_freq.empty() || rope.inv_freq.size() > most) {
    refuse(name, ".inv_freq holds ", rope.inv_freq.size(), " frequencies; expected 1 to ", most);
  }
  check_frequencies(name + ".inv_freq", rope.inv_freq);
  check_positive(name + ".magnitude", rope.magnitude);
  check_range(name + ".long_from", rope.long_from, 0, kMaxPosition);
  const size_t expected = rope.long_from > 0 ? rope.inv_freq.size() : 0;
  if (rope.long_inv_freq.size() != expected) {
    refuse(name, ".long_inv_freq holds ", rope.long_inv_freq.size(), " frequencies; expected ", expected, " where ",
           name, ".long_from is ", rope.long_from);
  }
  check_frequencies(name + ".long_inv_freq", rope.long_inv_freq);
  check_positive(name + ".long_magnitude", rope.long_magnitude);
}

void check_layers(const ModelConfig& config) {
  if (!config.layers.empty() && config.layers.size() != static_cast<size_t>(config.num_layers)) {
    refuse("layers holds ", config.layers.size(), " layers; expected num_layers, ", config.num_layers, ", or none");
  }
  for (size_t i = 0; i < config.layers.size(); ++i) {
    const LayerConfig& layer = config.layers[i];
    const std::string name = cat("layers[", i, ']');
    check_range(name + ".window", layer.window, 0, kMaxPosition);
    check_range(name + ".rope", layer.rope, -1, static_cast<int64_t>(config.ropes.size()) - 1);
    if (layer.moe && config.moe.experts == 0) refuse(name, ".moe is true in a model that has no experts");
  }
}

/// Each expert has names and places of its own.
void check_all_experts(const ModelConfig& config) {
  const int64_t layers =
      std::count_if(config.layers.begin(), config.layers.end(), [](auto& layer) { return layer.moe; });
  if (layers * config.moe.experts > kMaxAllExperts) {
    refuse("moe.experts is ", config.moe.experts, " in ", layers, " layers; expected at most ", kMaxAllExperts,
           " experts in all");
  }
}

void check_moe(const MoeConfig& moe) {
  check_range("moe.experts", moe.experts, 0, kMaxExperts);
  if (moe.experts == 0) {
    if (moe != MoeConfig{}) refuse("moe: fields are set in a model that has no experts");
    return;
  }
  check_range("moe.top_k", moe.top_k, 1, moe.experts);
  check_range("moe.intermediate_size", moe.intermediate_size, 1, kMaxIntermediate);
  check_positive("moe.scale", moe.scale);
  check_range("moe.groups", moe.groups, 1, moe.experts);
  if (moe.experts % moe.groups != 0) {
    refuse("moe.experts is ", moe.experts, "; expected a multiple of moe.groups, ", moe.groups);
  }
  check_range("moe.top_groups", moe.top_groups, 1, moe.groups);
  check_range("moe.top_k", moe.top_k, 1, int64_t{moe.experts} / moe.groups * moe.top_groups);
  check_range("moe.shared_intermediate_size", moe.shared_intermediate_size, 0, kMaxIntermediate);
  if (moe.shared_gate && moe.shared_intermediate_size == 0) {
    refuse("moe.shared_gate is true in a model without a shared expert");
  }
}

void check_attention(const ModelConfig& config) {
  check_range("num_heads", config.num_heads, 1, kMaxHeads);
  check_range("num_kv_heads", config.num_kv_heads, 1, kMaxHeads);
  if (config.num_heads % config.num_kv_heads != 0) {
    refuse("num_heads is ", config.num_heads, "; expected a multiple of num_kv_heads, ", config.num_kv_heads);
  }
  check_range("head_dim", config.head_dim, 8, kMaxHeadDim);
  if (config.head_dim % 8 != 0) refuse("head_dim is ", config.head_dim, "; expected a multiple of 8");
  if (config.attention_scale != 0) check_positive("attention_scale", config.attention_scale);
  if (config.attention_softcap != 0) check_positive("attention_softcap", config.attention_softcap);
  if (!config.alibi_slopes.empty() && config.alibi_slopes.size() != static_cast<size_t>(config.num_heads)) {
    refuse("alibi_slopes holds ", config.alibi_slopes.size(), "; expected one for each of ", config.num_heads,
           " heads, or none");
  }
  for (const float slope : config.alibi_slopes) {
    if (!std::isfinite(slope)) refuse("alibi_slopes holds ", slope, "; expected finite numbers");
  }
}

void check_stream(const ModelConfig& config) {
  check_range("embed_size", config.embed_size, 0, kMaxHidden);
  check_positive("embed_scale", config.embed_scale);
  check_range("learned_positions", config.learned_positions, 0, kMaxPosition);
  check_range("position_offset", config.position_offset, 0, kMaxPosition);
  if (config.learned_positions > 0 && config.max_position > config.learned_positions - config.position_offset) {
    refuse("max_position is ", config.max_position, "; learned_positions and position_offset allow ",
           config.learned_positions - config.position_offset);
  }
  check_positive("norm_eps", config.norm_eps);
  check_positive("residual_scale", config.residual_scale);
  if (config.norm_bias && config.norm != NormKind::kLayer) refuse("norm_bias: only norms of kind \"layer\" have one");
  if (config.parallel != Parallel::kNone && config.norm_place != NormPlace::kPre) {
    refuse("parallel is \"", config_word(config.parallel), "\"; expected norm_place \"pre\" with it");
  }
}

}  // namespace

void validate(const ModelConfig& config) {
  check_family(config.family);
  check_range("vocab_size", config.vocab_size, 1, kMaxVocab);
  check_range("hidden_size", config.hidden_size, 1, kMaxHidden);
  check_range("num_layers", config.num_layers, 1, kMaxLayers);
  check_attention(config);
  check_range("intermediate_size", config.intermediate_size, 1, kMaxIntermediate);
  check_range("max_position", config.max_position, 1, kMaxPosition);
  if (config.ropes.size() > kMaxRopes) {
    refuse("ropes holds ", config.ropes.size(), " kinds; expected at most ", kMaxRopes);
  }
  for (size_t i = 0; i < config.ropes.size(); ++i) check_rope(cat("ropes[", i, ']'), config.ropes[i], config.head_dim);
  check_layers(config);
  check_stream(config);
  check_moe(config.moe);
  check_all_experts(config);
  if (config.gated && config.activation == Activation::kNone) refuse("activation is \"none\" in a gated MLP");
  if (!config.gated && config.activation == Activation::kSwigluClamped) {
    refuse("activation is \"swiglu_clamped\"; expected a gated MLP with it");
  }
  if (config.tie_embeddings && config.lm_head_bias) refuse("lm_head_bias: a tied head has none");
  check_positive("logit_scale", config.logit_scale);
  if (config.logit_softcap != 0) check_positive("logit_softcap", config.logit_softcap);
  if (config.eos_token_ids.size() > kMaxEosIds) {
    refuse("eos_token_ids holds ", config.eos_token_ids.size(), " ids; expected at most ", kMaxEosIds);
  }
  for (const Token id : config.eos_token_ids) check_range("eos_token_ids", id, 0, config.vocab_size - 1);
}

}  // namespace splitfuse
