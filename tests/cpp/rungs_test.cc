// A tiny model from tokens to tokens on every instruction set that this processor has: what it thinks of a prompt is
// what the scalar reference thinks, and no bit depends on how the prompt was cut, on who else is served, or on threads.
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "splitfuse/splitfuse.h"
#include "tiny_model.h"

namespace splitfuse {
namespace {

using Tokens = std::vector<Token>;
using Rung = std::tuple<std::string, DType, WeightFormat, KvDType>;

std::string rung_name(const testing::TestParamInfo<Rung>& test) {
  const auto& [isa, dtype, format, kv] = test.param;
  return isa + "_" + dtype_name(dtype) + "_" + weight_format_name(format) + "_" + kv_dtype_name(kv);
}

/// The log-probabilities of each sequence's prompt, then its output tokens and theirs.
struct Answer {
  std::vector<float> prompt;
  std::vector<std::pair<Token, float>> output;
  bool operator==(const Answer&) const = default;
};

class Rungs : public testing::TestWithParam<Rung> {
 protected:
  EngineConfig config(const std::string& isa) const {
    EngineConfig config = tiny_engine(128);
    config.isa = isa;
    config.dtype = std::get<1>(GetParam());
    config.quantize = std::get<2>(GetParam());
    config.kv_dtype = std::get<3>(GetParam());
    config.prefix_caching = false;
    return config;
  }
  EngineConfig config() const { return config(std::get<0>(GetParam())); }
};

std::map<SeqId, Answer> serve(const EngineConfig& config, const std::map<SeqId, Tokens>& prompts) {
  Engine engine = make_tiny(config);
  for (const auto& [id, prompt] : prompts) {
    SamplingParams params = greedy(8);
    params.logprobs = params.prompt_logprobs = 0;
    EXPECT_TRUE(engine.put(id, prompt, params));
  }
  std::map<SeqId, Answer> answers;
  while (engine.has_work()) {
    const StepOutput& out = engine.step();
    for (const PromptLogprob& known : out.prompt) answers[known.id].prompt.push_back(known.logprob);
    for (const Sampled& sampled : out.sampled) answers[sampled.id].output.emplace_back(sampled.token, sampled.logprob);
  }
  return answers;
}

const std::map<SeqId, Tokens>& prompts() {
  static const std::map<SeqId, Tokens> all = {
      {1, random_tokens(1, 3)}, {2, random_tokens(2, 61)}, {3, random_tokens(3, 150)}};
  return all;
}

TEST_P(Rungs, ThinkAsTheReferenceDoes) {
  const auto answers = serve(config(), prompts());
  for (const auto& [id, expected] : serve(config("ref"), prompts())) {
    const Answer& answer = answers.at(id);
    ASSERT_EQ(answer.prompt.size(), prompts().at(id).size() - 1);
    EXPECT_EQ(answer.output.size(), 8u);
    // A rounding that falls the other way moves an 8-bit integer by one.
    const bool exact = config().dtype == DType::kF32 && config().quantize == WeightFormat::kDense;
    const float allowed = !exact ? 0.25f : config().kv_dtype == KvDType::kInt8 ? 0.02f : 1e-4f;
    for (size_t i = 0; i < answer.prompt.size(); ++i) ASSERT_NEAR(answer.prompt[i], expected.prompt[i], allowed) << i;
  }
}

TEST_P(Rungs, BitsDependOnTheSequenceAlone) {
  std::map<SeqId, Answer> alone;
  for (const auto& [id, prompt] : prompts()) {
    EngineConfig one = config();
    one.token_budget = 150;
    alone[id] = serve(one, {{id, prompt}}).at(id);
  }
  for (const auto& [budget, threads] : {std::pair{7, 1}, {61, 2}}) {
    EngineConfig cut = config();
    cut.token_budget = budget;
    cut.threads = threads;
    EXPECT_EQ(serve(cut, prompts()), alone) << "token budget " << budget;
  }
}

INSTANTIATE_TEST_SUITE_P(All, Rungs,
                         testing::Combine(testing::ValuesIn(cpu_isas()), testing::Values(DType::kF32, DType::kBF16),
                                          testing::Values(WeightFormat::kDense, WeightFormat::kInt8,
                                                          WeightFormat::kInt4),
                                          testing::Values(KvDType::kAuto, KvDType::kInt8)),
                         rung_name);

}  // namespace
}  // namespace splitfuse
