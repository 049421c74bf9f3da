// A model's weights in the device's packed form.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "splitfuse/config.h"
#include "splitfuse/weights.h"

namespace splitfuse {

struct LayerWeights {
  float* attn_norm = nullptr;   // [hidden]
  Linear qkv;                   // [(heads + 2 kv_heads) * head_dim, hidden]
  Linear o;                     // [hidden, heads * head_dim]
  float* mlp_norm = nullptr;    // [hidden]
  Linear gate_up;               // gated [intermediate, hidden]
  Linear down;                  // [hidden, intermediate]
};

struct DecoderWeights {
  Linear embed;                 // [vocab, hidden]
  std::vector<LayerWeights> layers;
  float* final_norm = nullptr;  // [hidden]
  Linear lm_head;               // [vocab, hidden]; `embed` itself if tied
  int64_t bytes = 0;
};

/// Places every weight in one stretch of device memory that begins at `base`; with base == nullptr it tells
/// the bytes needed. `format`: of the matrices.
DecoderWeights lay_out_weights(const ModelConfig& config, WeightFormat format, const Backend& backend, std::byte* base);

/// Reads and packs every weight into its place, one tensor at a time. Throws CheckpointError if one is missing,
/// before reading any, or has another shape than the configuration asks for.
void load_weights(const ModelConfig& config, Backend& backend, WeightSource& source, const DecoderWeights& weights,
                  const ProgressFn& progress);

}  // namespace splitfuse
