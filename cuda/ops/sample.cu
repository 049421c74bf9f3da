// The choice of a token: a block for each row, which goes over its logits a few times, out of the second-level cache.
// Nothing is sorted: top_k and top_p look for the logit at which a sum passes its target, by histograms over its bits.
// Those sums are of integers, weights as multiples of 2^-40, so that the order in which threads add does not matter.
//
// Of the logits a cut keeps those before it in the order of preference: larger first, ties by lower id.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "base/check.h"
#include "cuda/device/launch.cuh"
#include "cuda/ops/order.cuh"
#include "cuda/ops/reduce.cuh"
#include "cuda/ops/sample.h"

namespace splitfuse::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kLanes;
constexpr int32_t kChunk = 1024;
constexpr int kBinBits = 10;
constexpr int32_t kNoEnd = INT32_MAX;
static_assert(1 << kBinBits == kThreads, "a thread has a bin");

struct Shared {
  Wide bins[kThreads];
  Wide room[kWarps];
  double sum_room[kWarps];
  int32_t bin;
  Wide before_bin;
  int32_t located;
  int32_t held;
  int32_t top_id[kMostTop];
  float top_logit[kMostTop];
};

/// The last that stays: a logit, and of those equal to it the highest id.
struct Cut {
  uint32_t key = 0;
  int32_t last = kNoEnd;
  __device__ __forceinline__ bool keeps(uint32_t k, int32_t id) const { return k > key || (k == key && id <= last); }
};

/// What a weight is: 2^((logit - max) * scale) of what the cut keeps, else 0.
struct Weights {
  float max;
  float scale;
  Cut cut;
  __device__ __forceinline__ float of(float x) const { return exp2f((x - max) * scale); }
  __device__ __forceinline__ double operator()(float x, int32_t id) const {
    return cut.keeps(key_of(x), id) ? static_cast<double>(of(x)) : 0.0;
  }
};

/// Quantities for narrow(): one for each logit, or its weight.
struct One {
  __device__ __forceinline__ Wide operator()(float) const { return 1; }
};
struct Fixed {
  Weights weights;
  __device__ __forceinline__ Wide operator()(float x) const { return __float2ull_rn(weights.of(x) * 0x1p40f); }
};

/// Calls visit(logit, id) for all of a row, shared by the threads of the block.
template <class Visit>
__device__ __forceinline__ void for_each(const float* logits, int32_t vocab, const Visit& visit) {
  for (int32_t id = static_cast<int32_t>(threadIdx.x) * 4; id < vocab; id += kThreads * 4) {
    const float4 x = *reinterpret_cast<const float4*>(logits + id);
    visit(x.x, id);
    if (id + 1 < vocab) visit(x.y, id + 1);
    if (id + 2 < vocab) visit(x.z, id + 2);
    if (id + 3 < vocab) visit(x.w, id + 3);
  }
}

/// The largest logit, and the lowest id that has it.
struct Largest {
  bool usable;   // there is no NaN, and it is finite
  float value;
  int32_t id;
};
__device__ Largest find_largest(const float* logits, int32_t vocab, Shared& shared) {
  Wide best = 0;
  bool nan = false;
  for_each(logits, vocab, [&](float x, int32_t id) {
    nan |= isnan(x);
    const Wide own = value_and_index(key_of(x), id);
    best = own > best ? own : best;
  });
  best = over_block<kThreads>(best, Wide{0}, shared.room, Max());
  const bool any = __syncthreads_or(nan) != 0;
  Largest largest;
  largest.id = index_of(best);
  largest.value = value_of(static_cast<uint32_t>(best >> 32));
  largest.usable = !any && isfinite(largest.value);
  return largest;
}

