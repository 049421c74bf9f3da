// The engine: put / step / query / flush over a ragged batch and a paged KV cache.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "splitfuse/config.h"
#include "splitfuse/plan.h"
#include "splitfuse/types.h"
#include "splitfuse/weights.h"

namespace splitfuse {

/// What put() answers. Refusals are values: nothing was queued, nobody else is affected.
enum class Put : uint8_t {
  kOk,
  kEmpty,        // no tokens
  kBadToken,     // an id outside the vocabulary
  kTooLong,      // prompt and max_tokens exceed max_model_len: it could never finish
  kBadParams,    // a sampling value out of range or not a number
  kDuplicate,    // the id is still being served
};

struct PutResult {
  Put code = Put::kOk;
  std::string reason;   // empty if kOk
  explicit operator bool() const { return code == Put::kOk; }
};

enum class Finish : uint8_t {
  kNone,     // goes on
  kStop,     // an EOS or stop token was chosen
  kLength,   // max_tokens or max_model_len reached
  kError,    // its logits were not finite; the sequence alone has ended
};

/// One chosen token.
struct Sampled {
  SeqId id = 0;
  Token token = -1;       // -1 with Finish::kError
  Finish finish = Finish::kNone;
  float logprob = 0.0f;   // of the model's own distribution, before penalties and temperature; 0 unless asked for
  int32_t rank = 0;       // of the token by that distribution: 1 is the most likely; 0 unless asked for
  int32_t top_begin = 0;  // StepOutput::top[top_begin, top_begin + top_count): the most likely tokens, best first
  int32_t top_count = 0;
};

struct TokenLogprob {
  Token token = -1;
  float logprob = 0.0f;
};

/// Log-probability of the prompt token at `position` (>= 1) given those before it.
struct PromptLogprob {
  SeqId id = 0;
  int32_t position = 0;
  Token token = -1;
  float logprob = 0.0f;
  int32_t rank = 0;        // as in Sampled
  int32_t top_begin = 0;   // as in Sampled
  int32_t top_count = 0;
};

/// What one step did. Owned by the engine; valid until its next call.
struct StepOutput {
  std::vector<Sampled> sampled;
  std::vector<PromptLogprob> prompt;
  std::vector<TokenLogprob> top;
  std::vector<Chunk> chunks;         // what ran
  std::vector<SeqId> preempted;      // who lost computed tokens
  int32_t decode_tokens = 0;         // tokens of chunks that began with one token left to do
  int32_t prefill_tokens = 0;        // all others
  int32_t cached_tokens = 0;         // of those that ran: tokens taken from the prefix cache instead of computed
  double host_us = 0;                // plan, reserve, batch build and commit, in microseconds
  double forward_us = 0;             // model and sampling
  int32_t barriers = 0;              // how often all threads waited for each other
};

/// The engine's room at this moment.
struct Capacity {
  int32_t total_blocks = 0;
  int32_t free_blocks = 0;      // free or evictable
  int32_t cached_blocks = 0;    // evictable: they hold prefixes nobody uses now
  int32_t used_blocks = 0;      // held by sequences
  int32_t running = 0;          // sequences that hold blocks and are not finished
  int32_t waiting = 0;          // sequences that hold none yet
  int32_t token_budget = 0;
  int32_t max_step_tokens = 0;  // of the largest forward that step(plan) takes
  int32_t max_sequences = 0;
  int32_t max_model_len = 0;
  int32_t block_size = 0;
  int64_t prefix_queries = 0;   // prompt tokens looked up in the prefix cache, since start
  int64_t prefix_hits = 0;      // prompt tokens found there, since start
};

/// How far one sequence is.
struct Progress {
  int32_t prompt = 0;     // tokens of the prompt
  int32_t known = 0;      // prompt and output
  int32_t computed = 0;
  int32_t cached = 0;     // of the prompt, found computed when this turn began: prefix cache, or former turns
  int32_t blocks = 0;
  int32_t preemptions = 0;
  Finish finish = Finish::kNone;
};

/// Every byte the engine will ever use, but for the token ids and tables of the sequences that are put.
struct MemoryPlan {
  int64_t weights = 0;
  int64_t kv_pool = 0;
  int64_t workspace = 0;        // activations and logits of the largest step
  int64_t host = 0;             // batch metadata, block tables
  int64_t available = 0;        // what the process could take before
  int64_t kv_bytes_per_token = 0;
  int32_t blocks = 0;
  int32_t max_model_len = 0;
  int32_t token_budget = 0;
  int32_t max_step_tokens = 0;
  int64_t total() const { return weights + kv_pool + workspace + host; }
  /// A small table, one line an item.
  std::string to_string() const;
};

/// How fast a forward of so many tokens runs.
struct BudgetPoint {
  int32_t tokens = 0;
  double tokens_per_second = 0;
};

/// A model, its KV pool and its sequences. One owner thread: put, step, view, flush or close from a second thread
/// while one of them runs throws StateError, as does query. What never changes may be asked for at any time.
/// Move-only.
class Engine {
 public:
  /// Reads the weights, packs them and takes all memory. Throws ConfigError, CheckpointError, or
  /// MemoryError (with the plan) before anything large is allocated.
  Engine(const ModelConfig& model, WeightSource& weights, const EngineConfig& config, const ProgressFn& progress = {});
  ~Engine();
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;

