#include "model/weights.h"

#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include "base/check.h"
#include "base/integer_rows.h"
#include "model/checkpoint_layout.h"
#include "model/safetensors.h"

namespace splitfuse {
namespace {

constexpr int64_t kAlignment = 64;   // a cache line
constexpr int64_t kSlabBytes = 8 << 20;
constexpr int64_t kSlabRows = 96;   // whole panels of 16, 32 or 48 rows

class Placer {
 public:
  Placer(const Backend& backend, std::byte* base) : backend_(backend), base_(base) {}

  Linear linear(WeightFormat format, int32_t n, int32_t k, bool bias, bool gated = false) {
    const LinearShape shape{n, k, bias, gated, format};
    return {shape, take(backend_.linear_bytes(shape))};
  }
  float* vector(int32_t n) { return reinterpret_cast<float*>(take(row_stride(n) * int64_t{sizeof(float)})); }
  int64_t bytes() const { return used_; }

 private:
  std::byte* take(int64_t bytes) {
    std::byte* place = base_ ? base_ + used_ : nullptr;
    used_ += round_up(bytes, kAlignment);
    return place;
  }
  const Backend& backend_;
  std::byte* base_;
  int64_t used_ = 0;
};

/// Where one tensor goes.
class TensorLoader {
 public:
  TensorLoader(const ModelConfig& config, Backend& backend, WeightSource& source, const DecoderWeights& weights)
      : config_(config), backend_(backend), source_(source), weights_(weights) {}

  void load(const std::string& name, const TensorView& tensor) {
    if (name == "embed.weight") return pack(weights_.embed, Rows::kPlain, 0, tensor);
    if (name == "lm_head.weight") return pack(weights_.lm_head, Rows::kPlain, 0, tensor);
    if (name == "final_norm.weight") return backend_.upload(tensor, weights_.final_norm);
    // "layers.N.part"
    const size_t dot = name.find('.', 7);
    const LayerWeights& layer = weights_.layers[std::stoul(name.substr(7, dot - 7))];
    load_part(layer, name.substr(dot + 1), tensor);
  }

 private:
  void load_part(const LayerWeights& layer, const std::string& part, const TensorView& tensor) {
    const int32_t q_rows = config_.num_heads * config_.head_dim;
    const int32_t kv_rows = config_.num_kv_heads * config_.head_dim;
    if (part == "attn_norm.weight") return backend_.upload(tensor, layer.attn_norm);
    if (part == "mlp_norm.weight") return backend_.upload(tensor, layer.mlp_norm);
    const std::string matrix = part.substr(0, part.rfind('.'));
    const bool bias = part.ends_with(".bias");
    const auto put = [&](const Linear& linear, Rows which, int32_t row) {
      bias ? backend_.pack_bias(linear, which, row, tensor) : pack(linear, which, row, tensor);
    };
    if (matrix == "attn.q") return put(layer.qkv, Rows::kPlain, 0);
    if (matrix == "attn.k") return put(layer.qkv, Rows::kPlain, q_rows);
    if (matrix == "attn.v") return put(layer.qkv, Rows::kPlain, q_rows + kv_rows);
    if (matrix == "attn.o") return put(layer.o, Rows::kPlain, 0);
    if (matrix == "mlp.gate") return put(layer.gate_up, Rows::kGate, 0);
    if (matrix == "mlp.up") return put(layer.gate_up, Rows::kUp, 0);
    SPLITFUSE_ASSERT(matrix == "mlp.down");
    put(layer.down, Rows::kPlain, 0);
  }

  /// In slabs of rows, each given back once it is packed: an embedding table is never wholly in memory twice.
  void pack(const Linear& linear, Rows which, int32_t row, const TensorView& tensor) {
    const int64_t bytes = row_bytes(tensor.format, tensor.dtype, tensor.shape[1]);
    const int64_t slab = round_up(ceil_div(kSlabBytes, bytes), kSlabRows);
    for (int64_t first = 0; first < tensor.shape[0]; first += slab) {
      const int64_t rows = std::min(slab, tensor.shape[0] - first);
      backend_.pack(linear, which, row + static_cast<int32_t>(first), row_range(tensor, first, rows));
      source_.consumed((first + rows) * bytes);
    }
  }

  const ModelConfig& config_;
  Backend& backend_;
  WeightSource& source_;
  const DecoderWeights& weights_;
};

}  // namespace

DecoderWeights lay_out_weights(const ModelConfig& config, WeightFormat format, const Backend& backend,
                               std::byte* base) {
  const WeightFormat table = matrix_format("embed.weight", format);
  const int32_t hidden = config.hidden_size;
  const int32_t heads_dim = config.num_heads * config.head_dim;
  const int32_t qkv_dim = heads_dim + 2 * config.num_kv_heads * config.head_dim;
  Placer place(backend, base);
  DecoderWeights weights;
  weights.embed = place.linear(table, config.vocab_size, hidden, false);
  for (int32_t i = 0; i < config.num_layers; ++i) {
    LayerWeights layer;
    layer.attn_norm = place.vector(hidden);
    layer.qkv = place.linear(format, qkv_dim, hidden, config.attention_bias);
    layer.o = place.linear(format, hidden, heads_dim, config.attention_bias);
    layer.mlp_norm = place.vector(hidden);
    layer.gate_up = place.linear(format, config.intermediate_size, hidden, config.mlp_bias, true);
    layer.down = place.linear(format, hidden, config.intermediate_size, config.mlp_bias);
    weights.layers.push_back(layer);
  }
  weights.final_norm = place.vector(hidden);
  weights.lm_head = config.tie_embeddings ? weights.embed : place.linear(table, config.vocab_size, hidden, false);
  weights.bytes = place.bytes();
  return weights;
}

void load_weights(const ModelConfig& config, Backend& backend, WeightSource& source, const DecoderWeights& weights,
                  const ProgressFn& progress) {
  const auto wanted = weight_shapes(config);
  const auto names = source.names();
  const std::set<std::string> present(names.begin(), names.end());
  int64_t total = 0;
  for (const auto& [name, shape] : wanted) {
    if (!present.contains(name)) {
      throw CheckpointError(cat("the checkpoint has no tensor for ", name, " ", shape_text(shape)));
    }
    int64_t elements = 1;
    for (int64_t extent : shape) elements *= extent;
    total += elements;
  }
  TensorLoader loader(config, backend, source, weights);
  int64_t done = 0;
  for (const auto& [name, shape] : wanted) {
    const TensorView tensor = source.read(name);
    if (tensor.shape != shape) {
      throw CheckpointError(cat("tensor ", name, " has shape ", shape_text(tensor.shape),
                                ", the configuration asks for ", shape_text(shape)));
    }
    loader.load(name, tensor);
    source.release();
    int64_t elements = 1;
    for (int64_t extent : shape) elements *= extent;
    done += elements;
    if (progress) progress(done, total);
  }
}

}  // namespace splitfuse
