// Construction, intake and queries; step.cc has the step.
#include "engine/engine_impl.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <utility>

#include "base/check.h"

namespace splitfuse {
namespace {

bool served_before(const Sequence* a, const Sequence* b) {
  return a->priority != b->priority ? a->priority < b->priority : a->arrival < b->arrival;
}

/// Empty, or what is wrong with a sampling parameter.
std::string wrong_params(const SamplingParams& params, int32_t vocab) {
  const auto outside = [](const char* name, auto value, const char* expected) {
    return cat(name, " is ", value, ", expected ", expected);
  };
  constexpr float kLargest = std::numeric_limits<float>::max();
  const auto within = [](float value, float low, float high) {
    return value >= low && value <= high;
  };   // false for NaN
  if (params.max_tokens < 1) return outside("max_tokens", params.max_tokens, "at least 1");
  if (params.min_tokens < 0 || params.min_tokens > params.max_tokens)
    return outside("min_tokens", params.min_tokens, "0 to max_tokens");
  if (!within(params.temperature, 0.0f, kLargest)) return outside("temperature", params.temperature, "0 or more");
  if (!(params.top_p > 0.0f && params.top_p <= 1.0f)) return outside("top_p", params.top_p, "above 0, up to 1");
  if (params.top_k < 0) return outside("top_k", params.top_k, "0 (all) or more");
  if (!within(params.min_p, 0.0f, 1.0f)) return outside("min_p", params.min_p, "0 to 1");
  if (!(params.repetition_penalty > 0.0f && params.repetition_penalty <= kLargest))
    return outside("repetition_penalty", params.repetition_penalty, "more than 0");
  if (!within(params.presence_penalty, -2.0f, 2.0f))
    return outside("presence_penalty", params.presence_penalty, "-2 to 2");
  if (!within(params.frequency_penalty, -2.0f, 2.0f))
    return outside("frequency_penalty", params.frequency_penalty, "-2 to 2");
  if (params.logprobs < -1 || params.logprobs > kMaxLogprobs)
    return outside("logprobs", params.logprobs, cat("-1 (none) to ", kMaxLogprobs).c_str());
  if (params.prompt_logprobs < -1 || params.prompt_logprobs > kMaxLogprobs)
    return outside("prompt_logprobs", params.prompt_logprobs, cat("-1 (none) to ", kMaxLogprobs).c_str());
  const std::string ids = cat("token ids from 0 to ", vocab - 1);
  for (const auto& [token, bias] : params.logit_bias) {
    if (token < 0 || token >= vocab) return outside("a token of logit_bias", token, ids.c_str());
    if (!within(bias, -kLargest, kLargest)) return outside("a value of logit_bias", bias, "a finite number");
  }
  for (Token token : params.stop_token_ids) {
    if (token < 0 || token >= vocab) return outside("one of stop_token_ids", token, ids.c_str());
  }
  return {};
}

}  // namespace

Engine::Impl::Impl(const ModelConfig& model, WeightSource& weights, const EngineConfig& config,
                   const ProgressFn& progress, std::unique_ptr<Backend> backend)
    : model_(model), config_(config), backend_(std::move(backend)), sizing_(size_engine(model, config, *backend_)),
      weight_memory_(backend_->allocate(sizing_.plan.weights)),
      weights_(lay_out_weights(model, config.quantize, *backend_, weight_memory_.data(), &weight_places_)),
      window_(kv_window(model)), pool_(sizing_.plan.blocks, config.block_size, config.prefix_caching),
      builder_(sizing_.limits.max_rows, sizing_.limits.max_seqs) {
  load_weights(model_, *backend_, weights, std::exchange(weight_places_, {}), progress);
  kv_memory_ = backend_->allocate(sizing_.plan.kv_pool);
  const StepLimits& limits = sizing_.limits;
  workspace_memory_ = backend_->allocate(lay_out_workspace(model_, backend_->dtype(), limits, nullptr).bytes);
  const KvShape kv = kv_shape(model_, config_, sizing_.plan.blocks);
  backend_->prepare(attention_shape(model_, kv, limits.max_context, &weights_), limits, kv_memory_.data());
  decoder_ = std::make_unique<Decoder>(model_, *backend_, weights_,
                                       lay_out_workspace(model_, backend_->dtype(), limits, workspace_memory_.data()));
  sample_rows_.reserve(limits.max_logit_rows);
  results_.resize(limits.max_rows);
  rows_.reserve(limits.max_logit_rows);
  scheduled_.reserve(limits.max_seqs);
  plan_.chunks.reserve(limits.max_seqs);
  output_.sampled.reserve(limits.max_seqs);
  output_.prompt.reserve(limits.max_rows);
  output_.top.reserve(int64_t{limits.max_rows} * kMaxLogprobs);
  output_.chunks.reserve(limits.max_seqs);
  budget_ = config_.token_budget > 0 ? config_.token_budget : measure_budget();
}

/// The smallest budget whose throughput is within 5 % of the best: latency grows with the tokens of a forward,
/// throughput soon does not (FastGen's second observation). Never below the sequences of a forward, or decodes would
/// wait for each other.
int32_t Engine::Impl::measure_budget() {
  using Clock = std::chrono::steady_clock;
  constexpr int kLayers = 4;  // more than one, so that weights come from memory as in a real forward
  constexpr double kSeconds = 2.0;
  const int32_t block_size = config_.block_size;
  const int32_t largest = sizing_.plan.token_budget;
  const int64_t pool_tokens = int64_t{pool_.total()} * block_size;
  const auto longest =
      static_cast<int32_t>(std::min({int64_t{largest}, int64_t{sizing_.plan.max_model_len}, pool_tokens}));
  const int32_t seq_blocks = ceil_div(longest, block_size);
  std::vector<Token> tokens(largest, 0);
  std::vector<int32_t> positions(largest), table(pool_.total());
  for (int32_t i = 0; i < largest; ++i) positions[i] = i % longest;
  for (int32_t i = 0; i < pool_.total(); ++i) table[i] = i;
  // As many sequences as the rows need, each with KV blocks of its own; a pool too small for that bounds the rows.
  const int32_t most_rows = std::min(largest, pool_.total() / seq_blocks * longest);
  const int layers = std::min(kLayers, model_.num_layers);
  std::vector<int32_t> sizes;
  for (int32_t rows = most_rows; rows >= std::min(64, most_rows); rows /= 2) sizes.insert(sizes.begin(), rows);
  double best = 0;
  double fastest = 0;
  const auto started = Clock::now();
  for (int32_t rows : sizes) {
    // The next takes twice as long, twice over: a large model on a slow machine is measured as far as time allows.
    const double spent = std::chrono::duration<double>(Clock::now() - started).count();
    if (!curve_.empty() && spent + 4 * fastest > kSeconds) break;
    std::vector<RaggedSeq> seqs;
    for (int32_t begin = 0; begin < rows; begin += longest) {
      const int32_t* blocks = table.data() + begin / longest * seq_blocks;
      seqs.push_back({begin, std::min(longest, rows - begin), 0, blocks});
    }
    const RaggedBatch batch{std::span(tokens).first(rows), std::span(positions).first(rows), seqs, {}};
    fastest = 1e30;
    for (int repeat = 0; repeat < 2; ++repeat) {
      const auto begin = Clock::now();
      for (int layer = 0; layer < layers; ++layer) decoder_->forward_layer(batch, layer);
      fastest = std::min(fastest, std::chrono::duration<double>(Clock::now() - begin).count());
    }
    curve_.push_back({rows, rows / (fastest * model_.num_layers / layers)});
    best = std::max(best, curve_.back().tokens_per_second);
  }
  const auto good = [&](const BudgetPoint& point) { return point.tokens_per_second >= 0.95 * best; };
  const int32_t budget = std::find_if(curve_.begin(), curve_.end(), good)->tokens;
  return std::max(budget, sizing_.limits.max_seqs);
}

PutResult Engine::Impl::refuse(std::span<const Token> tokens, const SamplingParams& params, int32_t already) const {
  if (tokens.empty()) return {Put::kEmpty, "the prompt has no tokens"};
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= model_.vocab_size) {
      return {Put::kBadToken, cat("token ", i, " of the prompt is ", tokens[i], ", the vocabulary has ids 0 to ",
                                  model_.vocab_size - 1)};
    }
  }
  if (std::string wrong = wrong_params(params, model_.vocab_size); !wrong.empty()) {
    return {Put::kBadParams, std::move(wrong)};
  }
  const int64_t length = int64_t{already} + static_cast<int64_t>(tokens.size()) + params.max_tokens;
  if (length > sizing_.plan.max_model_len) {
    return {Put::kTooLong,
            cat("the prompt has ", already + tokens.size(), " tokens and max_tokens is ", params.max_tokens, ": ",
                length, " together, more than max_model_len ", sizing_.plan.max_model_len)};
  }
  return {};
}

