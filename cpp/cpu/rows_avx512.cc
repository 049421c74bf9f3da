#include <immintrin.h>

#include "cpu/row_kernels.h"

namespace splitfuse {
namespace {

#include "cpu/vector_avx512-inl.h"

#include "cpu/rows-inl.h"

struct Vec : Avx512 {
  struct Sum {
    __m512d low, high;
  };
  static unsigned at_least(Reg x, Reg y) { return _mm512_cmp_ps_mask(x, y, _CMP_GE_OQ); }
  static unsigned unordered(Reg x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
  static Reg where_at_least(Reg x, Reg y, Reg value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, y, _CMP_GE_OQ), value);
  }
  static Sum no_sum() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  static Sum add_double(Reg x, Sum sum) {
    return {_mm512_add_pd(sum.low, _mm512_cvtps_pd(_mm512_castps512_ps256(x))),
            _mm512_add_pd(sum.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)))};
  }
  static double reduce(Sum sum) {
    const __m512d eight = _mm512_add_pd(sum.low, sum.high);
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};

}  // namespace

void row_kernels_avx512(DType dtype, RowKernels& kernels) {
  fill<Vec>(dtype, kernels);
  kernels.isa = Isa::kAvx512;
}

}  // namespace splitfuse
