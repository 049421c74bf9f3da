#include "cpu/sampler.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numbers>

#include "base/check.h"
#include "base/philox.h"

namespace splitfuse {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Logits are looked at in chunks of this many: sums are kept per chunk, finds are few at a time.
constexpr int32_t kChunk = 1024;
// Parts that top_p sorts weights into.
constexpr int32_t kBuckets = 1024;

struct Candidate {
  float logit;
  int32_t id;
};
// The order of preference: larger first, ties by lower id.
bool before(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

// One thread's scratch memory.
struct Scratch {
  float* raw;              // [vocab] the logits as they came
  int32_t* counts;         // [vocab] zero between rows
  int32_t* touched;        // [vocab]
  Candidate* candidates;   // [vocab]
  double* sums;            // [chunks]
  double* buckets;         // [kBuckets]
  float* weights;          // [kChunk]
  int32_t* found;          // [kChunk]

  static int64_t bytes(int64_t vocab) {
    const int64_t row = round_up(vocab, int64_t{16});
    return row * int64_t{3 * sizeof(float) + sizeof(Candidate)} +
           (round_up(ceil_div<int64_t>(vocab, kChunk), int64_t{16}) + kBuckets) * int64_t{sizeof(double)} +
           kChunk * int64_t{sizeof(float) + sizeof(int32_t)};
  }

  Scratch(std::byte* memory, int64_t vocab) {
    const int64_t row = round_up(vocab, int64_t{16});
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory);
      memory += count * static_cast<int64_t>(sizeof *pointer);
    };
    take(raw, row);
    take(counts, row);
    take(touched, row);
    take(candidates, row);
    take(sums, round_up(ceil_div<int64_t>(vocab, kChunk), int64_t{16}));
    take(buckets, kBuckets);
    take(weights, kChunk);
    take(found, kChunk);
  }
};

// Chooses from one row.
class Chooser {
 public:
  Chooser(const RowKernels& kernels, const Scratch& scratch, float* logits, int32_t vocab)
      : kernels_(kernels), scratch_(scratch), logits_(logits), vocab_(vocab) {}

  SampleResult choose(const SampleRow& row) {
    SampleResult result;
    const RowMax raw_max = kernels_.max(logits_, vocab_);
    if (raw_max.nan || !std::isfinite(raw_max.value)) return result;
    const float* raw = logits_;
    double log_total = 0.0;
    if (row.top >= 0) {
      max_ = raw_max.value;
      scale_ = std::numbers::log2e_v<float>;
      floor_ = -kInfinity;
      log_total = max_ + std::log(total());
      report_top(row.top, log_total, result);
    }
    if (row.target >= 0) {
      result.token = row.target;
    } else {
      RowMax max = raw_max;
      if (adjusts(row)) {
        if (row.top >= 0) raw = std::copy_n(logits_, vocab_, scratch_.raw) - vocab_;
        adjust(row);
        max = kernels_.max(logits_, vocab_);
        if (max.nan || !std::isfinite(max.value)) return SampleResult{};
      }
      result.token = row.params->temperature == 0.0f ? max.index : draw(row, max.value);
    }
    if (row.top >= 0) {
      result.logprob = static_cast<float>(raw[result.token] - log_total);
      result.rank = rank(raw, result.token);
    }
    return result;
  }

 private:
  // Calls visit(index) for every logit that is at least floor(), which may rise on the way, ascending.
  template <class Floor, class Visit>
  void for_each_at_least(int32_t begin, const Floor& floor, const Visit& visit) {
    for (; begin < vocab_; begin += kChunk) {
      const int32_t found = kernels_.find(logits_ + begin, std::min(kChunk, vocab_ - begin), floor(), scratch_.found);
      for (int32_t i = 0; i < found; ++i) visit(begin + scratch_.found[i]);
    }
  }

