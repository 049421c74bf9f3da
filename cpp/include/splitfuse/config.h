// What a model is, how an engine is set up, and how a sequence is sampled: plain data, no behaviour.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "splitfuse/types.h"

namespace splitfuse {

/// Rotary position embedding of the first 2 * inv_freq.size() dimensions of a head, half-split: dimension i of them
/// pairs with i + inv_freq.size(). Angles are position * inv_freq, in float32.
struct RopeConfig {
  std::vector<float> inv_freq;
  float magnitude = 1.0f;           // of cosines and sines
  /// Some models have other frequencies where sequences are long: those below hold in an engine whose longest
  /// sequence has more tokens than this. 0: there are none.
  int32_t long_from = 0;
  std::vector<float> long_inv_freq;   // as many
  float long_magnitude = 1.0f;

  bool operator==(const RopeConfig&) const = default;
};

/// inv_freq of the plain rotary embedding, theta^(-2i / dims), i = 0 .. dims / 2 - 1 (arXiv:2104.09864), rounded to
/// float32 step by step as the reference does: at position 8000 one ulp is 5e-4 in the angle. Throws ConfigError for a
/// theta not above 1, and dims outside 2 to 1024.
std::vector<float> rope_frequencies(float theta, int32_t dims);

/// Row norms. kRms: x / rms(x) * weight. kLayer: (x - mean(x)) / deviation(x) * weight + bias.
enum class NormKind : uint8_t { kRms, kLayer };
/// Where a layer's norms stand. kPre: before attention and MLP. kPost: after them, before what they give is added.
/// kBoth: before and after. kResidual: after it is added, on the sum.
enum class NormPlace : uint8_t { kPre, kPost, kBoth, kResidual };
/// Whether attention and MLP read the same sum: kNone, one after the other; kShared, also the same norm of it; kOwn,
/// each through its own norm.
enum class Parallel : uint8_t { kNone, kShared, kOwn };
/// Norms of queries and keys before they are rotated: over each head, or over the whole row.
enum class QkNorm : uint8_t { kNone, kHead, kRow };
/// A router's weights of experts from its logits. kSoftmax: softmax over all, then the largest. kTopSoftmax: the
/// largest, then softmax over them. kSigmoid: sigmoid of each, then the largest.
enum class Scoring : uint8_t { kSoftmax, kTopSoftmax, kSigmoid };

/// The words for these, in JSON and in Python: "rms", "layer"; "pre", "post", "both", "residual"; "none", "shared",
/// "own"; "none", "head", "row"; "none", "silu", "gelu", "gelu_tanh", "relu", "swiglu_clamped"; "softmax",
/// "top_softmax", "sigmoid".
const char* config_word(NormKind value);
const char* config_word(NormPlace value);
const char* config_word(Parallel value);
const char* config_word(QkNorm value);
const char* config_word(Activation value);
const char* config_word(Scoring value);
/// The inverse, for these types. Throws ConfigError, listing the words there are, for any other word.
template <class Enum>
Enum config_enum(const std::string& word);

/// What may differ from layer to layer.
struct LayerConfig {
  int32_t window = 0;   // a token sees itself and the window - 1 before it; 0: all before it
  int32_t rope = 0;     // index into ModelConfig::ropes; -1: no rotary embedding
  bool moe = false;     // its MLP is a mixture of experts

  bool operator==(const LayerConfig&) const = default;
};

/// The mixture of experts of some layers.
struct MoeConfig {
  int32_t experts = 0;              // 0: the model has none
  int32_t top_k = 0;                // experts of a token
  int32_t intermediate_size = 0;    // of an expert
  Scoring scoring = Scoring::kSoftmax;
  bool normalize = false;           // the chosen weights are divided by their sum
  float scale = 1.0f;               // of the chosen weights
  int32_t groups = 1;               // only experts of the top_groups best of these groups are chosen
  int32_t top_groups = 1;
  bool correction = false;          // a number per expert is added for the choice alone
  bool router_bias = false;
  bool expert_bias = false;
  int32_t shared_intermediate_size = 0;   // of an expert that every token has; 0: there is none
  bool shared_gate = false;         // its weight is the sigmoid of a router logit of its own; else 1

  bool operator==(const MoeConfig&) const = default;
};

/// A decoder-only transformer, free of family names. Filled by a family file (Python) or read from a
/// canonical checkpoint.
struct ModelConfig {
  std::string family = "llama";   // informative: which family file made this
  int32_t vocab_size = 0;
  int32_t hidden_size = 0;
  int32_t num_layers = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;           // a multiple of 8
  int32_t intermediate_size = 0;  // of layers without experts
  int32_t max_position = 0;       // longest sequence the model was made for, in tokens
  std::vector<RopeConfig> ropes;
  std::vector<LayerConfig> layers;   // [num_layers], or empty: all as a LayerConfig{}, without RoPE if there is none

