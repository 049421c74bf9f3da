// Activations by the name that kernels have for them.
#pragma once

#include "cuda/gemm/gemm.h"
#include "splitfuse/types.h"

namespace splitfuse::cuda {

constexpr GemmActivation gemm_activation(Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return GemmActivation::kNone;
    case Activation::kSilu:
      return GemmActivation::kSilu;
    case Activation::kGelu:
      return GemmActivation::kGelu;
    case Activation::kGeluTanh:
      return GemmActivation::kGeluTanh;
    case Activation::kRelu:
      return GemmActivation::kRelu;
    case Activation::kSwigluClamped:
      return GemmActivation::kSwigluClamped;
  }
  return GemmActivation::kNone;
}

}  // namespace splitfuse::cuda
