// One forward's metadata: chunks of many sequences laid end to end.
#pragma once

#include <cstdint>
#include <span>

#include "splitfuse/types.h"

namespace splitfuse {

/// One sequence's chunk in a ragged batch.
struct RaggedSeq {
  int32_t begin = 0;       // its first row
  int32_t length = 0;      // rows
  int32_t computed = 0;    // position of its first row: tokens before it that are in the KV cache
  const int32_t* block_table = nullptr;   // KV block of positions [i * block_size, (i + 1) * block_size) at [i]
};

/// Rows are tokens; a sequence's rows are adjacent and ascending. Host memory, valid during the step.
struct RaggedBatch {
  std::span<const Token> tokens;          // [rows]
  std::span<const int32_t> positions;     // [rows]
  std::span<const RaggedSeq> seqs;
  std::span<const int32_t> logit_rows;    // ascending rows that yield logits

  int32_t rows() const { return static_cast<int32_t>(tokens.size()); }
};

}  // namespace splitfuse
