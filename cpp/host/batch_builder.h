// Lays chunks end to end as a ragged batch.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/batch.h"
#include "host/sequence.h"

namespace splitfuse {

/// A row of the batch whose logits are wanted.
struct LogitRow {
  int32_t row = 0;
  Sequence* seq = nullptr;
  int32_t position = 0;     // of the row's token; its logits speak of position + 1
  bool samples = false;     // the sequence's next token is chosen from it; else a prompt log-probability
};

/// Fills vectors that were reserved at construction.
class BatchBuilder {
 public:
  BatchBuilder(int32_t max_tokens, int32_t max_seqs);

  void clear();
  /// The next `length` tokens of `seq`. Logits are wanted of its last known token, and of every prompt token
  /// with a successor where the sequence wants prompt log-probabilities.
  void add(Sequence& seq, int32_t length);

  /// Valid until clear().
  RaggedBatch batch() const { return {tokens_, positions_, seqs_, rows_}; }
  const std::vector<LogitRow>& logit_rows() const { return logit_rows_; }

  static int64_t bytes(int32_t max_tokens, int32_t max_seqs);

 private:
  std::vector<Token> tokens_;          // [rows]
  std::vector<int32_t> positions_;     // [rows]
  std::vector<RaggedSeq> seqs_;
  std::vector<int32_t> rows_;          // row of each logit row
  std::vector<LogitRow> logit_rows_;
};

}  // namespace splitfuse
