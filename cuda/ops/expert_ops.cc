#include "cuda/ops/expert_ops.h"

#include <algorithm>
#include <type_traits>

#include "base/check.h"
#include "cuda/gemm/layout.h"
#include "cuda/gemm/tile_rules.h"
#include "cuda/ops/activation.h"

namespace splitfuse::cuda {
namespace {

ExpertScoring expert_scoring(Scoring scoring) {
  switch (scoring) {
    case Scoring::kSoftmax:
      return ExpertScoring::kSoftmax;
    case Scoring::kTopSoftmax:
      return ExpertScoring::kTopSoftmax;
    case Scoring::kSigmoid:
      return ExpertScoring::kSigmoid;
  }
  return ExpertScoring::kSoftmax;
}

/// Tiles that `slots` slots of `experts` experts may need, with one that each expert begins.
int64_t tile_count(int64_t slots, int32_t experts, int tile) {
  return std::min(slots, slots / expert_tile_rows(tile) + experts);
}

/// Where results are read as the next product's input, 8 elements at a time, `whole` also makes columns of zeros to a
/// multiple of 8: those weight rows are missing, and every activation of zero is zero.
ExpertShape expert_shape(const Linear& linear, bool whole) {
  const DenseLayout layout(linear);
  ExpertShape shape;
  shape.weight_rows = layout.rows();
  shape.weight_stride = layout.stride();
  shape.depth = linear.k;
  shape.columns = whole ? round_up(linear.n, 8) : linear.n;
  shape.bias_offset = linear.bias ? layout.bias_offset() : 0;
  return shape;
}

bool same_kind(const Linear& a, const Linear& b) { return a.gated == b.gated && a.activation == b.activation; }

}  // namespace

CudaExperts::CudaExperts(DType dtype, CudaLinears& linears, const GemmPlace& place)
    : half_(dtype == DType::kF16), linears_(linears), place_(place) {
  prepare_expert_gemm();
}

CudaExperts::Places CudaExperts::lay_out(const StepLimits& limits, std::byte* base) {
  Places at;
  if (limits.experts == 0) return at;
  const auto take = [&](auto*& pointer, int64_t count) {
    if (base) pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + at.bytes);
    at.bytes += round_up(count * static_cast<int64_t>(sizeof *pointer), int64_t{256});
  };
  const int64_t rows = limits.max_rows;
  const int64_t slots = rows * limits.experts_per_row;
  take(at.logits, rows * row_stride(limits.experts));
  take(at.choices, slots);
  take(at.slot_of_choice, slots);
  take(at.row_of_slot, slots);
  take(at.first_slot, limits.experts + 1);
  // The smallest tile is taken for up to 16 slots an expert.
  take(at.tiles, slots / kTilesSm80[1].rows + 2 * int64_t{limits.experts});
  take(at.inner, slots * row_stride(limits.expert_intermediate) * 2);
  take(at.y, slots * row_stride(limits.expert_hidden));
  return at;
}

int64_t CudaExperts::scratch_bytes(const StepLimits& limits) const {
  if (limits.experts > kMaxExperts) {
    throw ConfigError(
        cat("the model has ", limits.experts, " experts in a layer, the CUDA backend takes up to ", kMaxExperts));
  }
  return lay_out(limits, nullptr).bytes;
}

void CudaExperts::prepare(const StepLimits& limits) {
  limits_ = limits;
  memory_ = Memory(scratch_bytes(limits));
  at_ = lay_out(limits, memory_.data());
}

void CudaExperts::choose(const Routing& routing, int64_t stride, int32_t rows, int32_t each) {
  RoutingTask task;
  task.logits = at_.logits;
  task.stride = stride;
  task.rows = rows;
  task.experts = routing.experts;
  task.top_k = routing.top_k;
  task.groups = routing.groups;
  task.top_groups = routing.top_groups;
  task.correction = routing.correction;
  task.scale = routing.scale;
  task.scoring = expert_scoring(routing.scoring);
  task.normalize = routing.normalize;
  task.shared = routing.shared;
  task.shared_gate = routing.shared_gate;
  task.choices = at_.choices;
  SPLITFUSE_ASSERT(each == task.top_k + (task.shared ? 1 : 0));
  choose_experts(task, place_);
}

