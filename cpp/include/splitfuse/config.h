// What a model is, how an engine is set up, and how a sequence is sampled: plain data, no behaviour.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "splitfuse/types.h"

namespace splitfuse {

/// Rotary position embedding. Angles are position * inv_freq, in float32.
struct RopeConfig {
  /// How inverse frequencies are rescaled: "none", "linear" (divide by factor), or "llama3"
  /// (Llama 3.1: divide the low frequencies, blend a middle band).
  std::string scaling = "none";
  float theta = 10000.0f;
  float factor = 1.0f;
  float low_freq_factor = 1.0f;          // llama3
  float high_freq_factor = 4.0f;         // llama3
  int32_t original_max_position = 8192;  // llama3

  bool operator==(const RopeConfig&) const = default;
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
  int32_t intermediate_size = 0;
  int32_t max_position = 0;       // longest sequence the model was made for, in tokens
  float norm_eps = 1e-5f;
  bool tie_embeddings = false;    // lm_head is the embedding table
  bool attention_bias = false;    // q, k, v and o have a bias
  bool mlp_bias = false;          // gate, up and down have a bias
  RopeConfig rope;
  std::vector<Token> eos_token_ids;

  bool operator==(const ModelConfig&) const = default;
};

/// Throws ConfigError, naming the field, if `config` is not a model that can be run.
void validate(const ModelConfig& config);
/// One JSON object; model_config_from_json is its inverse.
std::string to_json(const ModelConfig& config);
/// Throws ConfigError on malformed JSON, a missing or unknown field, or a value out of range.
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
