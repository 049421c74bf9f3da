// One step: plan, reserve, build, forward, sample, commit. A failure before commit leaves every sequence as it was.
#include <algorithm>
#include <chrono>
#include <utility>

#include "base/check.h"
#include "engine/engine_impl.h"

namespace splitfuse {
namespace {

using Clock = std::chrono::steady_clock;

double microseconds(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double, std::micro>(end - begin).count();
}

}  // namespace

const StepOutput& Engine::Impl::step(const StepPlan* plan) {
  const auto begin = Clock::now();
  output_.sampled.clear();
  output_.prompt.clear();
  output_.top.clear();
  output_.chunks.clear();
  output_.preempted.clear();
  output_.decode_tokens = output_.prefill_tokens = output_.cached_tokens = 0;
  output_.host_us = output_.forward_us = 0;
  output_.barriers = 0;

  if (plan) {
    check_plan(*plan);
    viewed_.clear();
  } else {
    make_views(views_, budget_);
    // What sequences share matters only to a planner that may have to preempt.
    const int32_t most_needed = sizing_.limits.max_seqs + budget_ / config_.block_size;
    if (pool_.available() < most_needed) count_shared(views_);
    plan_splitfuse(views_, limits(), plan_);
    plan = &plan_;
  }
  // Preemption is a change of its own: it costs a recomputation, never a token, so it is not undone. A sequence that
  // holds cached blocks and has not run since gives them back at no cost, and is none.
  for (SeqId id : plan->preempt) {
    Sequence& seq = find(id);
    const bool loses = seq.computed > seq.attached;
    drop_blocks(seq);
    if (!loses) continue;
    ++seq.preemptions;
    output_.preempted.push_back(id);
  }
  if (plan->chunks.empty()) return output_;
  reserve(*plan);
  const auto planned = Clock::now();
  const uint32_t barriers = backend_->barriers();
  try {
    run();
  } catch (...) {
    unreserve();
    throw;
  }
  const auto ran = Clock::now();
  output_.barriers = static_cast<int32_t>(backend_->barriers() - barriers);
  commit();
  output_.forward_us = microseconds(planned, ran);
  output_.host_us = microseconds(begin, planned) + microseconds(ran, Clock::now());
  return output_;
}

/// Takes what the prefix cache holds of a sequence that has not begun. At least one token is left to compute,
/// since its logits are needed; prompt log-probabilities need them all.
void Engine::Impl::attach_prefix(Sequence& seq) {
  if (!pool_.prefix_caching() || seq.computed > 0 || seq.wants_prompt_logprobs()) return;
  const auto keys = seq.keys_to(seq.known() - 1, config_.block_size, keyer_);
  const int32_t found = pool_.match(keys, window_);
  if (found == 0) return;
  seq.behind = pool_.first_seen(found * config_.block_size, window_);
  seq.blocks.assign(seq.behind, kNoBlock);
  pool_.share(keys.subspan(seq.behind, found - seq.behind), seq.blocks);
  seq.computed = seq.attached = found * config_.block_size;
  ++holders_;
}

/// Every sequence that holds blocks, and as many waiting ones as a forward of `tokens` could take, in service order;
/// then the finished ones, as victims, longest finished last: victims are taken from the back.
void Engine::Impl::make_views(std::vector<SeqView>& out, int64_t tokens) {
  out.clear();
  viewed_.clear();
  const auto add = [&](Sequence& seq, int32_t known) {
    out.push_back({seq.id, known, seq.computed, static_cast<int32_t>(seq.blocks.size()), 0, seq.priority, seq.behind});
    viewed_.push_back(&seq);
  };
  int32_t holders = holders_;
  int32_t slots = sizing_.limits.max_seqs;
  for (Sequence* seq : live_) {
    const bool waiting = seq->blocks.empty();
    if (waiting && (tokens <= 0 || slots <= 0)) {
      if (holders == 0) break;
      continue;
    }
    if (waiting) {
      attach_prefix(*seq);
    } else {
      --holders;
    }
    tokens -= seq->todo();
    --slots;
    add(*seq, seq->known());
  }
  for (auto seq = idle_.rbegin(); seq != idle_.rend(); ++seq) {
    if (!(*seq)->blocks.empty()) add(**seq, (*seq)->computed);
  }
}

void Engine::Impl::count_shared(std::vector<SeqView>& views) const {
  for (size_t i = 0; i < views.size(); ++i) views[i].shared = pool_.shared(viewed_[i]->held());
}

void Engine::Impl::check_plan(const StepPlan& plan) {
  const auto refuse = [](const auto&... what) { throw InvalidArgument(cat("the plan cannot be served: ", what...)); };
  if (static_cast<int64_t>(plan.chunks.size()) > sizing_.limits.max_seqs) {
    refuse(plan.chunks.size(), " sequences, the forward takes ", sizing_.limits.max_seqs);
  }
  int64_t tokens = 0, need = 0;
  named_.clear();
  tables_.clear();
  for (SeqId id : plan.preempt) {
    const Sequence& seq = find(id);
    if (seq.blocks.empty()) refuse("sequence ", id, " to preempt holds no blocks");
    tables_.push_back(seq.held());
    named_.push_back(id);
  }
  for (const Chunk& chunk : plan.chunks) {
    const Sequence& seq = find(chunk.id);
    if (chunk.tokens < 1 || chunk.tokens > seq.todo()) {
      refuse("a chunk of ", chunk.tokens, " tokens of sequence ", chunk.id, ", which has ", seq.todo(), " to do");
    }
    tokens += chunk.tokens;
    need += ceil_div(seq.computed + chunk.tokens, config_.block_size) - static_cast<int32_t>(seq.blocks.size());
    named_.push_back(chunk.id);
  }
  std::sort(named_.begin(), named_.end());
  const auto twice = std::adjacent_find(named_.begin(), named_.end());
  if (twice != named_.end()) refuse("sequence ", *twice, " is named twice");
  if (tokens > sizing_.limits.max_rows) refuse(tokens, " tokens, the forward takes ", sizing_.limits.max_rows);
  const int32_t available = pool_.available_after(tables_);
  if (need > available) refuse("it needs ", need, " KV blocks, ", available, " would be free");
}

void Engine::Impl::drop_blocks(Sequence& seq) {
  if (seq.blocks.empty()) return;
  pool_.release(seq.held());
  seq.blocks.clear();
  seq.computed = seq.attached = seq.behind = 0;
  if (seq.finish == Finish::kNone) --holders_;
}

/// Our own plan names sequences in the order of their views, twice over: decodes, then the others. So a walk finds
/// them without a look into the table of all sequences; a caller's plan may have any order.
Sequence& Engine::Impl::find_near(SeqId id, size_t& next) const {
  for (size_t looked = 0; looked < viewed_.size(); ++looked) {
    if (next == viewed_.size()) next = 0;
    Sequence* seq = viewed_[next++];
    if (seq->id == id) return *seq;
  }
  return find(id);
}

void Engine::Impl::reserve(const StepPlan& plan) {
  builder_.clear();
  scheduled_.clear();
  size_t next = 0;
  for (const Chunk& chunk : plan.chunks) {
    Sequence& seq = find_near(chunk.id, next);
    const auto before = static_cast<int32_t>(seq.blocks.size());
    const int32_t more = ceil_div(seq.computed + chunk.tokens, config_.block_size) - before;
    scheduled_.push_back({&seq, chunk.tokens, before});
    const bool enough = pool_.allocate(more, seq.blocks);
    SPLITFUSE_ASSERT(enough);
    if (before == 0) ++holders_;
    builder_.add(seq, chunk.tokens);
    if (std::exchange(seq.looked_up, true)) continue;
    seq.cached = seq.computed;
    if (pool_.prefix_caching() && !seq.wants_prompt_logprobs()) {
      prefix_queries_ += seq.known();
      prefix_hits_ += seq.computed;
    }
  }
}

void Engine::Impl::unreserve() {
  for (const auto& [seq, tokens, before] : scheduled_) {
    pool_.release(std::span<const BlockId>(seq->blocks).subspan(before));
    seq->blocks.resize(before);
    if (before == 0) --holders_;
  }
}

void Engine::Impl::run() {
  decoder_->forward(builder_.batch());
  choose();
}

/// Makes logits and chooses from them a group of rows at a time, so that no buffer holds them all.
void Engine::Impl::choose() {
  const auto& wanted = builder_.logit_rows();
  for (size_t begin = 0; begin < wanted.size(); begin += sizing_.limits.max_logit_rows) {
    const size_t count = std::min<size_t>(wanted.size() - begin, sizing_.limits.max_logit_rows);
    rows_.clear();
    sample_rows_.clear();
    for (const LogitRow& row : std::span(wanted).subspan(begin, count)) {
      const Sequence& seq = *row.seq;
      SampleRow sample;
      sample.params = &seq.params;
      sample.tokens = std::span(seq.tokens).first(row.position + 1);
      sample.prompt = seq.prompt;
      sample.top = row.samples ? seq.params.logprobs : seq.params.prompt_logprobs;
      if (!row.samples) sample.target = seq.tokens[row.position + 1];
      if (row.samples && seq.output() < seq.params.min_tokens) sample.stop_ids = seq.stop_ids;
      rows_.push_back(row.row);
      sample_rows_.push_back(sample);
    }
    float* logits = decoder_->logits(rows_);
    backend_->sample(logits, sample_rows_, std::span(results_).subspan(begin, count));
  }
}

void Engine::Impl::commit() {
  // A sequence whose logits were not finite ends here, before its blocks could be published. The forward has driven
  // everything out of the caches: asked for together here, the lines come back while others are waited for.
  const auto& wanted = builder_.logit_rows();
  for (size_t i = 0; i < wanted.size(); ++i) {
    Sequence& seq = *wanted[i].seq;
    if (results_[i].token < 0) seq.finish = Finish::kError;
    __builtin_prefetch(seq.tokens.data() + seq.tokens.size(), 1);
    __builtin_prefetch(seq.stop_ids.data());
    __builtin_prefetch(&seq.blocks);
  }
  for (const Scheduled& chunk : scheduled_) commit_chunk(chunk);
  for (size_t i = 0; i < wanted.size(); ++i) {
    Sequence& seq = *wanted[i].seq;
    if (seq.finish == Finish::kNone) {
      commit_logits(wanted[i], results_[i]);
    } else if (i == 0 || wanted[i - 1].seq != &seq) {  // its rows are adjacent
      finish(seq, {seq.id, -1, Finish::kError});
    }
  }
}

void Engine::Impl::commit_chunk(const Scheduled& chunk) {
  Sequence& seq = *chunk.seq;
  const bool decode = seq.computed > 0 && seq.known() - seq.computed == 1;
  (decode ? output_.decode_tokens : output_.prefill_tokens) += chunk.tokens;
  output_.chunks.push_back({seq.id, chunk.tokens});
  output_.cached_tokens += std::exchange(seq.attached, 0);
  const int32_t full_before = seq.computed / config_.block_size;
  seq.computed += chunk.tokens;
  if (seq.finish == Finish::kError) return;
  if (pool_.prefix_caching() && seq.computed / config_.block_size > full_before) {
    const auto keys = seq.keys_to(seq.computed, config_.block_size, keyer_);
    for (auto i = static_cast<size_t>(full_before); i < keys.size(); ++i) {
      seq.blocks[i] = pool_.publish(seq.blocks[i], keys[i]);
    }
  }
  give_back_behind(seq);
}

/// Blocks that the next token sees in no layer any more; what they hold may be found by others as long as it lasts.
void Engine::Impl::give_back_behind(Sequence& seq) {
  const int32_t first = pool_.first_seen(seq.computed, window_);
  if (first <= seq.behind) return;
  pool_.release(seq.held().first(first - seq.behind));
  std::fill(seq.blocks.begin() + seq.behind, seq.blocks.begin() + first, kNoBlock);
  seq.behind = first;
}

Finish Engine::Impl::finish_of(const Sequence& seq, Token token) const {
  if (std::find(seq.stop_ids.begin(), seq.stop_ids.end(), token) != seq.stop_ids.end()) return Finish::kStop;
  const bool full = seq.output() >= seq.params.max_tokens || seq.known() >= sizing_.plan.max_model_len;
  return full ? Finish::kLength : Finish::kNone;
}

void Engine::Impl::commit_logits(const LogitRow& row, const SampleResult& result) {
  Sequence& seq = *row.seq;
  const auto top_begin = static_cast<int32_t>(output_.top.size());
  output_.top.insert(output_.top.end(), result.top, result.top + result.top_count);
  if (!row.samples) {
    output_.prompt.push_back({seq.id, row.position + 1, seq.tokens[row.position + 1], result.logprob, result.rank,
                              top_begin, result.top_count});
    seq.reported = row.position + 2;
    return;
  }
  seq.tokens.push_back(result.token);
  const Sampled sampled{.id = seq.id,
                        .token = result.token,
                        .finish = finish_of(seq, result.token),
                        .logprob = result.logprob,
                        .rank = result.rank,
                        .top_begin = top_begin,
                        .top_count = result.top_count};
  if (sampled.finish == Finish::kNone) {
    output_.sampled.push_back(sampled);
  } else {
    finish(seq, sampled);
  }
}

void Engine::Impl::finish(Sequence& seq, const Sampled& last) {
  output_.sampled.push_back(last);
  retire(seq);
  seq.finish = last.finish;
  idle_.push_back(&seq);
  // Its blocks were not published: what a next turn adds could not be found behind them. It begins anew.
  if (last.finish == Finish::kError) drop_blocks(seq);
}

}  // namespace splitfuse
