#include <arm_neon.h>

#include "cpu/row_kernels.h"

namespace splitfuse {
namespace {

#include "cpu/vector_neon-inl.h"

#include "cpu/rows-inl.h"

struct Vec : Neon {
  struct Sum {
    float64x2_t low, high;
  };
  static unsigned at_least(Reg x, Reg y) { return bits(vcgeq_f32(x, y)); }
  static unsigned unordered(Reg x) { return bits(vmvnq_u32(vceqq_f32(x, x))); }
  static Reg where_at_least(Reg x, Reg y, Reg value) {
    return vreinterpretq_f32_u32(vandq_u32(vcgeq_f32(x, y), vreinterpretq_u32_f32(value)));
  }
  static Sum no_sum() { return {vdupq_n_f64(0.0), vdupq_n_f64(0.0)}; }
  static Sum add_double(Reg x, Sum sum) {
    return {vaddq_f64(sum.low, vcvt_f64_f32(vget_low_f32(x))), vaddq_f64(sum.high, vcvt_high_f64_f32(x))};
  }
  static double reduce(Sum sum) { return vaddvq_f64(vaddq_f64(sum.low, sum.high)); }

 private:
  static unsigned bits(uint32x4_t mask) {
    const uint32x4_t each = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(mask, each));
  }
};

}  // namespace

void row_kernels_neon(DType dtype, RowKernels& kernels) {
  fill<Vec>(dtype, kernels);
  kernels.isa = Isa::kNeon;
}

}  // namespace splitfuse