  // The sum of weights of logits that are at least floor_; leaves it per chunk in sums.
  double total() {
    double sum = 0.0;
    for (int32_t begin = 0; begin < vocab_; begin += kChunk) {
      const double part =
          kernels_.weigh(logits_ + begin, std::min(kChunk, vocab_ - begin), max_, scale_, floor_, scratch_.weights);
      scratch_.sums[begin / kChunk] = part;
      sum += part;
    }
    return sum;
  }

  // Where a token stands among the logits `raw`; 1 is the first.
  int32_t rank(const float* raw, Token token) const {
    const Candidate own{raw[token], token};
    int32_t rank = 1;
    for (int32_t begin = 0; begin < vocab_; begin += kChunk) {
      const int32_t found = kernels_.find(raw + begin, std::min(kChunk, vocab_ - begin), own.logit, scratch_.found);
      for (int32_t i = 0; i < found; ++i) {
        const int32_t id = begin + scratch_.found[i];
        rank += before({raw[id], id}, own) ? 1 : 0;
      }
    }
    return rank;
  }

  void report_top(int32_t count, double log_total, SampleResult& result) {
    count = std::min({count, kMaxLogprobs, vocab_});
    if (count <= 0) return;
    Candidate best[kMaxLogprobs];
    int32_t held = 0;
    for_each_at_least(
        0, [&] { return held < count ? -kInfinity : best[count - 1].logit; },
        [&](int32_t id) {
          const Candidate next{logits_[id], id};
          if (held == count && !before(next, best[count - 1])) return;
          int32_t at = held < count ? held++ : count - 1;
          for (; at > 0 && before(next, best[at - 1]); --at) best[at] = best[at - 1];
          best[at] = next;
        });
    result.top_count = held;
    for (int32_t i = 0; i < held; ++i) {
      result.top[i] = {best[i].id, static_cast<float>(best[i].logit - log_total)};
    }
  }

  static bool penalises(const SamplingParams& params) {
    return params.repetition_penalty != 1.0f || params.presence_penalty != 0.0f || params.frequency_penalty != 0.0f;
  }
  static bool adjusts(const SampleRow& row) {
    return penalises(*row.params) || !row.params->logit_bias.empty() || !row.stop_ids.empty();
  }
  bool in_vocab(Token token) const { return token >= 0 && token < vocab_; }

  void adjust(const SampleRow& row) {
    if (penalises(*row.params)) penalise(row);
    for (const auto& [token, bias] : row.params->logit_bias) {
      if (in_vocab(token)) logits_[token] += bias;
    }
    // A stop token outside the vocabulary cannot be chosen anyway.
    for (const Token token : row.stop_ids) {
      if (in_vocab(token)) logits_[token] = -kInfinity;
    }
  }

  // Repetition penalty as in CTRL (arXiv:1909.05858), with its sign corrected for negative logits as in transformers;
  // presence and frequency penalties as in the OpenAI API.
  void penalise(const SampleRow& row) {
    const SamplingParams& params = *row.params;
    int32_t touched = 0;
    const auto touch = [&](Token token, int32_t amount) {
      // 2 * (times in the output) + 1, so that a token of the prompt alone is not zero.
      if (scratch_.counts[token] == 0) {
        scratch_.counts[token] = 1;
        scratch_.touched[touched++] = token;
      }
      scratch_.counts[token] += amount;
    };
    const auto prompt = static_cast<size_t>(row.prompt);
    for (size_t i = 0; i < row.tokens.size(); ++i) {
      if (in_vocab(row.tokens[i])) touch(row.tokens[i], i < prompt ? 0 : 2);
    }
    for (int32_t i = 0; i < touched; ++i) {
      const int32_t token = scratch_.touched[i];
      const int32_t times = scratch_.counts[token] / 2;
      scratch_.counts[token] = 0;
      float& logit = logits_[token];
      logit = logit > 0.0f ? logit / params.repetition_penalty : logit * params.repetition_penalty;
      if (times > 0) logit -= static_cast<float>(times) * params.frequency_penalty + params.presence_penalty;
    }
  }

