// A tiny random model for the C++ tests: no files, the same numbers in every run.
#pragma once

#include <cmath>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "splitfuse/splitfuse.h"

namespace splitfuse {

inline ModelConfig tiny_model() {
  ModelConfig config;
  config.vocab_size = 97;
  config.hidden_size = 48;
  config.num_layers = 2;
  config.num_heads = 6;
  config.num_kv_heads = 2;
  config.head_dim = 8;
  config.intermediate_size = 80;
  config.max_position = 1024;
  config.ropes.resize(1);
  config.ropes[0].inv_freq = rope_frequencies(1e4f, config.head_dim);
  return config;
}

/// Weights drawn from each tensor's name; counts what it was asked for.
class RandomWeights : public WeightSource {
 public:
  explicit RandomWeights(const ModelConfig& config) {
    for (auto& [name, shape] : weight_shapes(config)) shapes[name] = shape;
  }
  std::vector<std::string> names() const override {
    std::vector<std::string> result;
    for (const auto& [name, shape] : shapes) result.push_back(name);
    return result;
  }
  TensorView read(const std::string& name) override {
    ++reads;
    const auto at = shapes.find(name);
    if (at == shapes.end()) throw CheckpointError("there is no tensor " + name);
    int64_t count = 1;
    for (int64_t extent : at->second) count *= extent;
    std::mt19937 random(static_cast<uint32_t>(std::hash<std::string>()(name)));
    values_.resize(static_cast<size_t>(count));
    // Matrices keep a signal's size; norms are near one.
    const bool matrix = at->second.size() > 1;
    const float scale = matrix ? 2.0f / std::sqrt(static_cast<float>(at->second[1])) : 0.2f;
    for (float& value : values_) {
      value = scale * (static_cast<float>(random()) / 4294967296.0f * 2.0f - 1.0f) + (matrix ? 0.0f : 1.0f);
    }
    return {DType::kF32, at->second, values_.data()};
  }

  std::map<std::string, std::vector<int64_t>> shapes;
  int reads = 0;

 private:
  std::vector<float> values_;
};

/// float32, one thread, a KV pool of `blocks` blocks of 16 tokens.
inline EngineConfig tiny_engine(int32_t blocks = 64) {
  EngineConfig config;
  config.dtype = DType::kF32;
  config.threads = 1;
  config.token_budget = 32;
  config.max_sequences = 16;
  config.block_size = 16;
  config.kv_bytes = int64_t{1} << 20;
  config.kv_bytes = blocks * config.block_size * plan_memory(tiny_model(), config).kv_bytes_per_token;
  return config;
}

inline Engine make_tiny(const EngineConfig& config) {
  RandomWeights weights(tiny_model());
  return Engine(tiny_model(), weights, config);
}

inline std::vector<Token> random_tokens(uint32_t seed, int32_t count) {
  std::mt19937 random(seed);
  std::vector<Token> tokens(count);
  for (Token& token : tokens) token = static_cast<Token>(random() % tiny_model().vocab_size);
  return tokens;
}

inline SamplingParams greedy(int32_t max_tokens) {
  SamplingParams params;
  params.max_tokens = max_tokens;
  params.temperature = 0.0f;
  return params;
}

}  // namespace splitfuse
