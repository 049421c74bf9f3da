// The forward pass of every decoder-only family.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "model/weights.h"
#include "splitfuse/config.h"

namespace splitfuse {

/// A model's activations for the largest step.
struct Workspace {
  float* x = nullptr;        // [rows, hidden]: the residual stream
  float* y = nullptr;        // [rows, hidden or table]: what is to join it, where that takes a step of its own
  void* h = nullptr;         // [rows, hidden]: its normed copy
  void* t = nullptr;         // [rows, table], where embed_size is not 0: zeros lie behind its rows elsewhere
  float* qkv = nullptr;      // [rows, (heads + 2 kv_heads) * head_dim]
  void* q = nullptr;         // [rows, heads * head_dim]: rotated queries
  void* a = nullptr;         // [rows, heads * head_dim]: attention's output
  void* g = nullptr;         // [rows, intermediate]: the activation
  float* logits = nullptr;   // [logit_rows, vocab]
  int32_t logit_rows = 0;
  int64_t bytes = 0;
};

/// Places the activations at `base`; with base == nullptr it tells the bytes needed.
Workspace lay_out_workspace(const ModelConfig& config, DType dtype, const StepLimits& limits, std::byte* base);

/// How the attention of `config` looks to a backend. `max_context`: positions of the longest sequence. `weights`: of
/// the layers; null where only sizes matter.
AttentionShape attention_shape(const ModelConfig& config, const KvShape& kv, int32_t max_context,
                               const DecoderWeights* weights);

/// Runs a model on a backend. Weights and workspace outlive it.
class Decoder {
 public:
  Decoder(const ModelConfig& config, Backend& backend, const DecoderWeights& weights, const Workspace& workspace);

  /// Runs all layers over the batch's rows; writes their keys and values to the KV cache.
  void forward(const RaggedBatch& batch);
  /// Runs `layer` alone, for timing.
  void forward_layer(const RaggedBatch& batch, int32_t layer);
  /// Logits [rows.size(), vocab] f32, row stride row_stride(vocab), of these rows of the last forward(); at most
  /// max_logit_rows. Overwritten by the next call.
  float* logits(std::span<const int32_t> rows);

 private:
  void embed(const RaggedBatch& batch);
  void run_layer(const LayerWeights& layer, int32_t index, int32_t rows);
  void add_linear(const Linear& linear, const void* in, int32_t rows, const Norm& post_norm);
  void add(const float* y, const Norm& post_norm);

  const ModelConfig& config_;
  Backend& backend_;
  const DecoderWeights& weights_;
  Workspace work_;
  std::vector<int32_t> first_rows_;   // 0, 1, ...
};

}  // namespace splitfuse