  /// Queues a sequence; the next step may run it. An id whose sequence is finished goes on with
  /// `tokens` as its next turn, its keys and values kept; `cache_salt` is then empty or what it was. `priority`: lower
  /// is served first. Sequences of different `cache_salt` never share cached prefixes.
  PutResult put(SeqId id, std::span<const Token> tokens, const SamplingParams& params = {}, int32_t priority = 0,
                const std::string& cache_salt = {});

  /// One forward, planned by plan_splitfuse. With nothing to do it returns at once. Transactional: if
  /// it throws, no sequence has gained a token or lost one. Allocates nothing.
  const StepOutput& step();
  /// The same with the caller's plan. Throws InvalidArgument, nothing changed, if it cannot be served.
  const StepOutput& step(const StepPlan& plan);

  Capacity query() const;
  /// Throws InvalidArgument if the id is unknown.
  Progress query(SeqId id) const;
  /// The sequences to plan over, first served first, and the limits that step() would use. Of those that wait, all that
  /// a forward has sequences for, however many tokens they have: a caller may serve the last one first.
  Limits view(std::vector<SeqView>& out);
  /// True while any sequence has tokens to compute.
  bool has_work() const;

  /// Ends a sequence, finished or not. Its full blocks stay as evictable prefix cache. Throws
  /// InvalidArgument if the id is unknown.
  void flush(SeqId id);

  const MemoryPlan& memory_plan() const;
  const ModelConfig& model_config() const;
  /// What a token budget that was left open was chosen by, fewest tokens first; empty if it was given.
  const std::vector<BudgetPoint>& budget_curve() const;
  /// One line: device, ISA, threads, number format.
  std::string describe() const;

  /// Gives all memory back. Every later call throws StateError, but for close().
  void close();

  class Impl;
  struct Gate;

 private:
  friend struct EngineAccess;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Gate> gate_;
  std::unique_ptr<Impl> impl_;
};

/// The memory plan that an Engine of this configuration would take, without taking it. Throws ConfigError.
MemoryPlan plan_memory(const ModelConfig& model, const EngineConfig& config);

/// Which kernel runs one kind of operation.
struct KernelChoice {
  std::string operation;   // "linear", "head", "attention", "norms" or "sampling"
  std::string isa;         // the rung that the kernel was written for, at most the engine's
  std::string detail;      // for people: number formats and tile
};

/// The kernels that an Engine of this configuration would run. Throws ConfigError.
std::vector<KernelChoice> chosen_kernels(const EngineConfig& config);

}  // namespace splitfuse
