#include "model/decoder.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/check.h"

namespace splitfuse {
namespace {

Norm as_is(int32_t columns) {
  Norm norm;
  norm.columns = columns;
  return norm;
}

}  // namespace

Decoder::Decoder(const ModelConfig& config, Backend& backend, const DecoderWeights& weights, const Workspace& workspace)
    : config_(config), backend_(backend), weights_(weights), work_(workspace), first_rows_(workspace.logit_rows) {
  std::iota(first_rows_.begin(), first_rows_.end(), 0);
}

void Decoder::forward(const RaggedBatch& batch) {
  embed(batch);
  for (int32_t layer = 0; layer < config_.num_layers; ++layer) run_layer(weights_.layers[layer], layer, batch.rows());
}

void Decoder::embed(const RaggedBatch& batch) {
  backend_.begin(batch);
  if (weights_.embed_in.data == nullptr) {
    backend_.embed(weights_.embed, config_.embed_scale, work_.x);
  } else {
    backend_.embed(weights_.embed, config_.embed_scale, work_.y);
    backend_.norm(as_is(config_.table_size()), work_.y, {}, work_.t);
    backend_.linear(weights_.embed_in, work_.t, batch.rows(), work_.x);
  }
  if (weights_.embed_positions.data != nullptr) {
    backend_.embed_positions(weights_.embed_positions, config_.position_offset, work_.x);
  }
  if (weights_.embed_norm.weight != nullptr) backend_.norm_in_place(weights_.embed_norm, work_.x);
}

void Decoder::run_layer(const LayerWeights& layer, int32_t index, int32_t rows) {
  backend_.norm(layer.attn_norm, work_.x, {}, work_.h);
  backend_.linear(layer.qkv, work_.h, rows, work_.qkv);
  backend_.rope_write_kv(work_.qkv, index, work_.q);
  backend_.attention(work_.q, index, work_.a);
  // A parallel MLP reads the stream as attention did: before attention's result joins it.
  if (config_.parallel == Parallel::kOwn) backend_.norm(layer.mlp_norm, work_.x, {}, work_.h);
  add_linear(layer.o, work_.a, rows, layer.attn_post_norm);
  if (config_.parallel == Parallel::kNone) backend_.norm(layer.mlp_norm, work_.x, {}, work_.h);
  if (layer.moe()) {
    backend_.experts(layer.experts, work_.h, rows, work_.y);
    add(work_.y, layer.mlp_post_norm);
  } else {
    backend_.linear_act(layer.up, work_.h, rows, work_.g);
    add_linear(layer.down, work_.g, rows, layer.mlp_post_norm);
  }
}

/// The stream += in W^T, as the family adds it.
void Decoder::add_linear(const Linear& linear, const void* in, int32_t rows, const Norm& post_norm) {
  const bool after = config_.norm_place == NormPlace::kResidual;
  if (config_.residual_scale == 1.0f && (after || post_norm.weight == nullptr)) {
    backend_.linear_add(linear, in, rows, work_.x);
    if (after) backend_.norm_in_place(post_norm, work_.x);
  } else {
    backend_.linear(linear, in, rows, work_.y);
    add(work_.y, post_norm);
  }
}

void Decoder::add(const float* y, const Norm& post_norm) {
  if (config_.norm_place == NormPlace::kResidual) {
    backend_.add(as_is(config_.hidden_size), y, config_.residual_scale, work_.x);
    backend_.norm_in_place(post_norm, work_.x);
  } else {
    backend_.add(post_norm, y, config_.residual_scale, work_.x);
  }
}

float* Decoder::logits(std::span<const int32_t> rows) {
  const auto count = static_cast<int32_t>(rows.size());
  const void* in = work_.h;
  backend_.norm(weights_.final_norm, work_.x, rows, work_.h);
  if (weights_.embed_out.data != nullptr) {
    backend_.linear(weights_.embed_out, work_.h, count, work_.y);
    backend_.norm(as_is(config_.table_size()), work_.y, std::span(first_rows_).first(rows.size()), work_.t);
    in = work_.t;
  }
  backend_.linear(weights_.lm_head, in, count, work_.logits);
  if (config_.logit_scale != 1.0f || config_.logit_softcap != 0.0f) {
    backend_.scale_logits(work_.logits, count, config_.logit_scale, config_.logit_softcap);
  }
  return work_.logits;
}

void Decoder::forward_layer(const RaggedBatch& batch, int32_t layer) {
  embed(batch);
  run_layer(weights_.layers[layer], layer, batch.rows());
}

Workspace lay_out_workspace(const ModelConfig& config, DType dtype, const StepLimits& limits, std::byte* base) {
  const int64_t heads_dim = int64_t{config.num_heads} * config.head_dim;
  const int64_t qkv_dim = heads_dim + 2 * int64_t{config.num_kv_heads} * config.head_dim;
  const int64_t stream = std::max(config.hidden_size, config.table_size());
  const bool apart = config.norm_place != NormPlace::kPre || config.residual_scale != 1.0f || config.moe.experts > 0 ||
                     config.embed_size > 0;
  const int64_t act = dtype_size(dtype);
  Workspace work;
  const auto take = [&](int64_t rows, int64_t columns, int64_t element) -> std::byte* {
    std::byte* place = base ? base + work.bytes : nullptr;
    work.bytes += round_up<int64_t>(rows * row_stride(columns) * element, 64);
    return place;
  };
  work.x = reinterpret_cast<float*>(take(limits.max_rows, config.hidden_size, 4));
  if (apart) work.y = reinterpret_cast<float*>(take(limits.max_rows, stream, 4));
  work.h = take(limits.max_rows, config.hidden_size, act);
  if (config.embed_size > 0) work.t = take(limits.max_rows, config.table_size(), act);
  work.qkv = reinterpret_cast<float*>(take(limits.max_rows, qkv_dim, 4));
  work.q = take(limits.max_rows, heads_dim, act);
  work.a = take(limits.max_rows, heads_dim, act);
  work.g = take(limits.max_rows, config.intermediate_size, act);
  work.logits = reinterpret_cast<float*>(take(limits.max_logit_rows, config.vocab_size, 4));
  work.logit_rows = limits.max_logit_rows;
  return work;
}

AttentionShape attention_shape(const ModelConfig& config, const KvShape& kv, int32_t max_context,
                               const DecoderWeights* weights) {
  AttentionShape shape;
  shape.kv = kv;
  shape.heads = config.num_heads;
  shape.scale =
      config.attention_scale > 0.0f ? config.attention_scale : 1.0f / std::sqrt(static_cast<float>(config.head_dim));
  shape.softcap = config.attention_softcap;
  shape.alibi_slopes = config.alibi_slopes;
  for (const RopeConfig& rope : config.ropes) {
    const bool far = rope.long_from > 0 && max_context > rope.long_from;
    shape.ropes.push_back(far ? AttentionShape::Rope{rope.long_inv_freq, rope.long_magnitude}
                              : AttentionShape::Rope{rope.inv_freq, rope.magnitude});
  }
  shape.qk_norm_kind = config.norm;
  shape.qk_norm_eps = config.norm_eps;
  for (int32_t i = 0; i < config.num_layers; ++i) {
    const LayerConfig layer = config.layer(i);
    AttentionLayer attention{layer.window, layer.rope, config.qk_norm, nullptr, nullptr, nullptr};
    if (weights) {
      attention.q_norm = weights->layers[i].q_norm;
      attention.k_norm = weights->layers[i].k_norm;
      attention.sinks = weights->layers[i].sinks;
    }
    shape.layers.push_back(attention);
  }
  return shape;
}

}  // namespace splitfuse
