#include "base/check.h"
#include "splitfuse/weights.h"

namespace splitfuse {
namespace {

using Shapes = std::vector<std::pair<std::string, std::vector<int64_t>>>;

class ShapeList {
 public:
  explicit ShapeList(const ModelConfig& config) : config_(config) {}

  Shapes build() {
    const int64_t hidden = config_.hidden_size;
    const int64_t table = config_.table_size();
    linear("embed", config_.vocab_size, table, false);
    if (config_.embed_size > 0) linear("embed_in", hidden, table, false);
    if (config_.learned_positions > 0) linear("embed_positions", config_.learned_positions, hidden, false);
    if (config_.embed_norm) norm("embed_norm");
    for (int32_t i = 0; i < config_.num_layers; ++i) layer(cat("layers.", i, '.'), config_.layer(i));
    if (config_.final_norm) norm("final_norm");
    if (config_.embed_size > 0) linear("embed_out", table, hidden, false);
    if (!config_.tie_embeddings) linear("lm_head", config_.vocab_size, table, false);
    if (config_.lm_head_bias) shapes_.push_back({"lm_head.bias", {config_.vocab_size}});
    return std::move(shapes_);
  }

 private:
  void linear(const std::string& name, int64_t rows, int64_t columns, bool bias) {
    shapes_.push_back({name + ".weight", {rows, columns}});
    if (bias) shapes_.push_back({name + ".bias", {rows}});
  }
  void norm(const std::string& name) {
    shapes_.push_back({name + ".weight", {config_.hidden_size}});
    if (config_.norm_bias) shapes_.push_back({name + ".bias", {config_.hidden_size}});
  }
  /// gate, up and down of an MLP.
  void mlp(const std::string& name, int64_t intermediate, bool bias) {
    const int64_t hidden = config_.hidden_size;
    if (config_.gated) linear(name + "gate", intermediate, hidden, bias);
    linear(name + "up", intermediate, hidden, bias);
    linear(name + "down", hidden, intermediate, bias);
  }

  void layer(const std::string& prefix, const LayerConfig& layer) {
    const bool before = config_.norm_place == NormPlace::kPre || config_.norm_place == NormPlace::kBoth;
    const bool after = config_.norm_place != NormPlace::kPre;
    const int64_t hidden = config_.hidden_size;
    const int64_t queries = int64_t{config_.num_heads} * config_.head_dim;
    const int64_t keys = int64_t{config_.num_kv_heads} * config_.head_dim;
    if (before) norm(prefix + "attn_norm");
    linear(prefix + "attn.q", queries, hidden, config_.qkv_bias);
    linear(prefix + "attn.k", keys, hidden, config_.qkv_bias);
    linear(prefix + "attn.v", keys, hidden, config_.qkv_bias);
    if (config_.qk_norm != QkNorm::kNone) {
      shapes_.push_back({prefix + "attn.q_norm.weight", {queries}});
      shapes_.push_back({prefix + "attn.k_norm.weight", {keys}});
    }
    if (config_.attention_sinks) shapes_.push_back({prefix + "attn.sinks.weight", {config_.num_heads}});
    linear(prefix + "attn.o", hidden, queries, config_.o_bias);
    if (after) norm(prefix + "attn_post_norm");
    if (before && config_.parallel != Parallel::kShared) norm(prefix + "mlp_norm");
    layer.moe ? experts(prefix + "moe.") : mlp(prefix + "mlp.", config_.intermediate_size, config_.mlp_bias);
    if (after) norm(prefix + "mlp_post_norm");
  }

  void experts(const std::string& prefix) {
    const MoeConfig& moe = config_.moe;
    linear(prefix + "router", moe.experts, config_.hidden_size, moe.router_bias);
    if (moe.correction) shapes_.push_back({prefix + "correction.weight", {moe.experts}});
    if (moe.shared_gate) linear(prefix + "shared_gate", 1, config_.hidden_size, false);
    for (int32_t e = 0; e < moe.experts; ++e) mlp(cat(prefix, e, '.'), moe.intermediate_size, moe.expert_bias);
    if (moe.shared_intermediate_size > 0) {
      mlp(cat(prefix, moe.experts, '.'), moe.shared_intermediate_size, moe.expert_bias);
    }
  }

  const ModelConfig& config_;
  Shapes shapes_;
};

}  // namespace

Shapes weight_shapes(const ModelConfig& config) {
  validate(config);
  return ShapeList(config).build();
}

}  // namespace splitfuse