/// Chunks [begin, end) of which lane `lane` keeps the sum.
struct ChunkRange {
  int32_t begin;
  int32_t end;
};
__device__ __forceinline__ ChunkRange chunks_of(int lane, int32_t vocab) {
  const int32_t chunks = (vocab + kChunk - 1) / kChunk;
  const int32_t each = (chunks + kLanes - 1) / kLanes;
  const int32_t begin = min(lane * each, chunks);
  return {begin, min(begin + each, chunks)};
}
__device__ __forceinline__ double sum_of_range(const double* sums, const ChunkRange& range) {
  double sum = 0.0;
  for (int32_t c = range.begin; c < range.end; ++c) sum += sums[c];
  return sum;
}

/// sums [chunks] = those of weight(logit, id) over each chunk; returns that of all.
template <class Weight>
__device__ double add_up(const float* logits, int32_t vocab, double* sums, const Weight& weight) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  __syncthreads();   // what was there before has been read
  for (int32_t begin = static_cast<int32_t>(threadIdx.x) / kLanes * kChunk; begin < vocab; begin += kWarps * kChunk) {
    double sum = 0.0;
#pragma unroll 2
    for (int32_t id = begin + lane * 4; id < min(begin + kChunk, vocab); id += kLanes * 4) {
      const float4 x = *reinterpret_cast<const float4*>(logits + id);
      sum += weight(x.x, id);
      if (id + 1 < vocab) sum += weight(x.y, id + 1);
      if (id + 2 < vocab) sum += weight(x.z, id + 2);
      if (id + 3 < vocab) sum += weight(x.w, id + 3);
    }
    sum = over_warp(sum, Plus());
    if (lane == 0) sums[begin / kChunk] = sum;
  }
  __syncthreads();
  return over_warp(sum_of_range(sums, chunks_of(lane, vocab)), Plus());
}

/// The first of `count` values at which the running sum passes `target`, which becomes what is left of it. Rounding may
/// carry it past them all: then it is the last that is not zero, there and below.
template <class Value>
__device__ __forceinline__ int32_t pick(int32_t count, double& target, const Value& value) {
  int32_t at = 0;
  for (int32_t i = 0; i < count; ++i) {
    const double own = value(i);
    if (own == 0.0) continue;
    at = i;
    if (target < own) return at;
    target -= own;
  }
  target = INFINITY;
  return at;
}

/// The first id at which the running sum of weights passes `target`, of the sums that add_up() left.
template <class Weight>
__device__ int32_t locate(const float* logits, int32_t vocab, const double* sums, double target, const Weight& weight,
                          Shared& shared) {
  if (threadIdx.x < kLanes) {
    const int lane = static_cast<int>(threadIdx.x);
    const double own = sum_of_range(sums, chunks_of(lane, vocab));
    const int32_t part = pick(kLanes, target, [own](int32_t i) { return __shfl_sync(kAllLanes, own, i); });
    const ChunkRange range = chunks_of(part, vocab);
    const int32_t chunk =
        range.begin + pick(range.end - range.begin, target, [&](int32_t i) { return sums[range.begin + i]; });
    const int32_t begin = chunk * kChunk;
    double run = 0.0;   // of the lane's 32 logits
#pragma unroll 4
    for (int32_t id = begin + lane * kLanes; id < min(begin + (lane + 1) * kLanes, vocab); ++id) {
      run += weight(logits[id], id);
    }
    const int32_t first =
        begin + kLanes * pick(kLanes, target, [run](int32_t i) { return __shfl_sync(kAllLanes, run, i); });
    const int32_t id = first + lane;
    const double single = id < vocab ? weight(logits[id], id) : 0.0;
    const int32_t found =
        first + pick(kLanes, target, [single](int32_t i) { return __shfl_sync(kAllLanes, single, i); });
    if (lane == 0) shared.located = found;
  }
  __syncthreads();
  return shared.located;
}

