// A model's weights in the device's packed form.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "backend/backend.h"
#include "splitfuse/config.h"
#include "splitfuse/weights.h"

namespace splitfuse {

struct LayerWeights {
  Norm attn_norm;        // without a weight where there is none; so are the others
  Linear qkv;            // [(heads + 2 kv_heads) * head_dim, hidden]
  float* q_norm = nullptr;   // [heads * head_dim], or none
  float* k_norm = nullptr;   // [kv_heads * head_dim], or none
  float* sinks = nullptr;    // [heads], or none
  Linear o;              // [hidden, heads * head_dim]
  Norm attn_post_norm;
  Norm mlp_norm;
  Linear up;             // [intermediate, hidden], gated if the MLP is
  Linear down;           // [hidden, intermediate]
  Experts experts;       // in the place of up and down where it has any
  Norm mlp_post_norm;

  bool moe() const { return !experts.in.empty(); }
};

struct DecoderWeights {
  Linear embed;          // [vocab, table]
  Linear embed_in;       // [hidden, table], where embed_size is not 0
  Linear embed_positions;   // [positions, hidden], or none
  Norm embed_norm;
  std::vector<LayerWeights> layers;
  Norm final_norm;
  Linear embed_out;      // [table, hidden], where embed_size is not 0
  Linear lm_head;        // [vocab, table]; `embed` itself if tied
  int64_t bytes = 0;
};

/// Where a tensor goes: into rows of a linear layer, from `row` on, or into a vector.
struct WeightPlace {
  Linear linear;
  Rows rows = Rows::kPlain;
  int32_t row = 0;
  float* vector = nullptr;
};
using WeightPlaces = std::unordered_map<std::string, WeightPlace>;   // by canonical name

/// Places every weight in one stretch of device memory that begins at `base`; with base == nullptr it tells
/// the bytes needed. `format`: of the matrices. `places`: takes where each tensor goes.
DecoderWeights lay_out_weights(const ModelConfig& config, WeightFormat format, const Backend& backend, std::byte* base,
                               WeightPlaces* places = nullptr);

/// Reads and packs every weight into its place, one tensor at a time. Throws CheckpointError if one is missing,
/// before reading any, or has another shape than the configuration asks for.
void load_weights(const ModelConfig& config, Backend& backend, WeightSource& source, const WeightPlaces& places,
                  const ProgressFn& progress);

}  // namespace splitfuse
