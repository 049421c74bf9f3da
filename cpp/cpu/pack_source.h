// How the elements of host tensors become floats.
#pragma once

#include <cstdint>

#include "base/numeric.h"
#include "splitfuse/types.h"

namespace splitfuse {

struct FromF32 {
  using Element = float;
  static float value(float element) { return element; }
};
struct FromBf16 {
  using Element = uint16_t;
  static float value(uint16_t element) { return bf16_to_float(element); }
};
struct FromF16 {
  using Element = uint16_t;
  static float value(uint16_t element) { return f16_to_float(element); }
};

/// Calls `function` with the one for `dtype`.
template <class Function>
void with_source(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kF32:
      function(FromF32{});
      return;
    case DType::kBF16:
      function(FromBf16{});
      return;
    case DType::kF16:
      function(FromF16{});
      return;
  }
}

}  // namespace splitfuse