/// The bin in which the running sum of shared.bins reaches `missing`, at least 1 and at most the sum of all; that of
/// the bins before it is in shared.before_bin.
__device__ int32_t find_bin(Wide missing, Shared& shared) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  const Wide own = shared.bins[threadIdx.x];
  Wide upto = own;
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const Wide other = __shfl_up_sync(kAllLanes, upto, step);
    if (lane >= step) upto += other;
  }
  if (lane == kLanes - 1) shared.room[warp] = upto;
  __syncthreads();
  for (int w = 0; w < warp; ++w) upto += shared.room[w];
  if (upto >= missing && upto - own < missing) {
    shared.bin = static_cast<int32_t>(threadIdx.x);
    shared.before_bin = upto - own;
  }
  __syncthreads();
  return shared.bin;
}

/// How deep below the largest logit narrow() looks first, in units of 1 / scale; then everywhere.
constexpr int kDepths = 5;
__device__ __forceinline__ double depth(int i) { return static_cast<double>(1 << i); }

/// Moves `cut` up to the least that keeps target(sum of all quantities) of quantity(logit). That target is no more than
/// the sum, or there is nothing to be done.
template <class Quantity, class Target>
__device__ void narrow(const float* logits, int32_t vocab, float max, double scale, const Quantity& quantity,
                       const Target& target, double* sums, Shared& shared, Cut& cut) {
  uint32_t floors[kDepths + 1];
  Wide totals[kDepths + 1];
#pragma unroll
  for (int i = 0; i <= kDepths; ++i) {
    const uint32_t floor = i < kDepths ? key_of(static_cast<float>(max - depth(i) / scale)) : 0;
    floors[i] = floor > cut.key ? floor : cut.key;
    totals[i] = 0;
  }
  for_each(logits, vocab, [&](float x, int32_t id) {
    const uint32_t key = key_of(x);
    if (!cut.keeps(key, id)) return;
    const Wide amount = quantity(x);
#pragma unroll
    for (int i = 0; i <= kDepths; ++i) totals[i] += key >= floors[i] ? amount : 0;
  });
#pragma unroll
  for (int i = 0; i <= kDepths; ++i) totals[i] = over_block<kThreads>(totals[i], Wide{0}, shared.room, Plus());
  Wide missing = target(totals[kDepths]);
  if (missing > totals[kDepths]) return;
  uint32_t floor = floors[kDepths];
#pragma unroll
  for (int i = kDepths - 1; i >= 0; --i) floor = totals[i] >= missing ? floors[i] : floor;

  // What is looked for is a distance from the largest, of `bits` bits, the bits found so far in `found`.
  const uint32_t top = key_of(max);
  int bits = floor == top ? 1 : 32 - __clz(static_cast<int>(top - floor));
  uint32_t found = 0;
  Wide in_bin = 0;
  while (bits > 0) {
    const int shift = bits > kBinBits ? bits - kBinBits : 0;
    shared.bins[threadIdx.x] = 0;
    __syncthreads();
    for_each(logits, vocab, [&](float x, int32_t id) {
      const uint32_t key = key_of(x);
      if (key < floor || !cut.keeps(key, id)) return;
      const Wide beyond = Wide{top - key} - found;
      if (beyond >> bits == 0) atomicAdd(&shared.bins[beyond >> shift], quantity(x));
    });
    __syncthreads();
    const int32_t bin = find_bin(missing, shared);
    in_bin = shared.bins[bin];
    missing -= shared.before_bin;
    found += static_cast<uint32_t>(bin) << shift;
    bits = shift;
    __syncthreads();   // before the bins are used again
  }

  const uint32_t key = top - found;
  const Wide each = quantity(value_of(key));
  const Wide needed = (missing + each - 1) / each;
  if (needed * each < in_bin) {
    const auto equal = [key, cut](float x, int32_t id) { return key_of(x) == key && cut.keeps(key, id) ? 1.0 : 0.0; };
    add_up(logits, vocab, sums, equal);
    cut.last = locate(logits, vocab, sums, static_cast<double>(needed - 1), equal, shared);
  } else if (key != cut.key) {
    cut.last = kNoEnd;
  }
  cut.key = key;
  __syncthreads();
}

