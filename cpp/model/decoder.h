// The forward pass of every decoder-only family.
#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "model/weights.h"
#include "splitfuse/config.h"

namespace splitfuse {

/// A model's activations for the largest step.
struct Workspace {
  float* x = nullptr;        // [rows, hidden]: the residual stream
  void* h = nullptr;         // [rows, hidden]: its normed copy
  float* qkv = nullptr;      // [rows, (heads + 2 kv_heads) * head_dim]
  void* q = nullptr;         // [rows, heads * head_dim]: rotated queries
  void* a = nullptr;         // [rows, heads * head_dim]: attention's output
  void* g = nullptr;         // [rows, intermediate]: the gated activation
  float* logits = nullptr;   // [max_logit_rows, vocab]
  int64_t bytes = 0;
};

/// Places the activations at `base`; with base == nullptr it tells the bytes needed.
Workspace lay_out_workspace(const ModelConfig& config, DType dtype, const StepLimits& limits, std::byte* base);

/// How the attention of `config` looks to a backend, over a KV cache of `blocks` blocks.
AttentionShape attention_shape(const ModelConfig& config, const EngineConfig& engine, int32_t blocks);

/// Runs a model on a backend. Holds views alone: of weights and workspace that outlive it.
class Decoder {
 public:
  Decoder(const ModelConfig& config, Backend& backend, const DecoderWeights& weights, const Workspace& workspace)
      : config_(config), backend_(backend), weights_(weights), work_(workspace) {}

  /// Runs all layers over the batch's rows; writes their keys and values to the KV cache.
  void forward(const RaggedBatch& batch);
  /// Runs `layer` alone, for timing.
  void forward_layer(const RaggedBatch& batch, int32_t layer);
  /// Logits [rows.size(), vocab] f32, row stride row_stride(vocab), of these rows of the last forward(); at most
  /// max_logit_rows. Overwritten by the next call.
  float* logits(std::span<const int32_t> rows);

 private:
  void run_layer(int32_t index, int32_t rows);

  const ModelConfig& config_;
  Backend& backend_;
  const DecoderWeights& weights_;
  Workspace work_;
};

}  // namespace splitfuse