  Token draw(const SampleRow& row, float max) {
    const SamplingParams& params = *row.params;
    max_ = max;
    // A temperature near zero must not make the scale infinite: the maximum times it would be NaN.
    const double scale = std::min(1.0 / static_cast<double>(params.temperature), 1e30);
    scale_ = static_cast<float>(scale * std::numbers::log2e);
    floor_ = params.min_p > 0.0f ? static_cast<float>(max_ + std::log(static_cast<double>(params.min_p)) / scale)
                                 : -kInfinity;
    if (params.top_k > 0 && params.top_k < vocab_) keep_top_k(params.top_k);
    if (params.top_p < 1.0f) keep_top_p(static_cast<double>(params.top_p), scale);
    const double u = philox_uniform(params.seed, static_cast<uint32_t>(params.sample_index),
                                    static_cast<uint32_t>(row.tokens.size()));
    return invert(u * total());
  }

  // Nothing after `last` in the order of preference stays.
  void cut_after(const Candidate& last) {
    floor_ = last.logit;
    for_each_at_least(
        last.id + 1, [&] { return floor_; },
        [&](int32_t id) {
          if (logits_[id] == last.logit) logits_[id] = -kInfinity;
        });
  }

  void keep_top_k(int32_t k) {
    Candidate* const held = scratch_.candidates;
    const int64_t enough = 2 * int64_t{k} + kChunk;
    int64_t count = 0;
    float floor = floor_;
    bool dropped = false;
    const auto prune = [&] {
      std::nth_element(held, held + k - 1, held + count, before);
      count = k;
      dropped = true;
      floor = held[k - 1].logit;
    };
    for_each_at_least(
        0, [&] { return floor; },
        [&](int32_t id) {
          held[count++] = {logits_[id], id};
          if (count == enough) prune();
        });
    if (count > k) prune();
    if (dropped) cut_after(held[k - 1]);
  }

  // Keeps the smallest set, in the order of preference, that holds `share` of the weight that is left.
  void keep_top_p(double share, double scale) {
    const double target = share * total();
    const float floor = floor_;
    // Look among the likeliest first: weights of at least e^-4, e^-8, e^-16, then all.
    int depth = 4;
    for (; depth <= 16; depth *= 2) {
      floor_ = std::max(floor, static_cast<float>(max_ - depth / scale));
      if (floor_ == floor || total() >= target) break;
    }
    if (depth > 16) floor_ = floor;

    // Weigh them by how deep below the maximum they lie, and look closer only where the sum passes the target.
    const double buckets_per_logit = scale * kBuckets / depth;
    const auto bucket_of = [&](int32_t id) {
      return static_cast<int32_t>(std::min<double>((max_ - logits_[id]) * buckets_per_logit, kBuckets - 1));
    };
    std::fill_n(scratch_.buckets, kBuckets, 0.0);
    for (int32_t begin = 0; begin < vocab_; begin += kChunk) {
      const int32_t count = std::min(kChunk, vocab_ - begin);
      kernels_.weigh(logits_ + begin, count, max_, scale_, floor_, scratch_.weights);
      const int32_t found = kernels_.find(logits_ + begin, count, floor_, scratch_.found);
      for (int32_t i = 0; i < found; ++i) {
        const int32_t at = scratch_.found[i];
        scratch_.buckets[bucket_of(begin + at)] += static_cast<double>(scratch_.weights[at]);
      }
    }
    double missing = target;
    int32_t bucket = 0;
    int32_t used = 0;   // the last bucket with any weight: rounding may carry the target past them all
    for (; bucket < kBuckets; ++bucket) {
      if (scratch_.buckets[bucket] == 0.0) continue;
      used = bucket;
      if (scratch_.buckets[bucket] >= missing) break;
      missing -= scratch_.buckets[bucket];
    }
    int32_t count = 0;
    for_each_at_least(
        0, [&] { return floor_; },
        [&](int32_t id) {
          if (bucket_of(id) == used) scratch_.candidates[count++] = {logits_[id], id};
        });
    cut_after(
        last_kept(scratch_.candidates, count, bucket == used ? missing : std::numeric_limits<double>::infinity()));
  }