/// The best `count` log-probabilities, at most kMostTop.
__device__ void report_top(const float* logits, int32_t vocab, int32_t count, float max, double log_total, double* sums,
                           Shared& shared, Choice& choice) {
  Cut cut;
  narrow(logits, vocab, max, 1.0, One(), [count](Wide) { return static_cast<Wide>(count); }, sums, shared, cut);
  if (threadIdx.x == 0) shared.held = 0;
  __syncthreads();
  for_each(logits, vocab, [&](float x, int32_t id) {
    if (!cut.keeps(key_of(x), id)) return;
    const int32_t at = atomicAdd(&shared.held, 1);
    shared.top_logit[at] = x;
    shared.top_id[at] = id;
  });
  __syncthreads();
  if (static_cast<int32_t>(threadIdx.x) < count) {
    const float own = shared.top_logit[threadIdx.x];
    const int32_t id = shared.top_id[threadIdx.x];
    int32_t place = 0;
    for (int32_t i = 0; i < count; ++i) {
      const float other = shared.top_logit[i];
      place += other > own || (other == own && shared.top_id[i] < id) ? 1 : 0;
    }
    choice.top_token[place] = id;
    choice.top_logprob[place] = static_cast<float>(own - log_total);
  }
  __syncthreads();
}

/// Where a token stands; 1 is the first.
__device__ int32_t rank_of(const float* logits, int32_t vocab, int32_t token, Shared& shared) {
  const float own = logits[token];
  Wide before = 0;
  for_each(logits, vocab, [&](float x, int32_t id) { before += x > own || (x == own && id < token) ? 1 : 0; });
  return 1 + static_cast<int32_t>(over_block<kThreads>(before, Wide{0}, shared.room, Plus()));
}

/// `counts` [vocab]: 2 * (times in the output) + 1 for each token of the row; whoever takes a count away applies it.
__device__ void penalise(const ChoiceTask& task, const int32_t* words, int32_t vocab, int32_t* counts, float* logits) {
  const int32_t* tokens = words + task.tokens.begin;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < task.tokens.count; i += kThreads) {
    const int32_t token = tokens[i];
    if (token < 0 || token >= vocab) continue;
    atomicOr(&counts[token], 1);
    if (i >= task.prompt) atomicAdd(&counts[token], 2);
  }
  __syncthreads();
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < task.tokens.count; i += kThreads) {
    const int32_t token = tokens[i];
    if (token < 0 || token >= vocab) continue;
    const int32_t count = atomicExch(&counts[token], 0);
    if (count == 0) continue;
    const int32_t times = count / 2;
    float logit = logits[token];
    logit = logit > 0.0f ? logit / task.repetition_penalty : logit * task.repetition_penalty;
    if (times > 0) logit -= static_cast<float>(times) * task.frequency_penalty + task.presence_penalty;
    logits[token] = logit;
  }
  __syncthreads();
}

/// Adds the biases; those of one token in their order, by the thread that has the first of them.
__device__ void add_biases(const ChoiceTask& task, const int32_t* words, int32_t vocab, float* logits) {
  const int32_t* pairs = words + task.biases.begin;
  for (int32_t begin = 0; begin < task.biases.count; begin += kThreads) {
    const int32_t end = min(begin + kThreads, task.biases.count);
    const int32_t own = begin + static_cast<int32_t>(threadIdx.x);
    const int32_t token = own < end ? pairs[2 * own] : -1;
    bool mine = token >= 0 && token < vocab;
    for (int32_t i = begin; mine && i < own; ++i) mine = pairs[2 * i] != token;
    for (int32_t i = own; mine && i < end; ++i) {
      if (pairs[2 * i] == token) logits[token] += __int_as_float(pairs[2 * i + 1]);
    }
    __syncthreads();
  }
}

__device__ void adjust(const ChoiceTask& task, const SampleTask& all, int32_t* counts, float* logits) {
  if (task.tokens.count > 0) penalise(task, all.words, all.vocab, counts, logits);
  add_biases(task, all.words, all.vocab, logits);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < task.stops.count; i += kThreads) {
    const int32_t token = all.words[task.stops.begin + i];
    if (token >= 0 && token < all.vocab) logits[token] = -INFINITY;
  }
  __syncthreads();
}