Sequence& Engine::Impl::find(SeqId id) const {
  const auto at = sequences_.find(id);
  if (at == sequences_.end()) throw InvalidArgument(cat("there is no sequence ", id));
  return *at->second;
}

/// All lists that name sequences have room for every one, so that a step never grows them.
Sequence& Engine::Impl::add_sequence(SeqId id) {
  const size_t count = sequences_.size() + 1;
  const auto reserve = [count](auto& list, size_t more = 0) {
    if (list.capacity() < count + more) list.reserve(2 * count + more);
  };
  reserve(live_);
  reserve(idle_);
  reserve(views_);
  reserve(viewed_);
  reserve(named_, sizing_.limits.max_seqs);
  reserve(tables_);
  reserve(plan_.preempt);
  reserve(output_.preempted);
  auto sequence = std::make_unique<Sequence>();
  sequence->id = id;
  return *sequences_.emplace(id, std::move(sequence)).first->second;
}

PutResult Engine::Impl::put(SeqId id, std::span<const Token> tokens, const SamplingParams& params, int32_t priority,
                            const std::string& salt) {
  const auto known = sequences_.find(id);
  const bool next_turn = known != sequences_.end();
  if (next_turn && known->second->finish == Finish::kNone) {
    return {Put::kDuplicate, cat("sequence ", id, " is still being served")};
  }
  PutResult result = refuse(tokens, params, next_turn ? known->second->known() : 0);
  if (!result) return result;
  const BlockKey root = keyer_.root(salt);
  if (next_turn && !salt.empty() && !(root == known->second->root)) {
    return {Put::kBadParams, cat("sequence ", id, " has another cache_salt; a next turn keeps it")};
  }
  Sequence& seq = next_turn ? *known->second : add_sequence(id);
  if (next_turn) std::erase(idle_, &seq);
  if (!next_turn) seq.root = root;
  seq.priority = priority;
  seq.arrival = arrivals_++;
  seq.params = params;
  seq.tokens.reserve(seq.tokens.size() + tokens.size() + params.max_tokens);
  seq.tokens.insert(seq.tokens.end(), tokens.begin(), tokens.end());
  seq.prompt = seq.known();
  seq.reported = std::max(1, seq.prompt - static_cast<int32_t>(tokens.size()));
  seq.finish = Finish::kNone;
  seq.looked_up = seq.computed > 0;
  seq.cached = seq.computed;
  const size_t blocks = ceil_div<size_t>(seq.tokens.capacity(), config_.block_size);
  seq.blocks.reserve(blocks);
  seq.keys.reserve(blocks);
  seq.stop_ids = params.stop_token_ids;
  if (!params.ignore_eos) {
    seq.stop_ids.insert(seq.stop_ids.end(), model_.eos_token_ids.begin(), model_.eos_token_ids.end());
  }
  enlist(seq);
  return {};
}

