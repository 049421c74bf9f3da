// Mixtures of experts. Nothing of a step comes back to the host: which rows go to which expert is decided, and read, on
// the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "cuda/device/memory.h"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/linears.h"
#include "cuda/ops/experts.h"

namespace splitfuse::cuda {

class CudaExperts {
 public:
  /// `dtype`: of weights and activations. `linears` must outlive it and be of the same stream.
  CudaExperts(DType dtype, CudaLinears& linears, const GemmPlace& place);

  /// Bytes of device memory that prepare() will take; 0 where there are no experts. Throws ConfigError for too many.
  int64_t scratch_bytes(const StepLimits& limits) const;
  void prepare(const StepLimits& limits);
  /// As Backend::experts().
  void run(const Experts& experts, const void* in, int32_t rows, float* out);

 private:
  /// Where everything lies.
  struct Places {
    float* logits = nullptr;  // [rows][row_stride(experts)]
    ExpertChoice* choices = nullptr;  // [rows][experts of a row]
    int32_t* slot_of_choice = nullptr;  // [rows][experts of a row]
    int32_t* row_of_slot = nullptr;  // [slots]
    int32_t* first_slot = nullptr;  // [experts + 1]
    SlotTile* tiles = nullptr;
    std::byte* inner = nullptr;  // [slots][row_stride(intermediate)], in the activations' format
    float* y = nullptr;  // [slots][row_stride(hidden)]
    int64_t bytes = 0;
  };

  static Places lay_out(const StepLimits& limits, std::byte* base);
  void choose(const Routing& routing, int64_t stride, int32_t rows, int32_t each);
  void multiply(const std::vector<Linear>& linears, int32_t shared_expert, int tile, ExpertGemmTask task);

  bool half_;
  CudaLinears& linears_;
  GemmPlace place_;
  StepLimits limits_;
  Memory memory_;
  Places at_;
};

}  // namespace splitfuse::cuda
