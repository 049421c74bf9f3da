// Where weights come from. The library reads tensors by canonical name, one at a time:
//
//   embed.weight [vocab, table]        table is embed_size, or hidden if that is 0
//   embed_in.weight [hidden, table]    embed_out.weight [table, hidden]     where embed_size is not 0
//   embed_positions.weight [learned_positions, hidden]
//   embed_norm [hidden]                final_norm [hidden]
//   lm_head.weight [vocab, table], .bias
//   layers.N.attn_norm, .attn_post_norm, .mlp_norm, .mlp_post_norm [hidden]
//   layers.N.attn.q [heads * head_dim, hidden]      .attn.k, .attn.v [kv_heads * head_dim, hidden]
//   layers.N.attn.q_norm.weight [heads * head_dim]  .attn.k_norm.weight [kv_heads * head_dim]
//   layers.N.attn.sinks.weight [heads]              .attn.o [hidden, heads * head_dim]
//   layers.N.mlp.gate, .mlp.up [intermediate, hidden]    .mlp.down [hidden, intermediate]
//   layers.N.moe.router [experts, hidden]   .moe.correction.weight [experts]   .moe.shared_gate.weight [1, hidden]
//   layers.N.moe.E.gate, .up, .down         as an MLP's, E = experts for the shared one
//
// Norms and linear layers have a .weight, and a .bias where ModelConfig says so; weight_shapes() lists what a model
// needs. Query and key rows are in the half-split RoPE order (dimension i of those rotated pairs with i + half).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "splitfuse/config.h"
#include "splitfuse/types.h"

namespace splitfuse {

/// Neighbours along k that share a scale (and a minimum in kInt4).
inline constexpr int32_t kWeightGroup = 32;

/// A tensor as it lies in memory: row-major, little-endian. A matrix [n, k] may be given as integers:
///   kInt8   data [n, k] of int8, scales [n, groups]                        weight = scale * code
///   kInt4   data [n, groups, 16] of bytes, groups = ceil(k / 32), the group's first 16 codes in their low halves and
///           the other 16 in the high ones; scales, minima [n, groups]      weight = scale * code + minimum
/// Scales and minima are float32 or float16 and may begin at any byte.
struct TensorView {
  DType dtype = DType::kF32;   // of data, or of scales and minima
  std::vector<int64_t> shape;
  const void* data = nullptr;
  WeightFormat format = WeightFormat::kDense;
  const void* scales = nullptr;
  const void* minima = nullptr;
};

/// What a matrix [n, k] of integers stands for, as f32 [n, k].
void dequantize(const TensorView& matrix, float* out);

/// Hands out tensors by canonical name. Used by one thread, while an Engine is being constructed.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  /// Every canonical name this source can give.
  virtual std::vector<std::string> names() const = 0;
  /// What most of the matrices are stored as, or as near to it as EngineConfig::quantize comes.
  virtual WeightFormat format() const { return WeightFormat::kDense; }
  /// The tensor; its data stays valid until the next call of read() or release(). Throws
  /// CheckpointError if there is none of that name.
  virtual TensorView read(const std::string& name) = 0;
  /// Of the last read(), the first `bytes` were used and their memory may be dropped. A hint, so that a tensor
  /// as large as an embedding table is never wholly in memory twice.
  virtual void consumed(int64_t /*bytes*/) {}
  /// Memory behind the last read() may be dropped.
  virtual void release() {}
};

/// Reads safetensors files, mapped, one tensor at a time. `files`: paths of all shards. `names`:
/// (canonical name, name in the files); tensors of the files that are not named are left alone.
/// Throws CheckpointError on a missing, truncated or corrupt file, overlapping tensors, a name in
/// two shards, a named tensor that is absent, or a dtype that is not float32, bfloat16 or float16.
std::unique_ptr<WeightSource> open_safetensors(const std::vector<std::string>& files,
                                               const std::vector<std::pair<std::string, std::string>>& names);

/// What one safetensors file says of itself, tensors not read.
struct SafetensorsHeader {
  struct Tensor {
    std::string name;
    std::string dtype;   // as written: "F32", "BF16", "I64", ...
    std::vector<int64_t> shape;
    int64_t begin = 0;   // byte of the file where its data begin
  };
  std::vector<Tensor> tensors;   // in the order of their data
  std::vector<std::pair<std::string, std::string>> metadata;
};
/// Throws CheckpointError as open_safetensors does.
SafetensorsHeader read_safetensors_header(const std::string& file);

/// A canonical checkpoint: what `splitfuse convert` writes and C++ opens alone. Integer matrices can be run in any
/// format; weights->format() is their own, which costs no further loss.
struct Checkpoint {
  ModelConfig config;
  std::unique_ptr<WeightSource> weights;
};
/// `path`: a canonical safetensors file, or the directory that `splitfuse convert` wrote. Throws
/// CheckpointError or ConfigError.
Checkpoint open_checkpoint(const std::string& path);

/// Long work reports (bytes done, bytes in all).
using ProgressFn = std::function<void(int64_t done, int64_t total)>;

/// Writes every tensor that `config` needs as a canonical checkpoint at `file`, converted to `dtype`, one
/// tensor at a time; the file appears whole or not at all. `quantize`: the matrices become integers, the same ones
/// as in an engine of that EngineConfig::quantize. Throws CheckpointError, with the reason, if a tensor is missing or
/// misshapen, holds what the format can't, or the file cannot be written.
void write_checkpoint(const ModelConfig& config, WeightSource& weights, DType dtype, const std::string& file,
                      const ProgressFn& progress = {}, WeightFormat quantize = WeightFormat::kDense);

/// Every (canonical name, shape) that a model of this configuration needs, in loading order.
std::vector<std::pair<std::string, std::vector<int64_t>>> weight_shapes(const ModelConfig& config);

}  // namespace splitfuse