void Engine::Impl::enlist(Sequence& seq) {
  live_.insert(std::upper_bound(live_.begin(), live_.end(), &seq, served_before), &seq);
  if (!seq.blocks.empty()) ++holders_;
}

/// Takes a sequence out of service.
void Engine::Impl::retire(Sequence& seq) {
  live_.erase(std::lower_bound(live_.begin(), live_.end(), &seq, served_before));
  if (!seq.blocks.empty()) --holders_;
}

void Engine::Impl::flush(SeqId id) {
  Sequence& seq = find(id);
  if (seq.finish == Finish::kNone) {
    retire(seq);
  } else {
    std::erase(idle_, &seq);
  }
  pool_.release(seq.held());
  sequences_.erase(id);
}

Capacity Engine::Impl::query() const {
  Capacity capacity;
  capacity.total_blocks = pool_.total();
  capacity.free_blocks = pool_.available();
  capacity.cached_blocks = pool_.cached();
  capacity.used_blocks = pool_.used();
  capacity.running = holders_;
  capacity.waiting = static_cast<int32_t>(live_.size()) - holders_;
  capacity.token_budget = budget_;
  capacity.max_step_tokens = sizing_.limits.max_rows;
  capacity.max_sequences = sizing_.limits.max_seqs;
  capacity.max_model_len = sizing_.plan.max_model_len;
  capacity.block_size = config_.block_size;
  capacity.prefix_queries = prefix_queries_;
  capacity.prefix_hits = prefix_hits_;
  return capacity;
}

