// Which experts a row has, and with what weights, from its router logits: the rules of transformers' routers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"

namespace splitfuse {

/// One of a row's experts.
struct ExpertChoice {
  int32_t expert = 0;
  float weight = 0.0f;
};

/// Experts that every row has: those chosen, and the shared one.
constexpr int32_t experts_of_row(const Routing& routing) { return routing.top_k + (routing.shared ? 1 : 0); }

/// Bytes of scratch that choose_experts() wants where there are so many experts; a multiple of 64.
int64_t routing_scratch_bytes(int32_t experts);

/// Fills choices [experts_of_row()], ascending by expert, from router logits [experts (+ 1)]. A logit that is not a
/// number is the largest; then some weight is not a number either. Ties are decided as torch.topk does on a CPU.
/// `scratch` is aligned to 8.
void choose_experts(const Routing& routing, const float* logits, std::byte* scratch, ExpertChoice* choices);

}  // namespace splitfuse
