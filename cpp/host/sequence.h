// A sequence: tokens known, tokens computed, and the KV blocks that hold them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "host/block_key.h"
#include "host/kv_pool.h"
#include "splitfuse/config.h"
#include "splitfuse/engine.h"
#include "splitfuse/types.h"

namespace splitfuse {

/// Everything the engine knows of one id. Vectors are reserved at put() for all they will ever hold.
struct Sequence {
  SeqId id = 0;
  int32_t priority = 0;
  uint64_t arrival = 0;               // order among equals
  SamplingParams params;
  std::vector<Token> stop_ids;        // EOS (unless ignored) and stop_token_ids
  std::vector<Token> tokens;          // prompt and output: the known ones
  int32_t prompt = 0;
  int32_t computed = 0;
  int32_t cached = 0;                 // what was computed when this turn began
  int32_t attached = 0;               // of computed, taken from the prefix cache since it last ran
  int32_t reported = 1;               // prompt positions below it need no prompt log-probability any more
  std::vector<BlockId> blocks;        // the block table
  int32_t behind = 0;                 // its leading entries that every attention window has passed: none of ours
  BlockKey root;                      // names the cache salt
  std::vector<BlockKey> keys;         // of the leading full blocks of `tokens`
  int32_t preemptions = 0;
  bool looked_up = false;  // its prompt counts in the prefix cache's statistics already
  Finish finish = Finish::kNone;

  int32_t known() const { return static_cast<int32_t>(tokens.size()); }
  int32_t output() const { return known() - prompt; }
  int32_t todo() const { return finish == Finish::kNone ? known() - computed : 0; }
  /// The part of the table whose blocks it holds.
  std::span<const BlockId> held() const { return std::span(blocks).subspan(behind); }
  bool wants_prompt_logprobs() const { return params.prompt_logprobs >= 0; }

  /// The key of each full block among the first `length` tokens, extended as far as needed.
  std::span<const BlockKey> keys_to(int32_t length, int32_t block_size, const BlockKeyer& keyer) {
    const auto full = static_cast<size_t>(length / block_size);
    while (keys.size() < full) {
      const std::span<const Token> content(tokens.data() + keys.size() * block_size, block_size);
      keys.push_back(keyer.next(keys.empty() ? root : keys.back(), content));
    }
    return {keys.data(), full};
  }
};

}  // namespace splitfuse
