#include "model/decoder.h"

#include <cmath>

#include "base/check.h"
#include "model/rope.h"

namespace splitfuse {

void Decoder::forward(const RaggedBatch& batch) {
  backend_.begin(batch);
  backend_.embed(weights_.embed, work_.x);
  for (int32_t layer = 0; layer < config_.num_layers; ++layer) run_layer(layer, batch.rows());
}

void Decoder::run_layer(int32_t index, int32_t rows) {
  const LayerWeights& layer = weights_.layers[index];
  const int32_t hidden = config_.hidden_size;
  backend_.rms_norm(work_.x, layer.attn_norm, config_.norm_eps, hidden, {}, work_.h);
  backend_.linear(layer.qkv, work_.h, rows, work_.qkv);
  backend_.rope_write_kv(work_.qkv, index, work_.q);
  backend_.attention(work_.q, index, work_.a);
  backend_.linear_add(layer.o, work_.a, rows, work_.x);
  backend_.rms_norm(work_.x, layer.mlp_norm, config_.norm_eps, hidden, {}, work_.h);
  backend_.linear_gated(layer.gate_up, work_.h, rows, work_.g);
  backend_.linear_add(layer.down, work_.g, rows, work_.x);
}

float* Decoder::logits(std::span<const int32_t> rows) {
  backend_.rms_norm(work_.x, weights_.final_norm, config_.norm_eps, config_.hidden_size, rows, work_.h);
  backend_.linear(weights_.lm_head, work_.h, static_cast<int32_t>(rows.size()), work_.logits);
  return work_.logits;
}

void Decoder::forward_layer(const RaggedBatch& batch, int32_t layer) {
  backend_.begin(batch);
  backend_.embed(weights_.embed, work_.x);
  run_layer(layer, batch.rows());
}

Workspace lay_out_workspace(const ModelConfig& config, DType dtype, const StepLimits& limits, std::byte* base) {
  const int64_t heads_dim = int64_t{config.num_heads} * config.head_dim;
  const int64_t qkv_dim = heads_dim + 2 * int64_t{config.num_kv_heads} * config.head_dim;
  const int64_t act = dtype_size(dtype);
  Workspace work;
  const auto take = [&](int64_t rows, int64_t columns, int64_t element) -> std::byte* {
    std::byte* place = base ? base + work.bytes : nullptr;
    work.bytes += round_up<int64_t>(rows * row_stride(columns) * element, 64);
    return place;
  };
  work.x = reinterpret_cast<float*>(take(limits.max_rows, config.hidden_size, 4));
  work.h = take(limits.max_rows, config.hidden_size, act);
  work.qkv = reinterpret_cast<float*>(take(limits.max_rows, qkv_dim, 4));
  work.q = take(limits.max_rows, heads_dim, act);
  work.a = take(limits.max_rows, heads_dim, act);
  work.g = take(limits.max_rows, config.intermediate_size, act);
  work.logits = reinterpret_cast<float*>(take(limits.max_logit_rows, config.vocab_size, 4));
  return work;
}

AttentionShape attention_shape(const ModelConfig& config, const EngineConfig& engine, int32_t blocks) {
  AttentionShape shape;
  shape.kv = {config.num_layers, config.num_kv_heads, config.head_dim, engine.block_size, blocks, engine.kv_dtype};
  shape.heads = config.num_heads;
  shape.scale = 1.0f / std::sqrt(static_cast<float>(config.head_dim));
  shape.inv_freq = rope_inv_freq(config.rope, config.head_dim);
  return shape;
}

}  // namespace splitfuse