__device__ int32_t draw(const ChoiceTask& task, const float* logits, int32_t vocab, float max, double* sums,
                        Shared& shared) {
  constexpr double kLog2E = 1.4426950408889634074;
  Weights weights{max, static_cast<float>(task.scale * kLog2E), {}};
  if (task.has_min_p) weights.cut.key = key_of(static_cast<float>(max + task.min_p_depth));
  if (task.top_k > 0 && task.top_k < vocab) {
    const auto target = [&](Wide) { return static_cast<Wide>(task.top_k); };
    narrow(logits, vocab, max, task.scale, One(), target, sums, shared, weights.cut);
  }
  if (task.top_p < 1.0) {
    const auto target = [&](Wide sum) {
      const Wide share = __double2ull_ru(task.top_p * static_cast<double>(sum));
      return share < 1 ? Wide{1} : share > sum ? sum : share;
    };
    narrow(logits, vocab, max, task.scale, Fixed{weights}, target, sums, shared, weights.cut);
  }
  const double total = add_up(logits, vocab, sums, weights);
  return locate(logits, vocab, sums, task.uniform * total, weights, shared);
}

__global__ __launch_bounds__(kThreads) void sample_kernel(const SampleTask all) {
  extern __shared__ double sums[];   // [chunks]
  __shared__ Shared shared;
  wait_for_inputs();
  let_next_begin();
  const int64_t row = blockIdx.x;
  const ChoiceTask& task = all.tasks[row];
  Choice& choice = all.choices[row];
  const int32_t vocab = all.vocab;
  float* logits = all.logits + row * all.stride;
  const float* raw = logits;

  if (threadIdx.x == 0) choice.token = -1;
  Largest largest = find_largest(logits, vocab, shared);
  if (!largest.usable) return;
  const int32_t top = min(min(task.top, kMostTop), vocab);
  double log_total = 0.0;
  if (task.top >= 0) {
    log_total = largest.value + log(add_up(logits, vocab, sums, Weights{largest.value, 1.44269504f, {}}));
    if (top > 0) report_top(logits, vocab, top, largest.value, log_total, sums, shared, choice);
  }
  int32_t token = task.target;
  if (token < 0) {
    if (task.tokens.count + task.biases.count + task.stops.count > 0) {
      if (task.top >= 0) {
        float* copy = all.raw + row * all.stride;
        for_each(logits, vocab, [copy](float x, int32_t id) { copy[id] = x; });
        raw = copy;
        __syncthreads();   // before logits change
      }
      adjust(task, all, all.counts + row * all.stride, logits);
      largest = find_largest(logits, vocab, shared);
      if (!largest.usable) return;
    }
    token = task.greedy ? largest.id : draw(task, logits, vocab, largest.value, sums, shared);
  }
  int32_t rank = 0;
  if (task.top >= 0) rank = rank_of(raw, vocab, token, shared);
  if (threadIdx.x == 0) {
    choice.token = token;
    choice.logprob = task.top >= 0 ? static_cast<float>(raw[token] - log_total) : 0.0f;
    choice.rank = rank;
    choice.top_count = max(top, 0);
  }
}

}  // namespace

void sample_rows(const SampleTask& task, const GemmPlace& place) {
  SPLITFUSE_ASSERT(task.vocab <= kMaxVocab);
  if (task.rows == 0) return;
  Launch how;
  how.grid = dim3(static_cast<unsigned>(task.rows));
  how.block = dim3(kThreads);
  how.shared_bytes = static_cast<size_t>((task.vocab + kChunk - 1) / kChunk) * sizeof(double);
  how.stream = place.stream;
  how.overlap = place.overlap;
  launch("sample_rows", sample_kernel, how, task);
}

}  // namespace splitfuse::cuda