/// `task`: with what is not said of the linears.
void CudaExperts::multiply(const std::vector<Linear>& linears, int32_t shared_expert, int tile, ExpertGemmTask task) {
  const bool whole = task.epilogue == GemmEpilogue::kActivate;
  ExpertWeights weights{};
  for (size_t e = 0; e < linears.size(); ++e) weights.data[e] = linears[e].data;
  SPLITFUSE_ASSERT(same_kind(linears.front(), linears.back()));
  task.routed = expert_shape(linears.front(), whole);
  task.shared = expert_shape(linears.back(), whole);
  task.shared_expert = shared_expert;
  task.activation = gemm_activation(linears.front().activation);
  task.gated = linears.front().gated;
  task.first_slot = at_.first_slot;
  task.tiles = at_.tiles;
  task.half = half_;
  expert_gemm(task, weights, tile, place_);
}

void CudaExperts::run(const Experts& experts, const void* in, int32_t rows, float* out) {
  if (rows == 0) return;
  const Routing& routing = experts.routing;
  const auto count = static_cast<int32_t>(experts.in.size());
  const int32_t each = routing.top_k + (routing.shared ? 1 : 0);
  SPLITFUSE_ASSERT(rows <= limits_.max_rows && count == routing.experts + (routing.shared ? 1 : 0));
  SPLITFUSE_ASSERT(count <= limits_.experts && each <= limits_.experts_per_row);
  SPLITFUSE_ASSERT(experts.router.k <= limits_.expert_hidden && experts.router.n <= limits_.experts);
  linears_.multiply(experts.router, in, rows, GemmEpilogue::kStore, GemmActivation::kNone, at_.logits);
  choose(routing, row_stride(experts.router.n), rows, each);

  const int64_t slots = int64_t{rows} * each;
  const int tile = expert_tile(slots, count);
  PlacingTask placing;
  placing.choices = at_.choices;
  placing.rows = rows;
  placing.each = each;
  placing.experts = count;
  placing.tile_rows = expert_tile_rows(tile);
  placing.tile_count = static_cast<int32_t>(tile_count(slots, count, tile));
  placing.slot_of_choice = at_.slot_of_choice;
  placing.row_of_slot = at_.row_of_slot;
  placing.first_slot = at_.first_slot;
  placing.tiles = at_.tiles;
  place_rows(placing, place_);

  const int32_t shared_expert = routing.shared ? routing.experts : -1;
  ExpertGemmTask first;
  first.in = in;
  first.in_stride = row_stride(experts.router.k);
  first.row_of_slot = at_.row_of_slot;
  first.out = at_.inner;
  first.out_stride = row_stride(limits_.expert_intermediate);
  first.tile_count = placing.tile_count;
  first.epilogue = GemmEpilogue::kActivate;
  multiply(experts.in, shared_expert, tile, first);
  ExpertGemmTask second;
  second.in = at_.inner;
  second.in_stride = first.out_stride;
  second.out = at_.y;
  second.out_stride = first.in_stride;
  second.tile_count = placing.tile_count;
  second.epilogue = GemmEpilogue::kStore;
  multiply(experts.out, shared_expert, tile, second);

  CombineTask combine;
  combine.y = at_.y;
  combine.choices = at_.choices;
  combine.slot_of_choice = at_.slot_of_choice;
  combine.out = out;
  combine.stride = row_stride(experts.router.k);
  combine.rows = rows;
  combine.each = each;
  combine.columns = experts.router.k;
  combine_experts(combine, place_);
}

}  // namespace splitfuse::cuda
