#include "cuda/ops/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>

#include "base/check.h"
#include "base/philox.h"
#include "cuda/device/check.h"
#include "splitfuse/config.h"

namespace splitfuse::cuda {
namespace {

static_assert(kMostTop == kMaxLogprobs);

bool penalises(const SamplingParams& params) {
  return params.repetition_penalty != 1.0f || params.presence_penalty != 0.0f || params.frequency_penalty != 0.0f;
}

ChoiceTask choice_task(const SampleRow& row) {
  const SamplingParams& params = *row.params;
  ChoiceTask task;
  task.target = row.target;
  task.top = row.top;
  if (row.target >= 0) return task;
  task.greedy = params.temperature == 0.0f;
  task.prompt = row.prompt;
  task.repetition_penalty = params.repetition_penalty;
  task.presence_penalty = params.presence_penalty;
  task.frequency_penalty = params.frequency_penalty;
  if (task.greedy) return task;
  // A temperature near zero must not make the scale infinite: the maximum times it would be NaN.
  task.scale = std::min(1.0 / static_cast<double>(params.temperature), 1e30);
  task.has_min_p = params.min_p > 0.0f;
  if (task.has_min_p) task.min_p_depth = std::log(static_cast<double>(params.min_p)) / task.scale;
  task.top_k = params.top_k;
  task.top_p = static_cast<double>(params.top_p);
  task.uniform =
      philox_uniform(params.seed, static_cast<uint32_t>(params.sample_index), static_cast<uint32_t>(row.tokens.size()));
  return task;
}

SampleResult result_of(const Choice& choice) {
  SampleResult result;
  if (choice.token < 0) return result;
  result.token = choice.token;
  result.logprob = choice.logprob;
  result.rank = choice.rank;
  result.top_count = choice.top_count;
  for (int32_t i = 0; i < choice.top_count; ++i) result.top[i] = {choice.top_token[i], choice.top_logprob[i]};
  return result;
}

}  // namespace

/// Enough for any one row: all its tokens, a bias for each of the vocabulary, and all of it forbidden.
int64_t CudaSampler::word_room(const StepLimits& limits) {
  constexpr int64_t kLeast = int64_t{1} << 20;
  return std::max(kLeast, int64_t{limits.max_context} + 3 * int64_t{limits.vocab});
}

CudaSampler::Places CudaSampler::lay_out(const StepLimits& limits, std::byte* base) {
  Places at;
  const auto take = [&](auto*& pointer, int64_t count) {
    if (base) pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + at.bytes);
    at.bytes += round_up(count * static_cast<int64_t>(sizeof *pointer), int64_t{256});
  };
  const int64_t rows = limits.max_logit_rows;
  take(at.tasks, rows);
  take(at.words, word_room(limits));
  at.sent = at.bytes;
  take(at.choices, rows);
  take(at.counts, rows * row_stride(limits.vocab));
  take(at.raw, rows * row_stride(limits.vocab));
  return at;
}

int64_t CudaSampler::scratch_bytes(const StepLimits& limits) { return lay_out(limits, nullptr).bytes; }

void CudaSampler::prepare(const StepLimits& limits) {
  if (limits.vocab > kMaxVocab) {
    throw ConfigError(cat("vocab_size is ", limits.vocab, ", the CUDA backend takes up to ", kMaxVocab));
  }
  limits_ = limits;
  const Places sizes = lay_out(limits, nullptr);
  memory_ = Memory(sizes.bytes);
  sent_ = PinnedMemory(sizes.sent);
  received_ = PinnedMemory(limits.max_logit_rows * int64_t{sizeof(Choice)});
  at_ = lay_out(limits, memory_.data());
  host_ = lay_out(limits, sent_.data());
}

/// Writes row number `index` of a launch; false if there is no room left for its words.
bool CudaSampler::stage(const SampleRow& row, size_t index) {
  ChoiceTask task = choice_task(row);
  const bool chooses = row.target < 0;
  const std::span tokens = chooses && penalises(*row.params) ? row.tokens : std::span<const Token>();
  const std::span stops = chooses ? row.stop_ids : std::span<const Token>();
  const size_t biases = chooses ? row.params->logit_bias.size() : 0;
  if (words_used_ + static_cast<int64_t>(tokens.size() + 2 * biases + stops.size()) > word_room(limits_)) return false;
  const auto begin = [&](size_t count) {
    return Words{static_cast<int32_t>(words_used_), static_cast<int32_t>(count)};
  };
  task.tokens = begin(tokens.size());
  std::copy(tokens.begin(), tokens.end(), host_.words + words_used_);
  words_used_ += static_cast<int64_t>(tokens.size());
  task.biases = begin(biases);
  for (size_t i = 0; i < biases; ++i) {
    const auto& [token, bias] = row.params->logit_bias[i];
    host_.words[words_used_++] = token;
    std::memcpy(host_.words + words_used_++, &bias, sizeof bias);
  }
  task.stops = begin(stops.size());
  std::copy(stops.begin(), stops.end(), host_.words + words_used_);
  words_used_ += static_cast<int64_t>(stops.size());
  host_.tasks[index] = task;
  return true;
}

/// Chooses for the `count` rows that have been staged.
void CudaSampler::run(float* logits, size_t count, std::span<SampleResult> results) {
  const auto* first = reinterpret_cast<const std::byte*>(host_.words);
  const int64_t bytes = first - sent_.data() + words_used_ * int64_t{sizeof(int32_t)};
  SPLITFUSE_CUDA_CALL(
      cudaMemcpyAsync(memory_.data(), sent_.data(), static_cast<size_t>(bytes), cudaMemcpyHostToDevice, place_.stream));
  SampleTask task;
  task.logits = logits;
  task.stride = row_stride(limits_.vocab);
  task.vocab = limits_.vocab;
  task.rows = static_cast<int32_t>(count);
  task.tasks = at_.tasks;
  task.words = at_.words;
  task.counts = at_.counts;
  task.raw = at_.raw;
  task.choices = at_.choices;
  sample_rows(task, place_);
  SPLITFUSE_CUDA_CALL(
      cudaMemcpyAsync(received_.data(), at_.choices, count * sizeof(Choice), cudaMemcpyDeviceToHost, place_.stream));
  SPLITFUSE_CUDA_CALL(cudaStreamSynchronize(place_.stream));
  const auto* choices = reinterpret_cast<const Choice*>(received_.data());
  std::transform(choices, choices + count, results.begin(), result_of);
}

void CudaSampler::sample(float* logits, std::span<const SampleRow> rows, std::span<SampleResult> results) {
  SPLITFUSE_ASSERT(rows.size() == results.size());
  SPLITFUSE_ASSERT(static_cast<int64_t>(rows.size()) <= limits_.max_logit_rows);
  // All at once, but for histories so long that they are not sent together.
  for (size_t done = 0; done < rows.size();) {
    size_t count = 0;
    words_used_ = 0;
    while (done + count < rows.size() && stage(rows[done + count], count)) ++count;
    if (count == 0) throw InvalidArgument("sampling: the biases and stop ids of a sequence exceed the vocabulary");
    run(logits + static_cast<int64_t>(done) * row_stride(limits_.vocab), count, results.subspan(done));
    done += count;
  }
}

}  // namespace splitfuse::cuda
