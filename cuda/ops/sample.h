// The choice of tokens, as its host and its kernel see it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/gemm/gemm.h"

namespace splitfuse::cuda {

inline constexpr int32_t kMostTop = 20;

/// A run of the words that are sent along with the tasks.
struct Words {
  int32_t begin = 0;
  int32_t count = 0;
};

/// What is to be done with one row of logits; SampleRow and SamplingParams have the meanings.
struct ChoiceTask {
  double scale = 1.0;  // 1 / temperature
  double min_p_depth = 0.0;  // logits this far above the largest (it is not positive) are the least that stay
  double top_p = 1.0;
  double uniform = 0.0;  // the random number, in [0, 1)
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  int32_t prompt = 0;  // so many of the tokens
  int32_t top_k = 0;
  int32_t target = -1;
  int32_t top = -1;
  Words tokens;  // where they are penalised, else none
  Words biases;  // pairs: token, float
  Words stops;
  bool greedy = false;
  bool has_min_p = false;
};

/// SampleResult has the meanings.
struct Choice {
  int32_t token = -1;
  float logprob = 0.0f;
  int32_t rank = 0;
  int32_t top_count = 0;
  int32_t top_token[kMostTop] = {};
  float top_logprob[kMostTop] = {};
};

/// Pointers are to device memory.
struct SampleTask {
  float* logits = nullptr;  // [rows][stride], overwritten
  int64_t stride = 0;  // a multiple of 32
  int32_t vocab = 0;
  int32_t rows = 0;
  const ChoiceTask* tasks = nullptr;  // [rows]
  const int32_t* words = nullptr;
  int32_t* counts = nullptr;  // [rows][stride], zero before and after
  float* raw = nullptr;  // [rows][stride], scratch
  Choice* choices = nullptr;  // [rows]
};

/// The largest vocabulary: sums of weights are kept in shared memory, one for each 1024 tokens.
inline constexpr int32_t kMaxVocab = 1 << 22;

void sample_rows(const SampleTask& task, const GemmPlace& place);

}  // namespace splitfuse::cuda