Progress Engine::Impl::query(SeqId id) const {
  const Sequence& seq = find(id);
  return {seq.prompt,      seq.known(), seq.computed, seq.cached, static_cast<int32_t>(seq.blocks.size()),
          seq.preemptions, seq.finish};
}

Limits Engine::Impl::limits() const {
  return {budget_, sizing_.limits.max_seqs, pool_.available(), pool_.total(), config_.block_size};
}

Limits Engine::Impl::view(std::vector<SeqView>& out) {
  make_views(out, std::numeric_limits<int64_t>::max());
  count_shared(out);
  return limits();
}

std::string Engine::Impl::describe() const {
  const bool dense = config_.quantize == WeightFormat::kDense;
  return cat(backend_->describe(), dense ? "" : cat(", ", weight_format_name(config_.quantize), " weights"),
             config_.kv_dtype == KvDType::kInt8 ? ", int8 KV cache" : "", ", token budget ", budget_);
}

std::string Engine::Impl::check() const {
  std::vector<std::span<const BlockId>> tables;
  int32_t holders = 0;
  for (const auto& [id, owned] : sequences_) {
    const Sequence& seq = *owned;
    tables.push_back(seq.held());
    const bool live = seq.finish == Finish::kNone;
    holders += live && !seq.blocks.empty();
    const auto& list = live ? live_ : idle_;
    if (std::count(list.begin(), list.end(), &seq) != 1)
      return cat("sequence ", id, " is not in its list exactly once");
    if (seq.computed < 0 || seq.computed > seq.known())
      return cat("sequence ", id, " has computed ", seq.computed, " of ", seq.known());
    if (live && seq.computed == seq.known()) return cat("live sequence ", id, " has nothing to do");
    const auto held = static_cast<int32_t>(seq.blocks.size());
    if (held != ceil_div(seq.computed, config_.block_size)) {
      return cat("sequence ", id, " has ", held, " blocks in its table for ", seq.computed, " tokens");
    }
    const bool none = std::all_of(seq.blocks.begin(), seq.blocks.begin() + seq.behind,
                                  [](BlockId block) { return block == kNoBlock; });
    if (!none || seq.behind > pool_.first_seen(seq.computed, window_)) {
      return cat("sequence ", id, " has given back ", seq.behind, " blocks; with ", seq.computed,
                 " tokens computed its window has passed ", pool_.first_seen(seq.computed, window_));
    }
  }
  if (live_.size() + idle_.size() != sequences_.size()) return "a list names a sequence that is gone";
  if (!std::is_sorted(live_.begin(), live_.end(), served_before)) return "live sequences are out of order";
  if (holders != holders_) return cat("counted ", holders_, " holders of blocks, there are ", holders);
  return pool_.check(tables);
}

}  // namespace splitfuse
