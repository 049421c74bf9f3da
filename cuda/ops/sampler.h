// Chooses tokens from logits in device memory, by the rules of SamplingParams.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "cuda/device/memory.h"
#include "cuda/device/stream.h"
#include "cuda/gemm/gemm.h"
#include "cuda/ops/sample.h"

namespace splitfuse::cuda {

/// As the CPU's sampler, which it agrees with where logits do: greedy choices, log-probabilities and ranks but for
/// rounding, and what a random number maps to but for sums that round otherwise.
class CudaSampler {
 public:
  explicit CudaSampler(const GemmPlace& place) : place_(place) {}

  /// Bytes of device memory that prepare() will take.
  static int64_t scratch_bytes(const StepLimits& limits);
  /// Throws ConfigError if the vocabulary is too large.
  void prepare(const StepLimits& limits);
  /// As Backend::sample(). Throws InvalidArgument if a row's tokens, biases and stop ids are too many.
  void sample(float* logits, std::span<const SampleRow> rows, std::span<SampleResult> results);

 private:
  /// Where everything lies in device memory. What is sent comes first and lies in page-locked memory likewise.
  struct Places {
    ChoiceTask* tasks = nullptr;  // [rows]
    int32_t* words = nullptr;  // [word_room()]
    Choice* choices = nullptr;  // [rows]
    int32_t* counts = nullptr;  // [rows][row_stride(vocab)]
    float* raw = nullptr;  // [rows][row_stride(vocab)]
    int64_t sent = 0;  // bytes of tasks and words
    int64_t bytes = 0;
  };
  static int64_t word_room(const StepLimits& limits);
  static Places lay_out(const StepLimits& limits, std::byte* base);
  bool stage(const SampleRow& row, size_t index);
  void run(float* logits, size_t count, std::span<SampleResult> results);

  GemmPlace place_;
  StepLimits limits_;
  Memory memory_;
  PinnedMemory sent_;
  PinnedMemory received_;  // [rows] choices
  Places at_;  // in memory_
  Places host_;  // in sent_: tasks and words alone
  int64_t words_used_ = 0;
};

}  // namespace splitfuse::cuda
