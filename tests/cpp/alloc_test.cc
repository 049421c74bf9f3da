// step() allocates nothing: this binary counts every call of the allocator while a step runs.
#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <functional>
#include <new>
#include <tuple>
#include <vector>

#include "splitfuse/splitfuse.h"
#include "tiny_model.h"

namespace {

std::atomic<bool> counting{false};
std::atomic<int64_t> allocations{0};

void count() {
  if (counting.load(std::memory_order_relaxed)) allocations.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
// A sanitizer owns malloc. C++ allocates through operator new, all of whose forms come down to these.
void* operator new(size_t bytes) {
  count();
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
void* operator new(size_t bytes, std::align_val_t alignment) {
  count();
  if (void* memory = std::aligned_alloc(static_cast<size_t>(alignment), bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
#else
// The C library's allocator, with a count before: what libraries and operator new call, in every thread.
extern "C" {
// NOLINTBEGIN(bugprone-reserved-identifier,readability-identifier-naming)
void* __libc_malloc(size_t bytes);
void* __libc_calloc(size_t count, size_t bytes);
void* __libc_realloc(void* memory, size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);
// NOLINTEND(bugprone-reserved-identifier,readability-identifier-naming)

void* malloc(size_t bytes) {
  count();
  return __libc_malloc(bytes);
}
void* calloc(size_t number, size_t bytes) {
  count();
  return __libc_calloc(number, bytes);
}
void* realloc(void* memory, size_t bytes) {
  count();
  return __libc_realloc(memory, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) {
  count();
  return __libc_memalign(alignment, bytes);
}
int posix_memalign(void** memory, size_t alignment, size_t bytes) {
  count();
  *memory = __libc_memalign(alignment, bytes);
  return *memory ? 0 : ENOMEM;
}
}
#endif

namespace splitfuse {
namespace {

/// Allocations of one call.
int64_t counted(const std::function<void()>& call) {
  allocations = 0;
  counting = true;
  call();
  counting = false;
  return allocations;
}

/// What some steps did, together.
struct Sum {
  int64_t allocations = 0;
  int steps = 0, preempted = 0, cached = 0, sampled = 0, prompt_logprobs = 0;
  bool prefill_with_decode = false;
};

void step(Engine& engine, Sum& sum) {
  const StepOutput* out = nullptr;
  sum.allocations += counted([&] { out = &engine.step(); });
  ++sum.steps;
  sum.preempted += static_cast<int>(out->preempted.size());
  sum.cached += out->cached_tokens;
  sum.sampled += static_cast<int>(out->sampled.size());
  sum.prompt_logprobs += static_cast<int>(out->prompt.size());
  sum.prefill_with_decode |= out->decode_tokens > 0 && out->prefill_tokens > 0;
}

SamplingParams every_parameter(uint64_t seed) {
  SamplingParams params;
  params.max_tokens = 24;
  params.temperature = 0.8f;
  params.top_p = 0.9f;
  params.top_k = 40;
  params.min_p = 0.01f;
  params.seed = seed;
  params.sample_index = 3;
  params.repetition_penalty = 1.2f;
  params.presence_penalty = 0.3f;
  params.frequency_penalty = 0.2f;
  params.logit_bias = {{3, 1.0f}, {4, -1.0f}};
  params.stop_token_ids = {5};
  params.min_tokens = 20;
  params.logprobs = kMaxLogprobs;
  return params;
}

class AllocTest : public ::testing::TestWithParam<std::tuple<DType, KvDType, WeightFormat>> {
 protected:
  EngineConfig config(int32_t blocks) const {
    EngineConfig config = tiny_engine();
    std::tie(config.dtype, config.kv_dtype, config.quantize) = GetParam();
    config.threads = 2;
    config.kv_bytes = blocks * config.block_size * plan_memory(tiny_model(), config).kv_bytes_per_token;
    return config;
  }
};

TEST_P(AllocTest, TheCountCounts) {
  EXPECT_GT(counted([] { std::vector<int> values(100); }), 0);
  EXPECT_GT(counted([] { ::operator delete(::operator new(1 << 20)); }), 0);
}

TEST_P(AllocTest, FromTheFirstPrefillToTheLastDecode) {
  Engine engine = make_tiny(config(256));
  for (SeqId id = 0; id < 12; ++id) {
    ASSERT_TRUE(
        engine.put(id, random_tokens(static_cast<uint32_t>(id), 10 + 20 * static_cast<int32_t>(id)), greedy(30)));
  }
  Sum sum;
  while (engine.has_work()) step(engine, sum);
  EXPECT_TRUE(sum.prefill_with_decode);
  EXPECT_EQ(sum.sampled, 12 * 30);
  EXPECT_EQ(sum.allocations, 0) << "in " << sum.steps << " steps";
}

TEST_P(AllocTest, UnderPreemption) {
  Engine engine = make_tiny(config(12));
  for (SeqId id = 0; id < 12; ++id) {
    ASSERT_TRUE(engine.put(id, random_tokens(static_cast<uint32_t>(id), 40), greedy(60)));
  }
  Sum sum;
  while (engine.has_work()) step(engine, sum);
  EXPECT_GT(sum.preempted, 0);
  EXPECT_EQ(sum.sampled, 12 * 60);
  EXPECT_EQ(sum.allocations, 0) << "in " << sum.steps << " steps";
}

TEST_P(AllocTest, WithPrefixHits) {
  Engine engine = make_tiny(config(64));
  Sum sum;
  for (SeqId id = 0; id < 6; ++id) {
    ASSERT_TRUE(engine.put(id, random_tokens(1, 100), greedy(5)));
    while (engine.has_work()) step(engine, sum);
    if (id % 2) engine.flush(id);
  }
  EXPECT_GT(sum.cached, 4 * 90);
  EXPECT_EQ(sum.allocations, 0) << "in " << sum.steps << " steps";
}

TEST_P(AllocTest, WithEverySamplingParameter) {
  Engine engine = make_tiny(config(64));
  for (SeqId id = 0; id < 8; ++id) {
    SamplingParams params = every_parameter(static_cast<uint64_t>(id));
    if (id % 2) params.prompt_logprobs = kMaxLogprobs;
    ASSERT_TRUE(engine.put(id, random_tokens(static_cast<uint32_t>(id), 50), params));
  }
  Sum sum;
  while (engine.has_work()) step(engine, sum);
  EXPECT_GE(sum.sampled, 8 * 20);
  EXPECT_EQ(sum.prompt_logprobs, 4 * 49);
  EXPECT_EQ(sum.allocations, 0) << "in " << sum.steps << " steps";
}

TEST_P(AllocTest, ByACallersPlanAndInTheNextTurn) {
  Engine engine = make_tiny(config(64));
  int64_t total = 0;
  for (int turn = 0; turn < 3; ++turn) {
    for (SeqId id = 0; id < 2; ++id) ASSERT_TRUE(engine.put(id, random_tokens(turn, 20), greedy(2)));
    if (turn > 0) total += counted([&] { engine.step(); });
    std::vector<SeqView> views;
    engine.view(views);
    StepPlan plan;
    for (const SeqView& seq : views) {
      if (seq.known > seq.computed) plan.chunks.push_back({seq.id, 1});
    }
    total += counted([&] { engine.step(plan); });
    while (engine.has_work()) total += counted([&] { engine.step(); });
  }
  EXPECT_EQ(total, 0);
}

TEST_P(AllocTest, ByAPlanBeyondTheBudget) {
  EngineConfig large = config(256);
  large.max_step_tokens = large.token_budget * 20;
  Engine engine = make_tiny(large);
  StepPlan plan;
  for (SeqId id = 0; id < 6; ++id) {
    SamplingParams params = every_parameter(static_cast<uint64_t>(id));
    if (id % 2) params.prompt_logprobs = kMaxLogprobs;
    ASSERT_TRUE(engine.put(id, random_tokens(static_cast<uint32_t>(id), 100), params));
    plan.chunks.push_back({id, 100});
  }
  std::vector<SeqView> views;
  engine.view(views);
  EXPECT_EQ(views.size(), 6u);
  const StepOutput* out = nullptr;
  EXPECT_EQ(counted([&] { out = &engine.step(plan); }), 0);
  EXPECT_EQ(out->prefill_tokens, 600);
  EXPECT_EQ(out->prompt.size(), 3u * 99);
}

INSTANTIATE_TEST_SUITE_P(
    Formats, AllocTest,
    ::testing::Combine(::testing::Values(DType::kF32, DType::kBF16), ::testing::Values(KvDType::kAuto, KvDType::kInt8),
                       ::testing::Values(WeightFormat::kDense, WeightFormat::kInt8, WeightFormat::kInt4)),
    [](const auto& info) {
      return std::string(dtype_name(std::get<DType>(info.param))) + "_" + kv_dtype_name(std::get<KvDType>(info.param)) +
             "_" + weight_format_name(std::get<WeightFormat>(info.param));
    });

}  // namespace
}  // namespace splitfuse