  // The stream: what tokens become, and what layers add to it.
  int32_t embed_size = 0;         // of the embedding table, projected to hidden_size and back; 0: hidden_size
  float embed_scale = 1.0f;
  bool embed_norm = false;        // the stream begins with a norm
  int32_t learned_positions = 0;  // rows of a table of positions that is added; 0: there is none
  int32_t position_offset = 0;    // row of position 0
  NormKind norm = NormKind::kRms;
  NormPlace norm_place = NormPlace::kPre;
  bool norm_bias = false;         // kLayer alone
  bool final_norm = true;
  float norm_eps = 1e-5f;
  Parallel parallel = Parallel::kNone;   // kPre alone
  float residual_scale = 1.0f;    // of what attention and MLP add

  // Attention
  float attention_scale = 0.0f;   // of query-key products; 0: 1 / sqrt(head_dim)
  float attention_softcap = 0.0f;   // scores s become cap * tanh(s / cap); 0: they don't
  std::vector<float> alibi_slopes;  // [num_heads], of -(distance of query and key), added to scores; or none
  bool attention_sinks = false;   // a learned score per head takes part in the softmax, with nothing behind it
  QkNorm qk_norm = QkNorm::kNone;
  bool qkv_bias = false;
  bool o_bias = false;

  // MLP
  Activation activation = Activation::kSilu;
  bool gated = true;              // down(act(gate(x)) * up(x)); else down(act(up(x)))
  bool mlp_bias = false;          // gate, up and down have a bias
  MoeConfig moe;

  // Logits
  bool tie_embeddings = false;    // lm_head is the embedding table
  bool lm_head_bias = false;
  float logit_scale = 1.0f;
  float logit_softcap = 0.0f;     // after the scale; 0: none
  std::vector<Token> eos_token_ids;

  LayerConfig layer(int32_t index) const {
    if (layers.empty()) return {0, ropes.empty() ? -1 : 0, false};
    return layers[static_cast<size_t>(index)];
  }
  int32_t table_size() const { return embed_size > 0 ? embed_size : hidden_size; }

  bool operator==(const ModelConfig&) const = default;
};

/// Throws ConfigError, naming the field, if `config` is not a model that can be run.
void validate(const ModelConfig& config);
/// One JSON object; model_config_from_json is its inverse. Throws ConfigError, naming the field, on a number that is
/// not finite.
std::string to_json(const ModelConfig& config);
/// Throws ConfigError on malformed JSON, a missing or unknown field, a value out of range, or more than 1 MiB.
ModelConfig model_config_from_json(const std::string& text);

/// How an engine is set up. Every byte it will ever use is decided from this, in the constructor.
struct EngineConfig {
  std::string device = "cpu";
  DType dtype = DType::kBF16;     // weights and activations; accumulation is always float32
  WeightFormat quantize = WeightFormat::kDense;   // how the matrices are held
  KvDType kv_dtype = KvDType::kAuto;   // KV cache; kInt8 takes about half of bfloat16's bytes
  int32_t threads = 0;            // 0: the cores this process may use
  bool pin_threads = false;       // each thread but the caller's on a CPU of its own, of those this process may use
  std::string isa = "auto";       // "auto" or a rung of the ladder, as cpu_isas() names them
  int32_t token_budget = 0;       // tokens of one forward; 0: measured at start
  int32_t max_step_tokens = 0;    // the largest forward that step(plan) takes, never below the budget; what is more
                                  // than the longest sequence counts as that
  int32_t max_sequences = 256;    // sequences of one forward
  int32_t max_model_len = 0;      // longest sequence, prompt and output together; 0: what model and KV pool allow
  int32_t block_size = 32;        // tokens of one KV block, a multiple of 16
  int64_t kv_bytes = 0;           // size of the KV pool; 0: 1 GiB, or one longest sequence if that is more
  bool prefix_caching = true;
};

/// The cores this process may use: affinity mask and control-group quota, at least 1.
int usable_cores();
/// The rungs of the CPU's ISA ladder that this machine can run, lowest ("ref") first.
std::vector<std::string> cpu_isas();

/// How the next token of a sequence is chosen. Names and defaults are vLLM's. Logits pass, in this
/// order: penalties, logit_bias, min_tokens, temperature, min_p, top_k, top_p.
struct SamplingParams {
  int32_t max_tokens = 16;
  float temperature = 1.0f;       // 0: greedy
  float top_p = 1.0f;             // (0, 1]
  int32_t top_k = 0;              // 0: all
  float min_p = 0.0f;             // [0, 1]
  uint64_t seed = 0;              // the random stream is keyed by (seed, sample_index, position), nothing else
  int32_t sample_index = 0;       // which of n answers to the same prompt
  float repetition_penalty = 1.0f;   // > 0, over prompt and output
  float presence_penalty = 0.0f;     // [-2, 2], over output
  float frequency_penalty = 0.0f;    // [-2, 2], over output
  std::vector<std::pair<Token, float>> logit_bias;
  std::vector<Token> stop_token_ids;
  bool ignore_eos = false;
  int32_t min_tokens = 0;         // no EOS or stop token before this many
  int32_t logprobs = -1;          // top-n log-probabilities of each output token, -1: none, 0: the chosen one alone
  int32_t prompt_logprobs = -1;   // the same of each prompt token
};

/// Largest value of logprobs and prompt_logprobs.
inline constexpr int32_t kMaxLogprobs = 20;

}  // namespace splitfuse
