#include <immintrin.h>

#include "cpu/row_kernels.h"

namespace splitfuse {
namespace {

#include "cpu/vector_avx2-inl.h"

#include "cpu/rows-inl.h"

struct Vec : Avx2 {
  struct Sum {
    __m256d low, high;
  };
  static unsigned at_least(Reg x, Reg y) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_GE_OQ)));
  }
  static unsigned unordered(Reg x) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  }
  static Reg where_at_least(Reg x, Reg y, Reg value) { return _mm256_and_ps(_mm256_cmp_ps(x, y, _CMP_GE_OQ), value); }
  static Sum no_sum() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  static Sum add_double(Reg x, Sum sum) {
    return {_mm256_add_pd(sum.low, _mm256_cvtps_pd(_mm256_castps256_ps128(x))),
            _mm256_add_pd(sum.high, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)))};
  }
  static double reduce(Sum sum) {
    const __m256d four = _mm256_add_pd(sum.low, sum.high);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};

}  // namespace

void row_kernels_avx2(DType dtype, RowKernels& kernels) {
  fill<Vec>(dtype, kernels);
  kernels.isa = Isa::kAvx2;
}

}  // namespace splitfuse
