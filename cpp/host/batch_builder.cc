#include "host/batch_builder.h"

#include <algorithm>

namespace splitfuse {

BatchBuilder::BatchBuilder(int32_t max_tokens, int32_t max_seqs) {
  tokens_.reserve(max_tokens);
  positions_.reserve(max_tokens);
  seqs_.reserve(max_seqs);
  rows_.reserve(max_tokens);
  logit_rows_.reserve(max_tokens);
}

int64_t BatchBuilder::bytes(int32_t max_tokens, int32_t max_seqs) {
  return int64_t{max_tokens} * (sizeof(Token) + 2 * sizeof(int32_t) + sizeof(LogitRow)) +
         int64_t{max_seqs} * sizeof(RaggedSeq);
}

void BatchBuilder::clear() {
  tokens_.clear();
  positions_.clear();
  seqs_.clear();
  rows_.clear();
  logit_rows_.clear();
}

void BatchBuilder::add(Sequence& seq, int32_t length) {
  const auto begin = static_cast<int32_t>(tokens_.size());
  const int32_t end = seq.computed + length;
  seqs_.push_back({begin, length, seq.computed, seq.blocks.data()});
  tokens_.insert(tokens_.end(), seq.tokens.begin() + seq.computed, seq.tokens.begin() + end);
  for (int32_t position = seq.computed; position < end; ++position) positions_.push_back(position);

  int32_t first = end == seq.known() ? end - 1 : end;   // first position with logits
  if (seq.wants_prompt_logprobs()) first = std::min(first, std::max(seq.computed, seq.reported - 1));
  for (int32_t position = first; position < end; ++position) {
    const bool samples = position + 1 == seq.known();
    if (!samples && position + 1 >= seq.prompt) continue;
    rows_.push_back(begin + position - seq.computed);
    logit_rows_.push_back({rows_.back(), &seq, position, samples});
  }
}

}  // namespace splitfuse
