#include "base/check.h"
#include "splitfuse/weights.h"

namespace splitfuse {

std::vector<std::pair<std::string, std::vector<int64_t>>> weight_shapes(const ModelConfig& config) {
  validate(config);
  std::vector<std::pair<std::string, std::vector<int64_t>>> shapes;
  const auto linear = [&](const std::string& name, int64_t rows, int64_t columns, bool bias) {
    shapes.push_back({name + ".weight", {rows, columns}});
    if (bias) shapes.push_back({name + ".bias", {rows}});
  };
  const int64_t hidden = config.hidden_size;
  const int64_t queries = int64_t{config.num_heads} * config.head_dim;
  const int64_t keys = int64_t{config.num_kv_heads} * config.head_dim;

  linear("embed", config.vocab_size, hidden, false);
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    const std::string prefix = cat("layers.", layer, '.');
    shapes.push_back({prefix + "attn_norm.weight", {hidden}});
    linear(prefix + "attn.q", queries, hidden, config.attention_bias);
    linear(prefix + "attn.k", keys, hidden, config.attention_bias);
    linear(prefix + "attn.v", keys, hidden, config.attention_bias);
    linear(prefix + "attn.o", hidden, queries, config.attention_bias);
    shapes.push_back({prefix + "mlp_norm.weight", {hidden}});
    linear(prefix + "mlp.gate", config.intermediate_size, hidden, config.mlp_bias);
    linear(prefix + "mlp.up", config.intermediate_size, hidden, config.mlp_bias);
    linear(prefix + "mlp.down", hidden, config.intermediate_size, config.mlp_bias);
  }
  shapes.push_back({"final_norm.weight", {hidden}});
  if (!config.tie_embeddings) linear("lm_head", config.vocab_size, hidden, false);
  return shapes;
}

}  // namespace splitfuse
