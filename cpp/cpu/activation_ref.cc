#include "cpu/activation_ref.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace splitfuse {
namespace {

float silu(float x) { return x / (1.0f + std::exp(-x)); }

float gelu(float x) { return static_cast<float>(0.5 * x * std::erfc(-x / std::sqrt(2.0))); }

/// 0.5 x (1 + tanh(y)) is x / (1 + e^-2y), which keeps its digits where x is negative.
float gelu_tanh(double x) {
  const double y = 0.7978845608028654 * (x + 0.044715 * x * x * x);   // sqrt(2 / pi)
  return static_cast<float>(x / (1.0 + std::exp(-2.0 * y)));
}

/// std::min and std::max give their first argument where one is NaN.
float swiglu_clamped(float gate, float up) {
  gate = std::min(gate, 7.0f);
  up = std::max(std::min(up, 7.0f), -7.0f);
  return gate / (1.0f + std::exp(-1.702f * gate)) * (up + 1.0f);
}

}  // namespace

float activated(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kSilu:
      return silu(x);
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return gelu_tanh(x);
    case Activation::kRelu:
      return x < 0.0f ? 0.0f : x;   // keeps NaN
    case Activation::kSwigluClamped:
      break;
  }
  SPLITFUSE_ASSERT(!"an activation of gated linears alone");
  return 0.0f;
}

float gated(Activation activation, float gate, float up) {
  return activation == Activation::kSwigluClamped ? swiglu_clamped(gate, up) : activated(activation, gate) * up;
}

}  // namespace splitfuse
