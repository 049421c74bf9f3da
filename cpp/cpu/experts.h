// Mixtures of experts: which rows go to which expert, and what becomes of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "base/memory.h"
#include "base/thread_pool.h"
#include "cpu/linear.h"
#include "cpu/routing.h"

namespace splitfuse {

class ExpertOps {
 public:
  ExpertOps(DType dtype, LinearOps& linears, ThreadPool& pool) : dtype_(dtype), linears_(linears), pool_(pool) {}

  /// Bytes that prepare() will take; 0 where there are no experts.
  int64_t scratch_bytes(const StepLimits& limits) const;
  void prepare(const StepLimits& limits);

  /// As Backend::experts().
  void run(const Experts& experts, const void* in, int32_t rows, float* out);

 private:
  /// Where everything lies. A slot is a row at one of its experts; slots are in order of experts, then of rows.
  struct Places {
    float* logits = nullptr;            // [rows, experts]
    std::byte* routing = nullptr;       // [threads][routing_scratch_bytes()]
    ExpertChoice* choices = nullptr;    // [rows, experts of a row]
    int32_t* slot_of_choice = nullptr;  // [rows, experts of a row]
    int32_t* row_of_slot = nullptr;     // [slots]
    int32_t* first_slot = nullptr;      // [experts + 1]
    std::byte* in = nullptr;            // [slots, hidden], in the activations' format; then y has their place
    std::byte* inner = nullptr;         // [slots, intermediate], in the activations' format
    float* y = nullptr;                 // [slots, hidden]
    int64_t bytes = 0;
  };

  Places lay_out(const StepLimits& limits, std::byte* base) const;
  void choose(const Routing& routing, int64_t stride, int32_t rows);
  void place(int32_t each, int32_t rows, int32_t experts);
  size_t list_linears(const Experts& experts, const void* in);
  void gather(std::span<const LinearRows> firsts, const void* in);
  void combine(int32_t each, int32_t rows, int32_t columns, float* out);

  DType dtype_;
  LinearOps& linears_;
  ThreadPool& pool_;
  StepLimits limits_;
  Memory scratch_;
  Places at_;
  std::vector<LinearRows> first_;    // [experts]: the linears of this call
  std::vector<LinearRows> second_;
};

}  // namespace splitfuse
