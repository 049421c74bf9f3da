// Random service with everything at once: shared prefixes, priorities, turns, cancellations, faults and a KV pool that
// is far too small. Invariants hold after every step, and every answer is the one of a calm engine.
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <string>
#include <vector>

#include "engine/engine_impl.h"
#include "splitfuse/splitfuse.h"
#include "tiny_model.h"

namespace splitfuse {
namespace {

using Tokens = std::vector<Token>;

constexpr int32_t kBlock = 16;

/// One turn: all that was known when it began, and what was answered.
struct Turn {
  Tokens prompt, answer;
  SamplingParams params;
};

class Storm {
 public:
  explicit Storm(uint32_t seed)
      : random_(seed), blocks_(5 + below(12)), config_(make_config()), engine_(make_tiny(config_)) {}

  void run(int steps) {
    for (int i = 0; i < steps && !::testing::Test::HasFailure(); ++i) {
      if (below(3) == 0) put();
      if (below(40) == 0) flush_one();
      step();
    }
    while (engine_.has_work() && !::testing::Test::HasFailure()) step();
  }

  /// The turns' answers, each made alone and with room.
  void compare() {
    EngineConfig config = config_;
    config.prefix_caching = true;
    config.kv_bytes = tiny_engine(400).kv_bytes;
    config.max_model_len = 0;
    Engine calm = make_tiny(config);
    for (const Turn& turn : ended_) {
      ASSERT_TRUE(calm.put(0, turn.prompt, turn.params));
      Tokens answer;
      while (calm.has_work()) {
        for (const Sampled& sampled : calm.step().sampled) answer.push_back(sampled.token);
      }
      calm.flush(0);
      ASSERT_EQ(turn.answer, answer);
    }
  }

  void flush_all() {
    while (!turns_.empty()) flush_one();
    EXPECT_EQ(engine_.query().used_blocks, 0);
    EXPECT_EQ(EngineAccess::impl(engine_).check(), "");
  }

  size_t ended() const { return ended_.size(); }
  int preempted() const { return preempted_; }
  int cached() const { return cached_; }

 private:
  int32_t below(int32_t end) { return static_cast<int32_t>(random_() % end); }

  EngineConfig make_config() {
    EngineConfig config = tiny_engine(blocks_);
    config.token_budget = 1 + below(60);
    config.max_sequences = 1 + below(12);
    config.prefix_caching = below(5) > 0;
    return config;
  }

  /// Blocks of one letter each, then a few tokens: many share a beginning, and many end just behind a block's border.
  Tokens prompt() {
    Tokens tokens;
    for (int32_t block = below(4); block > 0; --block) tokens.insert(tokens.end(), kBlock, 40 + below(2));
    for (int32_t more = below(3) ? 1 + below(3) : below(40); more > 0; --more) tokens.push_back(below(40));
    return tokens;
  }

  void put() {
    const SeqId id = below(14);
    const auto known = turns_.find(id);
    Turn turn;
    if (known != turns_.end()) {
      turn.prompt = known->second.prompt;
      turn.prompt.insert(turn.prompt.end(), known->second.answer.begin(), known->second.answer.end());
    }
    const Tokens tokens = prompt();
    turn.prompt.insert(turn.prompt.end(), tokens.begin(), tokens.end());
    turn.params.max_tokens = 1 + below(20);
    turn.params.temperature = below(2) ? 0.0f : 1.0f;
    turn.params.seed = random_();
    const PutResult result = engine_.put(id, tokens, turn.params, below(4) - 2);
    if (result) {
      turns_[id] = turn;
    } else {
      ASSERT_TRUE(result.code == Put::kDuplicate || result.code == Put::kTooLong || result.code == Put::kEmpty)
          << result.reason;
    }
  }

  void flush_one() {
    if (turns_.empty()) return;
    auto at = turns_.begin();
    std::advance(at, below(static_cast<int32_t>(turns_.size())));
    engine_.flush(at->first);
    turns_.erase(at);
  }

  void step() {
    const StepOutput& out = engine_.step();
    preempted_ += static_cast<int>(out.preempted.size());
    cached_ += out.cached_tokens;
    still_ = out.chunks.empty() && engine_.has_work() ? still_ + 1 : 0;
    ASSERT_LT(still_, 3) << "the engine stands still";
    for (const Sampled& sampled : out.sampled) {
      Turn& turn = turns_.at(sampled.id);
      turn.answer.push_back(sampled.token);
      if (sampled.finish != Finish::kNone) ended_.push_back(turn);
    }
    ASSERT_EQ(EngineAccess::impl(engine_).check(), "");
  }

  std::mt19937 random_;
  int32_t blocks_;
  EngineConfig config_;
  Engine engine_;
  std::map<SeqId, Turn> turns_;   // the last of each id
  std::vector<Turn> ended_;
  int preempted_ = 0, cached_ = 0, still_ = 0;
};

TEST(Storm, EveryAnswerIsThatOfACalmEngine) {
  size_t ended = 0;
  int preempted = 0, cached = 0;
  for (uint32_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Storm storm(seed);
    storm.run(300);
    if (HasFailure()) return;
    storm.compare();
    storm.flush_all();
    if (HasFailure()) return;
    ended += storm.ended();
    preempted += storm.preempted();
    cached += storm.cached();
  }
  EXPECT_GT(ended, 1000u);
  EXPECT_GT(preempted, 1000);
  EXPECT_GT(cached, 10000);
}

}  // namespace
}  // namespace splitfuse