  // The candidate, in the order of preference, with which the sum of weights reaches `missing`; else the last.
  Candidate last_kept(Candidate* held, int32_t count, double missing) const {
    constexpr int32_t kFew = 32;
    int32_t begin = 0;
    int32_t end = count;
    while (end - begin > kFew) {
      const int32_t middle = begin + (end - begin) / 2;
      std::nth_element(held + begin, held + middle, held + end, before);
      double sum = 0.0;
      for (int32_t i = begin; i < middle; ++i) sum += weight(held[i]);
      if (sum >= missing) {
        end = middle;
      } else {
        missing -= sum;
        begin = middle;
      }
    }
    std::sort(held + begin, held + end, before);
    int32_t last = begin;
    for (; last + 1 < end; ++last) {
      missing -= weight(held[last]);
      if (missing <= 0.0) break;
    }
    return held[last];
  }

  double weight(const Candidate& candidate) const { return std::exp2((candidate.logit - max_) * scale_); }

  // The first token at which the running sum of weights passes `target`, of the chunk sums that total() left.
  Token invert(double target) {
    const int32_t chunks = ceil_div(vocab_, kChunk);
    int32_t chunk = 0;
    bool inside = false;
    for (int32_t c = 0; c < chunks && !inside; ++c) {
      if (scratch_.sums[c] == 0.0) continue;
      chunk = c;
      inside = target < scratch_.sums[c];
      if (!inside) target -= scratch_.sums[c];
    }
    // Rounding may carry the target past everything: then it is the last token that has any weight.
    if (!inside) target = std::numeric_limits<double>::infinity();
    const int32_t begin = chunk * kChunk;
    const int32_t count = std::min(kChunk, vocab_ - begin);
    kernels_.weigh(logits_ + begin, count, max_, scale_, floor_, scratch_.weights);
    Token last = begin;
    for (int32_t i = 0; i < count; ++i) {
      if (scratch_.weights[i] == 0.0f) continue;
      last = begin + i;
      target -= static_cast<double>(scratch_.weights[i]);
      if (target < 0.0) break;
    }
    return last;
  }

  const RowKernels& kernels_;
  const Scratch& scratch_;
  float* logits_;
  int32_t vocab_;
  // What a weight is: 2^((logit - max_) * scale_) for logits of at least floor_, else 0.
  float max_ = 0.0f;
  float scale_ = 0.0f;
  float floor_ = 0.0f;
};

}  // namespace

Sampler::Sampler(Isa isa, ThreadPool& pool) : pool_(pool), kernels_(make_row_kernels(DType::kF32, isa)) {}

int64_t Sampler::scratch_bytes(const StepLimits& limits) const { return Scratch::bytes(limits.vocab) * pool_.size(); }

void Sampler::prepare(const StepLimits& limits) {
  vocab_ = limits.vocab;
  thread_bytes_ = Scratch::bytes(vocab_);
  memory_ = Memory(scratch_bytes(limits), &pool_);
}

void Sampler::sample(float* logits, std::span<const SampleRow> rows, std::span<SampleResult> results) {
  SPLITFUSE_ASSERT(rows.size() == results.size());
  const int64_t stride = row_stride(vocab_);
  std::atomic<size_t> next{0};
  pool_.run([&](int thread) {
    const Scratch scratch(memory_.data() + thread * thread_bytes_, vocab_);
    for (size_t row = next.fetch_add(1, std::memory_order_relaxed); row < rows.size();
         row = next.fetch_add(1, std::memory_order_relaxed)) {
      results[row] = Chooser(kernels_, scratch, logits + static_cast<int64_t>(row) * stride, vocab_).choose(rows[row]);
    }
  });
}

}  // namespace splitfuse
