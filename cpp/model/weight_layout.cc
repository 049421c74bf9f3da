// Where every weight of a model lies, and which tensor fills it.
#include "base/check.h"
#include "model/checkpoint_layout.h"
#include "model/weights.h"

namespace splitfuse {
namespace {

constexpr int64_t kAlignment = 64;   // a cache line

class Layout {
 public:
  Layout(const ModelConfig& config, WeightFormat format, const Backend& backend, std::byte* base, WeightPlaces* places)
      : config_(config), format_(format), backend_(backend), base_(base), places_(places) {}

  DecoderWeights build() {
    DecoderWeights weights;
    const int32_t hidden = config_.hidden_size;
    const int32_t table = config_.table_size();
    weights.embed = plain("embed", config_.vocab_size, table, false);
    if (config_.embed_size > 0) weights.embed_in = plain("embed_in", hidden, table, false);
    if (config_.learned_positions > 0) {
      weights.embed_positions = plain("embed_positions", config_.learned_positions, hidden, false);
    }
    weights.embed_norm = norm("embed_norm", config_.embed_norm);
    for (int32_t i = 0; i < config_.num_layers; ++i) {
      weights.layers.push_back(layer(cat("layers.", i, '.'), config_.layer(i)));
    }
    weights.final_norm = norm("final_norm", config_.final_norm);
    if (config_.embed_size > 0) weights.embed_out = plain("embed_out", table, hidden, false);
    weights.lm_head =
        config_.tie_embeddings ? weights.embed : plain("lm_head", config_.vocab_size, table, config_.lm_head_bias);
    weights.bytes = used_;
    return weights;
  }

 private:
  std::byte* take(int64_t bytes) {
    std::byte* place = base_ ? base_ + used_ : nullptr;
    used_ += round_up(bytes, kAlignment);
    return place;
  }

  void fill(const std::string& name, const Linear& linear, Rows rows = Rows::kPlain, int32_t row = 0) {
    if (places_) (*places_)[name + ".weight"] = (*places_)[name + ".bias"] = {linear, rows, row, nullptr};
  }

  Linear room(const std::string& name, LinearShape shape) {
    shape.format = matrix_format(name + ".weight", format_);
    return {shape, take(backend_.linear_bytes(shape))};
  }

  Linear plain(const std::string& name, int32_t n, int32_t k, bool bias) {
    const Linear linear = room(name, {n, k, bias});
    fill(name, linear);
    return linear;
  }

  /// Gate and up of an MLP, or up alone.
  Linear mlp_in(const std::string& prefix, int32_t intermediate, bool bias) {
    LinearShape shape{intermediate, config_.hidden_size, bias, config_.gated};
    shape.activation = config_.activation;
    const Linear linear = room(prefix + "up", shape);
    if (config_.gated) fill(prefix + "gate", linear, Rows::kGate);
    fill(prefix + "up", linear, config_.gated ? Rows::kUp : Rows::kPlain);
    return linear;
  }

  float* vector(const std::string& name, int32_t n) {
    auto* place = reinterpret_cast<float*>(take(row_stride(n) * int64_t{sizeof(float)}));
    if (places_) (*places_)[name] = {{}, Rows::kPlain, 0, place};
    return place;
  }

  Norm norm(const std::string& name, bool present) {
    Norm result{nullptr, nullptr, config_.hidden_size, config_.norm_eps, config_.norm};
    if (!present) return result;
    result.weight = vector(name + ".weight", config_.hidden_size);
    if (config_.norm_bias) result.bias = vector(name + ".bias", config_.hidden_size);
    return result;
  }

  LayerWeights layer(const std::string& prefix, const LayerConfig& layer) {
    const bool before = config_.norm_place == NormPlace::kPre || config_.norm_place == NormPlace::kBoth;
    const bool after = config_.norm_place != NormPlace::kPre;
    LayerWeights weights;
    weights.attn_norm = norm(prefix + "attn_norm", before);
    attention(prefix + "attn.", weights);
    weights.attn_post_norm = norm(prefix + "attn_post_norm", after);
    weights.mlp_norm = norm(prefix + "mlp_norm", before && config_.parallel != Parallel::kShared);
    if (layer.moe) {
      weights.experts = experts(prefix + "moe.");
    } else {
      weights.up = mlp_in(prefix + "mlp.", config_.intermediate_size, config_.mlp_bias);
      weights.down = plain(prefix + "mlp.down", config_.hidden_size, config_.intermediate_size, config_.mlp_bias);
    }
    weights.mlp_post_norm = norm(prefix + "mlp_post_norm", after);
    return weights;
  }

  void attention(const std::string& prefix, LayerWeights& weights) {
    const int32_t queries = config_.num_heads * config_.head_dim;
    const int32_t keys = config_.num_kv_heads * config_.head_dim;
    weights.qkv = room(prefix + "q", {queries + 2 * keys, config_.hidden_size, config_.qkv_bias});
    fill(prefix + "q", weights.qkv);
    fill(prefix + "k", weights.qkv, Rows::kPlain, queries);
    fill(prefix + "v", weights.qkv, Rows::kPlain, queries + keys);
    if (config_.qk_norm != QkNorm::kNone) {
      weights.q_norm = vector(prefix + "q_norm.weight", queries);
      weights.k_norm = vector(prefix + "k_norm.weight", keys);
    }
    if (config_.attention_sinks) weights.sinks = vector(prefix + "sinks.weight", config_.num_heads);
    weights.o = plain(prefix + "o", config_.hidden_size, queries, config_.o_bias);
  }

  Experts experts(const std::string& prefix) {
    const MoeConfig& moe = config_.moe;
    const bool shared = moe.shared_intermediate_size > 0;
    Experts experts;
    experts.routing = {moe.experts, moe.top_k,      moe.scoring, moe.normalize, moe.scale,
                       moe.groups,  moe.top_groups, nullptr,     shared,        moe.shared_gate};
    experts.router =
        room(prefix + "router", {moe.experts + (moe.shared_gate ? 1 : 0), config_.hidden_size, moe.router_bias});
    fill(prefix + "router", experts.router);
    if (moe.shared_gate) fill(prefix + "shared_gate", experts.router, Rows::kPlain, moe.experts);
    if (moe.correction) experts.routing.correction = vector(prefix + "correction.weight", moe.experts);
    for (int32_t e = 0; e < moe.experts + (shared ? 1 : 0); ++e) {
      const int32_t width = e < moe.experts ? moe.intermediate_size : moe.shared_intermediate_size;
      const std::string name = cat(prefix, e, '.');
      experts.in.push_back(mlp_in(name, width, moe.expert_bias));
      experts.out.push_back(plain(name + "down", config_.hidden_size, width, moe.expert_bias));
    }
    return experts;
  }

  const ModelConfig& config_;
  WeightFormat format_;
  const Backend& backend_;
  std::byte* base_;
  WeightPlaces* places_;
  int64_t used_ = 0;
};

}  // namespace

DecoderWeights lay_out_weights(const ModelConfig& config, WeightFormat format, const Backend& backend, std::byte* base,
                               WeightPlaces* places) {
  return Layout(config, format, backend, base, places).build();
}

}  // namespace splitfuse
