// Mixtures of experts, as their host and their kernels see them. Pointers are to device memory.
//
// A slot is a row at one of its experts. Slots are in order of experts; those of one expert are in any order, which no
// result depends on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/gemm/gemm.h"

namespace splitfuse::cuda {

/// The most experts of a layer, the shared one counted.
inline constexpr int32_t kMaxExperts = 544;

/// One of a row's experts.
struct ExpertChoice {
  int32_t expert = 0;
  float weight = 0.0f;
};

/// As Scoring.
enum class ExpertScoring : uint8_t { kSoftmax, kTopSoftmax, kSigmoid };

/// choices [rows][top_k (+ 1)], ascending by expert, from router logits; as Routing has it. Of equal scores the expert
/// of lower number is taken, unlike on the CPU, which does as torch.topk there.
struct RoutingTask {
  const float* logits = nullptr;  // [rows][stride]
  int64_t stride = 0;
  int32_t rows = 0;
  int32_t experts = 0;
  int32_t top_k = 0;
  int32_t groups = 1;
  int32_t top_groups = 1;
  const float* correction = nullptr;
  float scale = 1.0f;
  ExpertScoring scoring = ExpertScoring::kSoftmax;
  bool normalize = false;
  bool shared = false;
  bool shared_gate = false;
  ExpertChoice* choices = nullptr;
};
void choose_experts(const RoutingTask& task, const GemmPlace& place);

/// A tile of slots of one expert; expert -1: there is none.
struct SlotTile {
  int32_t expert = -1;
  int32_t slot = 0;
};

/// Gives every choice a slot: a counting sort.
struct PlacingTask {
  const ExpertChoice* choices = nullptr;  // [rows][each]
  int32_t rows = 0;
  int32_t each = 0;
  int32_t experts = 0;
  int32_t tile_rows = 0;
  int32_t tile_count = 0;  // of tiles, those that there are not included
  int32_t* slot_of_choice = nullptr;  // [rows][each]
  int32_t* row_of_slot = nullptr;  // [rows * each]
  int32_t* first_slot = nullptr;  // [experts + 1]
  SlotTile* tiles = nullptr;  // [tile_count]
};
void place_rows(const PlacingTask& task, const GemmPlace& place);

/// The matrices of all experts but for their places; as GemmTask has them.
struct ExpertShape {
  int32_t weight_rows = 0;
  int32_t weight_stride = 0;
  int32_t depth = 0;
  int32_t columns = 0;
  int64_t bias_offset = 0;  // bytes behind the weights; 0: there is none
};
struct ExpertWeights {
  const std::byte* data[kMaxExperts];
};

/// out [slots, columns] (epilogue) in W^T, each slot with its expert's W. The order of sums is gemm_sm80()'s.
struct ExpertGemmTask {
  const void* in = nullptr;  // 16-bit [rows or slots][in_stride]
  const int32_t* row_of_slot = nullptr;  // which row of `in` is a slot's; none: its own
  const int32_t* first_slot = nullptr;  // [experts + 1]
  const SlotTile* tiles = nullptr;  // [tile_count]
  void* out = nullptr;
  int64_t in_stride = 0;
  int64_t out_stride = 0;
  int32_t tile_count = 0;
  int32_t weight_tiles = 0;  // of the expert that has most; set by the launch
  int32_t shared_expert = -1;  // its number
  ExpertShape routed;
  ExpertShape shared;
  GemmEpilogue epilogue = GemmEpilogue::kStore;
  GemmActivation activation = GemmActivation::kNone;
  bool gated = false;
  bool half = false;
};
/// The number, in kTilesSm80, of the tile for so many slots; and its rows.
int expert_tile(int64_t slots, int32_t experts);
int32_t expert_tile_rows(int tile);
/// Once, before the first.
void prepare_expert_gemm();
void expert_gemm(const ExpertGemmTask& task, const ExpertWeights& weights, int tile, const GemmPlace& place);

/// out [rows, columns] f32 = the weighted sum of the rows of y that are a row's slots, in the order of its choices.
struct CombineTask {
  const float* y = nullptr;  // [slots][stride]
  const ExpertChoice* choices = nullptr;  // [rows][each]
  const int32_t* slot_of_choice = nullptr;  // [rows][each]
  float* out = nullptr;  // [rows][stride]
  int64_t stride = 0;
  int32_t rows = 0;
  int32_t each = 0;
  int32_t columns = 0;
};
void combine_experts(const CombineTask& task, const GemmPlace& place);

}  // namespace splitfuse::cuda
