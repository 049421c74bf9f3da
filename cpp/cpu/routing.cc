#include "cpu/routing.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"

namespace splitfuse {
namespace {

struct Candidate {
  float value;
  int32_t index;
};

bool comes_before(const Candidate& a, const Candidate& b) {
  return (std::isnan(a.value) && !std::isnan(b.value)) || a.value > b.value;
}

/// The k largest of values [count] are the first k candidates then, in no order. Which of equals are taken follows from
/// the algorithm, so it is torch.topk's: the choice between these two too.
void take_largest(const float* values, int32_t count, int32_t k, Candidate* candidates) {
  for (int32_t i = 0; i < count; ++i) candidates[i] = {values[i], i};
  if (k * 64 <= count) {
    std::partial_sort(candidates, candidates + k, candidates + count, comes_before);
  } else {
    std::nth_element(candidates, candidates + k - 1, candidates + count, comes_before);
  }
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

/// x = softmax(x)
void softmax(float* x, int32_t count) {
  float largest = -std::numeric_limits<float>::infinity();
  for (int32_t i = 0; i < count; ++i) largest = std::max(largest, x[i]);
  float sum = 0.0f;
  for (int32_t i = 0; i < count; ++i) sum += x[i] = std::exp(x[i] - largest);
  for (int32_t i = 0; i < count; ++i) x[i] /= sum;
}

/// What a group is chosen by: its best score; with a correction the sum of its best two.
float group_score(const float* scores, int32_t size, bool corrected, Candidate* candidates) {
  const int32_t best = corrected ? std::min(size, 2) : 1;
  take_largest(scores, size, best, candidates);
  return best == 1 ? candidates[0].value : candidates[0].value + candidates[1].value;
}

/// Takes all experts out of the running but those of the best groups. `group_scores`: scratch [groups].
void keep_best_groups(const Routing& routing, float* scores, float* group_scores, Candidate* candidates) {
  const int32_t size = routing.experts / routing.groups;
  const bool corrected = routing.correction != nullptr;
  for (int32_t g = 0; g < routing.groups; ++g) {
    group_scores[g] = group_score(scores + g * size, size, corrected, candidates);
  }
  take_largest(group_scores, routing.groups, routing.top_groups, candidates);
  for (int32_t g = 0; g < routing.groups; ++g) group_scores[g] = 0.0f;
  for (int32_t i = 0; i < routing.top_groups; ++i) group_scores[candidates[i].index] = 1.0f;
  const bool negative = corrected || routing.scoring == Scoring::kTopSoftmax;   // they may be
  const float out = negative ? -std::numeric_limits<float>::infinity() : 0.0f;
  for (int32_t g = 0; g < routing.groups; ++g) {
    if (group_scores[g] == 0.0f) std::fill_n(scores + g * size, size, out);
  }
}

}  // namespace

int64_t routing_scratch_bytes(int32_t experts) {
  return round_up(experts * int64_t{3 * sizeof(float) + sizeof(Candidate)}, int64_t{64});
}

void choose_experts(const Routing& routing, const float* logits, std::byte* scratch, ExpertChoice* choices) {
  const int32_t experts = routing.experts;
  auto* const candidates = reinterpret_cast<Candidate*>(scratch);
  auto* const weights = reinterpret_cast<float*>(candidates + experts);
  float* const scores = weights + experts;   // what the choice is made by

  std::copy(logits, logits + experts, weights);
  if (routing.scoring == Scoring::kSoftmax) softmax(weights, experts);
  if (routing.scoring == Scoring::kSigmoid) std::transform(weights, weights + experts, weights, sigmoid);
  for (int32_t e = 0; e < experts; ++e) scores[e] = weights[e] + (routing.correction ? routing.correction[e] : 0.0f);
  if (routing.groups > 1) keep_best_groups(routing, scores, scores + experts, candidates);
  take_largest(scores, experts, routing.top_k, candidates);
  std::sort(candidates, candidates + routing.top_k,
            [](const Candidate& a, const Candidate& b) { return a.index < b.index; });

  float* const chosen = scores + experts;
  for (int32_t i = 0; i < routing.top_k; ++i) {
    chosen[i] = (routing.correction ? weights : scores)[candidates[i].index];
  }
  if (routing.scoring == Scoring::kTopSoftmax) softmax(chosen, routing.top_k);
  float divisor = 1.0f;
  if (routing.normalize) {
    divisor = 1e-20f;   // of weights that are all zero
    for (int32_t i = 0; i < routing.top_k; ++i) divisor += chosen[i];
  }
  for (int32_t i = 0; i < routing.top_k; ++i) {
    choices[i] = {candidates[i].index, chosen[i] / divisor * routing.scale};
  }
  if (routing.shared) {
    choices[routing.top_k] = {experts, routing.shared_gate ? sigmoid(logits[experts]) : 1.0f};
  }
}

}  // namespace splitfuse
