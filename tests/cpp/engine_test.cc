// The engine's verbs on a tiny random model: their life cycle, their refusals, and who may call them.
#include "splitfuse/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <semaphore>
#include <thread>
#include <vector>

#include "engine/engine_impl.h"
#include "engine/make_backend.h"
#include "splitfuse/splitfuse.h"
#include "tiny_model.h"

namespace splitfuse {
namespace {

using Tokens = std::vector<Token>;

/// Runs to the end; what each sequence was given. Invariants hold after every step.
std::map<SeqId, Tokens> run(Engine& engine) {
  std::map<SeqId, Tokens> result;
  for (int steps = 0; engine.has_work(); ++steps) {
    if (steps > 10000) {
      ADD_FAILURE() << "no end";
      break;
    }
    for (const Sampled& sampled : engine.step().sampled) result[sampled.id].push_back(sampled.token);
    const std::string wrong = EngineAccess::impl(engine).check();
    if (!wrong.empty()) {
      ADD_FAILURE() << wrong;
      break;
    }
  }
  return result;
}

Tokens answer(Engine& engine, SeqId id, const Tokens& prompt, const SamplingParams& params) {
  const PutResult put = engine.put(id, prompt, params);
  EXPECT_TRUE(put) << put.reason;
  return run(engine)[id];
}

/// Everything a caller can see of the sequences.
struct Seen {
  std::vector<SeqView> views;
  std::map<SeqId, std::vector<int32_t>> progress;
  int32_t used = 0, running = 0, waiting = 0;
  bool operator==(const Seen&) const = default;
};
Seen look(Engine& engine, const std::vector<SeqId>& ids) {
  Seen seen;
  engine.view(seen.views);
  for (SeqId id : ids) {
    const Progress p = engine.query(id);
    seen.progress[id] = {p.prompt, p.known, p.computed, p.blocks, p.preemptions, static_cast<int32_t>(p.finish)};
  }
  const Capacity capacity = engine.query();
  seen.used = capacity.used_blocks;
  seen.running = capacity.running;
  seen.waiting = capacity.waiting;
  return seen;
}

// ---- Life cycle

TEST(Engine, PutStepFlush) {
  Engine engine = make_tiny(tiny_engine());
  EXPECT_FALSE(engine.has_work());
  EXPECT_TRUE(engine.step().chunks.empty());

  const Tokens prompt = random_tokens(1, 40);
  ASSERT_TRUE(engine.put(7, prompt, greedy(3)));
  EXPECT_TRUE(engine.has_work());
  EXPECT_EQ(engine.query().waiting, 1);
  EXPECT_EQ(engine.query().used_blocks, 0);

  const StepOutput& first = engine.step();   // 32 of 40 tokens: no logits
  EXPECT_EQ(first.chunks, (std::vector<Chunk>{{7, 32}}));
  EXPECT_TRUE(first.sampled.empty());
  EXPECT_EQ(first.prefill_tokens, 32);
  EXPECT_EQ(engine.query(7).computed, 32);
  EXPECT_EQ(engine.query(7).blocks, 2);
  EXPECT_EQ(engine.query().running, 1);
  EXPECT_EQ(engine.query().waiting, 0);

  const StepOutput& second = engine.step();
  ASSERT_EQ(second.sampled.size(), 1u);
  EXPECT_EQ(second.sampled[0].id, 7);
  EXPECT_EQ(second.sampled[0].finish, Finish::kNone);
  EXPECT_EQ(engine.query(7).known, 41);

  EXPECT_EQ(engine.step().decode_tokens, 1);
  const StepOutput& last = engine.step();
  EXPECT_EQ(last.sampled[0].finish, Finish::kLength);
  EXPECT_EQ(engine.query(7).finish, Finish::kLength);
  EXPECT_EQ(engine.query(7).known, 43);
  EXPECT_EQ(engine.query(7).computed, 42);   // the last token's keys would serve nobody yet
  EXPECT_FALSE(engine.has_work());
  EXPECT_EQ(engine.query().running, 0);
  EXPECT_EQ(engine.query().used_blocks, 3);

  engine.flush(7);
  EXPECT_EQ(engine.query().used_blocks, 0);
  EXPECT_EQ(engine.query().cached_blocks, 2);   // its full blocks
  EXPECT_THROW(engine.query(7), InvalidArgument);
  EXPECT_THROW(engine.flush(7), InvalidArgument);
}

TEST(Engine, FlushCancelsASequenceInItsPrompt) {
  Engine engine = make_tiny(tiny_engine());
  const Tokens other = answer(engine, 1, random_tokens(2, 20), greedy(5));
  engine.flush(1);
  ASSERT_TRUE(engine.put(2, random_tokens(1, 90), greedy(5)));
  ASSERT_TRUE(engine.put(1, random_tokens(2, 20), greedy(5)));
  engine.step();
  engine.flush(2);
  EXPECT_EQ(EngineAccess::impl(engine).check(), "");
  EXPECT_EQ(run(engine)[1], other);
  engine.flush(1);
  EXPECT_EQ(engine.query().used_blocks, 0);
}

TEST(Engine, TheNextTurnGoesOnFromTheLast) {
  for (bool caching : {false, true}) {
    EngineConfig config = tiny_engine();
    config.prefix_caching = caching;
    Engine engine = make_tiny(config);
    Tokens history = random_tokens(3, 37);
    const Tokens first = answer(engine, 1, history, greedy(9));
    const Tokens turn = random_tokens(4, 21);
    const Tokens second = answer(engine, 1, turn, greedy(9));
    EXPECT_EQ(engine.query(1).prompt, 37 + 9 + 21);

    history.insert(history.end(), first.begin(), first.end());
    history.insert(history.end(), turn.begin(), turn.end());
    Engine fresh = make_tiny(config);
    EXPECT_EQ(answer(fresh, 1, history, greedy(9)), second);
  }
}

TEST(Engine, TheNextTurnComputesOnlyWhatIsNew) {
  EngineConfig config = tiny_engine();
  config.prefix_caching = false;
  Engine engine = make_tiny(config);
  answer(engine, 1, random_tokens(3, 30), greedy(5));
  ASSERT_TRUE(engine.put(1, random_tokens(4, 10), greedy(5)));
  EXPECT_EQ(engine.step().prefill_tokens, 1 + 10);   // the last token of the answer, and the turn
}

TEST(Engine, PrefixesAreFoundAgain) {
  Engine engine = make_tiny(tiny_engine());
  const Tokens prompt = random_tokens(5, 48);
  const Tokens before = answer(engine, 1, prompt, greedy(6));
  ASSERT_TRUE(engine.put(2, prompt, greedy(6)));
  const StepOutput& out = engine.step();
  EXPECT_EQ(out.cached_tokens, 32);   // one token at least is computed, so the third block is not taken
  EXPECT_EQ(out.prefill_tokens, 16);
  EXPECT_EQ(engine.query().prefix_hits, 32);
  EXPECT_EQ(engine.query().prefix_queries, 48 + 48);
  const Token first = out.sampled[0].token;
  Tokens again = run(engine)[2];
  again.insert(again.begin(), first);
  EXPECT_EQ(again, before);

  ASSERT_TRUE(engine.put(3, prompt, greedy(6), 0, "another salt"));
  EXPECT_EQ(engine.step().cached_tokens, 0);
}

TEST(Engine, ACallersPlanIsObeyed) {
  Engine engine = make_tiny(tiny_engine());
  ASSERT_TRUE(engine.put(1, random_tokens(1, 20), greedy(4)));
  ASSERT_TRUE(engine.put(2, random_tokens(2, 20), greedy(4)));
  EXPECT_EQ(engine.step({{{2, 7}}, {}}).chunks, (std::vector<Chunk>{{2, 7}}));
  EXPECT_EQ(engine.query(1).computed, 0);
  EXPECT_EQ(engine.query(2).computed, 7);
  const StepOutput& out = engine.step({{{1, 20}}, {2}});
  EXPECT_EQ(out.preempted, (std::vector<SeqId>{2}));
  ASSERT_EQ(out.sampled.size(), 1u);
  EXPECT_EQ(out.sampled[0].id, 1);
  EXPECT_EQ(engine.query(2).computed, 0);
  EXPECT_EQ(engine.query(2).preemptions, 1);
  EXPECT_EQ(EngineAccess::impl(engine).check(), "");
}

TEST(Engine, TheBudgetIsMeasuredWhereItIsLeftOpen) {
  EngineConfig config = tiny_engine();
  config.token_budget = 0;
  Engine engine = make_tiny(config);
  const int32_t budget = engine.query().token_budget;
  EXPECT_GE(budget, 64);
  EXPECT_LE(budget, 512);
  const auto& curve = engine.budget_curve();
  ASSERT_GE(curve.size(), 2u);
  EXPECT_TRUE(std::is_sorted(curve.begin(), curve.end(), [](auto& a, auto& b) { return a.tokens < b.tokens; }));
  EXPECT_TRUE(std::all_of(curve.begin(), curve.end(), [](auto& p) { return p.tokens_per_second > 0; }));
  EXPECT_TRUE(make_tiny(tiny_engine()).budget_curve().empty());
  EXPECT_EQ(answer(engine, 1, random_tokens(1, 700), greedy(4)).size(), 4u);
}

TEST(Engine, APlanMayGoBeyondTheBudgetIfMemoryWasTakenForIt) {
  EngineConfig config = tiny_engine();
  config.max_step_tokens = 1 << 20;
  Engine engine = make_tiny(config);
  const Capacity capacity = engine.query();
  EXPECT_EQ(capacity.token_budget, 32);
  EXPECT_GE(capacity.max_step_tokens, capacity.max_model_len);
  const std::vector<Token> first = random_tokens(1, 70), second = random_tokens(2, 40);
  ASSERT_TRUE(engine.put(1, first, greedy(4)));
  ASSERT_TRUE(engine.put(2, second, greedy(4)));
  std::vector<SeqView> views;
  EXPECT_EQ(engine.view(views).max_tokens, 32);
  EXPECT_EQ(views.size(), 2u);   // both, though the first alone exceeds the budget
  EXPECT_EQ(engine.step({{{1, 70}, {2, 40}}, {}}).sampled.size(), 2u);
  Engine plain = make_tiny(tiny_engine());
  ASSERT_TRUE(plain.put(1, first, greedy(4)));
  EXPECT_THROW(plain.step({{{1, 70}}, {}}), InvalidArgument);
  EXPECT_EQ(answer(engine, 3, first, greedy(4)), answer(plain, 3, first, greedy(4)));
}

TEST(Engine, MovesAndIsGone) {
  Engine engine = make_tiny(tiny_engine());
  ASSERT_TRUE(engine.put(1, random_tokens(1, 20), greedy(4)));
  Engine other = std::move(engine);
  EXPECT_EQ(run(other)[1].size(), 4u);
  EXPECT_THROW(engine.step(), StateError);   // NOLINT(bugprone-use-after-move,clang-analyzer-cplusplus.Move)
}

// ---- Refusals

TEST(Engine, PutRefusesByValueAndWithAReason) {
  Engine engine = make_tiny(tiny_engine());
  ASSERT_TRUE(engine.put(1, random_tokens(1, 20), greedy(4)));
  const Seen before = look(engine, {1});
  const Tokens good = {1, 2, 3};
  const auto expect = [&](Put code, const std::string& named, SeqId id, const Tokens& tokens,
                          const SamplingParams& params) {
    const PutResult result = engine.put(id, tokens, params);
    EXPECT_EQ(result.code, code);
    EXPECT_NE(result.reason.find(named), std::string::npos) << result.reason;
  };
  expect(Put::kEmpty, "no tokens", 2, {}, greedy(4));
  expect(Put::kBadToken, "97", 2, {1, 97}, greedy(4));
  expect(Put::kBadToken, "-1", 2, {-1}, greedy(4));
  expect(Put::kTooLong, "max_model_len 1024", 2, random_tokens(1, 1020), greedy(5));
  expect(Put::kDuplicate, "1", 1, good, greedy(4));
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  const auto bad = [&](const std::string& named, auto change) {
    SamplingParams params;
    change(params);
    expect(Put::kBadParams, named, 2, good, params);
  };
  bad("max_tokens", [](auto& p) { p.max_tokens = 0; });
  bad("min_tokens", [](auto& p) { p.min_tokens = 17; });
  bad("min_tokens", [](auto& p) { p.min_tokens = -1; });
  for (float value : {nan, infinity, -infinity, -0.5f}) {
    bad("temperature", [&](auto& p) { p.temperature = value; });
    bad("top_p", [&](auto& p) { p.top_p = value; });
    bad("min_p", [&](auto& p) { p.min_p = value; });
    bad("repetition_penalty", [&](auto& p) { p.repetition_penalty = value; });
    bad("presence_penalty", [&](auto& p) { p.presence_penalty = value * 5; });
    bad("frequency_penalty", [&](auto& p) { p.frequency_penalty = value * 5; });
  }
  for (float value : {nan, infinity}) bad("logit_bias", [&](auto& p) { p.logit_bias = {{1, value}}; });
  bad("top_p", [](auto& p) { p.top_p = 0; });
  bad("top_p", [](auto& p) { p.top_p = 1.5f; });
  bad("top_k", [](auto& p) { p.top_k = -1; });
  bad("min_p", [](auto& p) { p.min_p = 1.5f; });
  bad("repetition_penalty", [](auto& p) { p.repetition_penalty = 0; });
  bad("logit_bias", [](auto& p) { p.logit_bias = {{97, 0.0f}}; });
  bad("stop_token_ids", [](auto& p) { p.stop_token_ids = {-1}; });
  bad("logprobs", [](auto& p) { p.logprobs = kMaxLogprobs + 1; });
  bad("prompt_logprobs", [](auto& p) { p.prompt_logprobs = -2; });
  EXPECT_EQ(look(engine, {1}), before);
  EXPECT_EQ(run(engine)[1].size(), 4u);
}

TEST(Engine, ARefusedNextTurnLeavesTheFinishedSequence) {
  Engine engine = make_tiny(tiny_engine());
  answer(engine, 1, random_tokens(1, 20), greedy(4));
  const Seen before = look(engine, {1});
  EXPECT_EQ(engine.put(1, {}, greedy(4)).code, Put::kEmpty);
  EXPECT_EQ(engine.put(1, random_tokens(1, 1000), greedy(4)).code, Put::kTooLong);   // with the turn before
  EXPECT_EQ(look(engine, {1}), before);
}

TEST(Engine, WhatCanNeverFitIsRefused) {
  Engine engine = make_tiny(tiny_engine(4));   // 64 tokens
  EXPECT_EQ(engine.query().max_model_len, 64);
  EXPECT_EQ(engine.put(1, random_tokens(1, 60), greedy(5)).code, Put::kTooLong);
  ASSERT_TRUE(engine.put(1, random_tokens(1, 60), greedy(4)));
  EXPECT_EQ(run(engine)[1].size(), 4u);
}

TEST(Engine, APlanThatCannotBeServedChangesNothing) {
  Engine engine = make_tiny(tiny_engine(8));
  ASSERT_TRUE(engine.put(1, random_tokens(1, 40), greedy(4)));
  ASSERT_TRUE(engine.put(2, random_tokens(2, 100), greedy(4)));
  ASSERT_TRUE(engine.put(3, random_tokens(3, 5), greedy(1)));
  engine.step({{{3, 5}}, {}});   // finished
  for (int i = 0; i < 2; ++i) engine.step({{{2, 32}}, {}});
  engine.step({{{2, 30}}, {}});
  ASSERT_EQ(engine.query().free_blocks, 1);
  const Seen before = look(engine, {1, 2, 3});
  const auto refused = [&](const std::string& named, const StepPlan& plan) {
    try {
      engine.step(plan);
      ADD_FAILURE() << "served: " << named;
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find(named), std::string::npos) << error.what();
    }
    EXPECT_EQ(look(engine, {1, 2, 3}), before);
  };
  refused("no sequence 9", {{{9, 1}}, {}});
  refused("no sequence 9", {{{1, 1}}, {9}});
  refused("0 tokens", {{{1, 0}}, {}});
  refused("-3 tokens", {{{1, -3}}, {}});
  refused("has 40 to do", {{{1, 41}}, {}});
  refused("has 0 to do", {{{3, 1}}, {}});
  refused("named twice", {{{1, 1}, {1, 1}}, {}});
  refused("named twice", {{{2, 1}}, {2}});
  refused("named twice", {{}, {2, 2}});
  refused("holds no blocks", {{{2, 1}}, {1}});
  refused("33 tokens", {{{1, 31}, {2, 2}}, {}});
  refused("needs 2 KV blocks, 1 would be free", {{{1, 17}}, {}});
  EXPECT_EQ(run(engine).size(), 2u);
}

TEST(Engine, APlanOfMoreSequencesThanTheForwardTakes) {
  EngineConfig config = tiny_engine();
  config.max_sequences = 2;
  Engine engine = make_tiny(config);
  for (SeqId id = 1; id <= 3; ++id) ASSERT_TRUE(engine.put(id, random_tokens(1, 5), greedy(2)));
  EXPECT_THROW(engine.step({{{1, 1}, {2, 1}, {3, 1}}, {}}), InvalidArgument);
  EXPECT_EQ(run(engine).size(), 3u);
}

TEST(Engine, AMemoryPlanThatDoesNotFitIsRefusedBeforeAnythingIsRead) {
  EngineConfig config = tiny_engine();
  config.kv_bytes = int64_t{1} << 40;
  RandomWeights weights(tiny_model());
  try {
    Engine engine(tiny_model(), weights, config);
    ADD_FAILURE() << "a pool of a tebibyte";
  } catch (const MemoryError& error) {
    const std::string text = error.what();
    for (const char* part : {"KV pool", "weights", "total", "available", "1048576.0 MiB"}) {
      EXPECT_NE(text.find(part), std::string::npos) << text;
    }
  }
  EXPECT_EQ(weights.reads, 0);
  config.kv_bytes = 16;
  EXPECT_THROW(Engine(tiny_model(), weights, config), MemoryError);
  config = tiny_engine(4);
  config.max_model_len = 65;
  EXPECT_THROW(Engine(tiny_model(), weights, config), MemoryError);
  EXPECT_EQ(weights.reads, 0);
}

TEST(Engine, AWrongConfigurationIsNamed) {
  const auto refused = [](const std::string& field, auto change) {
    EngineConfig config = tiny_engine();
    change(config);
    RandomWeights weights(tiny_model());
    try {
      Engine engine(tiny_model(), weights, config);
      ADD_FAILURE() << field;
    } catch (const ConfigError& error) {
      EXPECT_NE(std::string(error.what()).find(field), std::string::npos) << error.what();
    }
  };
  refused("threads", [](auto& c) { c.threads = -1; });
  refused("token_budget", [](auto& c) { c.token_budget = -1; });
  refused("max_step_tokens", [](auto& c) { c.max_step_tokens = -1; });
  refused("max_sequences", [](auto& c) { c.max_sequences = 0; });
  refused("block_size", [](auto& c) { c.block_size = 24; });
  refused("block_size", [](auto& c) { c.block_size = 0; });
  refused("kv_bytes", [](auto& c) { c.kv_bytes = -1; });
  refused("max_model_len", [](auto& c) { c.max_model_len = 1025; });
  refused("device", [](auto& c) { c.device = "tpu"; });
  refused("isa", [](auto& c) { c.isa = "sse"; });
  refused("float16", [](auto& c) { c.dtype = DType::kF16; });
}

TEST(Engine, AMissingOrMisshapenWeightIsNamed) {
  for (bool missing : {true, false}) {
    RandomWeights weights(tiny_model());
    const std::string name = "layers.1.mlp.up.weight";
    if (missing) {
      weights.shapes.erase(name);
    } else {
      weights.shapes[name] = {81, 48};
    }
    try {
      Engine engine(tiny_model(), weights, tiny_engine());
      ADD_FAILURE();
    } catch (const CheckpointError& error) {
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
  }
}

TEST(Engine, AnInt8CacheTakesAQuarterOfFloat32AndItsScales) {
  EngineConfig config = tiny_engine(10);
  config.kv_dtype = KvDType::kInt8;
  EXPECT_EQ(plan_memory(tiny_model(), config).kv_bytes_per_token, 2 * 2 * (8 + 16 + 2 * 4));   // values padded to 16
  Engine engine = make_tiny(config);
  ASSERT_TRUE(engine.put(1, random_tokens(1, 40), greedy(4)));
  while (engine.has_work()) engine.step();
  EXPECT_EQ(engine.query(1).known, 44);
}

TEST(Engine, ThePlanIsWhatTheEngineTakes) {
  const EngineConfig config = tiny_engine(10);
  const MemoryPlan plan = plan_memory(tiny_model(), config);
  Engine engine = make_tiny(config);
  EXPECT_EQ(engine.memory_plan().total(), plan.total());
  EXPECT_EQ(engine.query().total_blocks, 10);
  EXPECT_EQ(plan.blocks, 10);
  EXPECT_GE(plan.kv_bytes_per_token, 2 * 2 * 2 * 8 * 4);   // two layers, K and V, two heads of 8, float32
  EXPECT_EQ(plan.kv_pool, 10 * 16 * plan.kv_bytes_per_token);
}

TEST(Engine, NothingButCloseWorksAfterClose) {
  Engine engine = make_tiny(tiny_engine());
  ASSERT_TRUE(engine.put(1, random_tokens(1, 20), greedy(4)));
  engine.close();
  engine.close();
  std::vector<SeqView> views;
  EXPECT_THROW(engine.put(2, Tokens{1}, greedy(4)), StateError);
  EXPECT_THROW(engine.step(), StateError);
  EXPECT_THROW(engine.step(StepPlan()), StateError);
  EXPECT_THROW(engine.query(), StateError);
  EXPECT_THROW(engine.query(1), StateError);
  EXPECT_THROW(engine.view(views), StateError);
  EXPECT_THROW(engine.has_work(), StateError);
  EXPECT_THROW(engine.flush(1), StateError);
  EXPECT_THROW(engine.memory_plan(), StateError);
  EXPECT_THROW(engine.model_config(), StateError);
  EXPECT_THROW(engine.describe(), StateError);
}

// ---- Backends that stop or fail where the test wants it

/// Passes every call on; a test overrides what it needs.
class PassingBackend : public Backend {
 public:
  explicit PassingBackend(const EngineConfig& config) : inner_(make_backend(config)) {}
  std::string describe() const override { return inner_->describe(); }
  std::vector<KernelChoice> kernels(WeightFormat weights, WeightFormat head, KvDType kv) const override {
    return inner_->kernels(weights, head, kv);
  }
  DType dtype() const override { return inner_->dtype(); }
  uint32_t barriers() const override { return inner_->barriers(); }
  int64_t available() const override { return inner_->available(); }
  int64_t linear_bytes(const LinearShape& shape) const override { return inner_->linear_bytes(shape); }
  int64_t kv_block_bytes(const KvShape& shape) const override { return inner_->kv_block_bytes(shape); }
  int64_t scratch_bytes(const AttentionShape& attention, const StepLimits& limits) const override {
    return inner_->scratch_bytes(attention, limits);
  }
  DeviceBuffer allocate(int64_t bytes) override { return inner_->allocate(bytes); }
  void prepare(const AttentionShape& attention, const StepLimits& limits, std::byte* kv) override {
    inner_->prepare(attention, limits, kv);
  }
  void pack(const Linear& linear, Rows which, int32_t row, const TensorView& weight) override {
    inner_->pack(linear, which, row, weight);
  }
  void pack_bias(const Linear& linear, Rows which, int32_t row, const TensorView& bias) override {
    inner_->pack_bias(linear, which, row, bias);
  }
  void upload(const TensorView& vector, float* out) override { inner_->upload(vector, out); }
  void read(const void* from, std::span<std::byte> out) override { inner_->read(from, out); }
  void write(std::span<const std::byte> bytes, void* to) override { inner_->write(bytes, to); }
  void begin(const RaggedBatch& batch) override { inner_->begin(batch); }
  void embed(const Linear& table, float scale, float* x) override { inner_->embed(table, scale, x); }
  void embed_positions(const Linear& table, int32_t offset, float* x) override {
    inner_->embed_positions(table, offset, x);
  }
  void norm(const Norm& norm, const float* x, std::span<const int32_t> rows, void* out) override {
    inner_->norm(norm, x, rows, out);
  }
  void norm_in_place(const Norm& norm, float* x) override { inner_->norm_in_place(norm, x); }
  void add(const Norm& norm, const float* y, float scale, float* x) override { inner_->add(norm, y, scale, x); }
  void linear(const Linear& linear, const void* in, int32_t rows, float* out) override {
    inner_->linear(linear, in, rows, out);
  }
  void linear_add(const Linear& linear, const void* in, int32_t rows, float* x) override {
    inner_->linear_add(linear, in, rows, x);
  }
  void linear_act(const Linear& linear, const void* in, int32_t rows, void* out) override {
    inner_->linear_act(linear, in, rows, out);
  }
  void rope_write_kv(float* qkv, int32_t layer, void* q) override { inner_->rope_write_kv(qkv, layer, q); }
  void attention(const void* q, int32_t layer, void* out) override { inner_->attention(q, layer, out); }
  void experts(const Experts& experts, const void* in, int32_t rows, float* out) override {
    inner_->experts(experts, in, rows, out);
  }
  void scale_logits(float* logits, int32_t rows, float scale, float softcap) override {
    inner_->scale_logits(logits, rows, scale, softcap);
  }
  void sample(float* logits, std::span<const SampleRow> rows, std::span<SampleResult> results) override {
    inner_->sample(logits, rows, results);
  }

 private:
  std::unique_ptr<Backend> inner_;
};

Engine engine_on(std::unique_ptr<Backend> backend, const EngineConfig& config) {
  RandomWeights weights(tiny_model());
  return EngineAccess::make(
      std::make_unique<Engine::Impl>(tiny_model(), weights, config, ProgressFn(), std::move(backend)));
}

/// A step waits inside the model until the test lets it go on.
class GatedBackend : public PassingBackend {
 public:
  using PassingBackend::PassingBackend;
  void sample(float* logits, std::span<const SampleRow> rows, std::span<SampleResult> results) override {
    inside.release();
    go_on.acquire();
    PassingBackend::sample(logits, rows, results);
  }
  std::binary_semaphore inside{0}, go_on{0};
};

TEST(Engine, ASecondThreadIsTurnedAway) {
  const EngineConfig config = tiny_engine();
  auto backend = std::make_unique<GatedBackend>(config);
  GatedBackend& gate = *backend;
  Engine engine = engine_on(std::move(backend), config);
  ASSERT_TRUE(engine.put(1, random_tokens(1, 20), greedy(1)));
  size_t sampled = 0;
  std::thread owner([&] { sampled = engine.step().sampled.size(); });
  gate.inside.acquire();
  std::vector<SeqView> views;
  EXPECT_THROW(engine.step(), StateError);
  EXPECT_THROW(engine.step(StepPlan()), StateError);
  EXPECT_THROW(engine.put(2, Tokens{1}, greedy(1)), StateError);
  EXPECT_THROW(engine.query(), StateError);
  EXPECT_THROW(engine.query(1), StateError);
  EXPECT_THROW(engine.view(views), StateError);
  EXPECT_THROW(engine.has_work(), StateError);
  EXPECT_THROW(engine.flush(1), StateError);
  EXPECT_THROW(engine.close(), StateError);
  gate.go_on.release();
  owner.join();
  EXPECT_EQ(sampled, 1u);
  EXPECT_EQ(engine.query(1).finish, Finish::kLength);   // free again
  std::thread other([&] { engine.flush(1); });          // one at a time, any thread may
  other.join();
  EXPECT_EQ(engine.query().used_blocks, 0);
}

class FailingBackend : public PassingBackend {
 public:
  using PassingBackend::PassingBackend;
  void attention(const void* q, int32_t layer, void* out) override {
    if (fail) throw Error("the test's fault");
    PassingBackend::attention(q, layer, out);
  }
  bool fail = false;
};

TEST(Engine, AFailedStepLeavesEverySequenceAsItWas) {
  const EngineConfig config = tiny_engine();
  Engine calm = make_tiny(config);
  auto backend = std::make_unique<FailingBackend>(config);
  FailingBackend& faults = *backend;
  Engine engine = engine_on(std::move(backend), config);
  std::vector<SeqId> ids;
  for (Engine* each : {&calm, &engine}) {
    for (SeqId id = 0; id < 4; ++id)
      ASSERT_TRUE(each->put(id, random_tokens(static_cast<uint32_t>(id), 30), greedy(8)));
  }
  std::map<SeqId, Tokens> tokens;
  while (engine.has_work()) {
    const Seen before = look(engine, {0, 1, 2, 3});
    faults.fail = true;
    EXPECT_THROW(engine.step(), Error);
    EXPECT_EQ(look(engine, {0, 1, 2, 3}), before);
    EXPECT_EQ(EngineAccess::impl(engine).check(), "");
    faults.fail = false;
    for (const Sampled& sampled : engine.step().sampled) tokens[sampled.id].push_back(sampled.token);
  }
  EXPECT_EQ(tokens, run(calm));
}

/// The first row's logits are not numbers, once.
class PoisoningBackend : public PassingBackend {
 public:
  using PassingBackend::PassingBackend;
  void sample(float* logits, std::span<const SampleRow> rows, std::span<SampleResult> results) override {
    if (poison) logits[5] = std::numeric_limits<float>::quiet_NaN();
    poison = false;
    PassingBackend::sample(logits, rows, results);
  }
  bool poison = false;
};

TEST(Engine, LogitsThatAreNotFiniteEndOneSequenceAlone) {
  const EngineConfig config = tiny_engine();
  Engine calm = make_tiny(config);
  auto backend = std::make_unique<PoisoningBackend>(config);
  PoisoningBackend& poisoner = *backend;
  Engine engine = engine_on(std::move(backend), config);
  const Tokens prompt = random_tokens(1, 15);   // both in the first forward
  for (Engine* each : {&calm, &engine}) {
    for (SeqId id : {1, 2}) ASSERT_TRUE(each->put(id, prompt, greedy(20)));
  }
  poisoner.poison = true;
  const StepOutput& out = engine.step();
  ASSERT_EQ(out.sampled.size(), 2u);
  EXPECT_EQ(out.sampled[0].finish, Finish::kError);
  EXPECT_EQ(out.sampled[0].token, -1);
  EXPECT_EQ(engine.query(1).finish, Finish::kError);
  EXPECT_EQ(engine.query(1).blocks, 0);
  Tokens survivor = {out.sampled[1].token};
  const Tokens rest = run(engine)[2];
  survivor.insert(survivor.end(), rest.begin(), rest.end());
  EXPECT_EQ(survivor, run(calm)[2]);
  // The id can begin anew as any finished one, and flushing all leaves nothing held.
  ASSERT_TRUE(engine.put(1, random_tokens(9, 40), greedy(4)));
  EXPECT_EQ(run(engine)[1].size(), 4u);
  engine.flush(1);
  engine.flush(2);
  EXPECT_EQ(engine.query().used_blocks, 0);
}

}  // namespace
}  // namespace splitfuse
