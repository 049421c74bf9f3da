#include <immintrin.h>

#include "cpu/attention_kernels.h"

namespace splitfuse {
namespace {

#include "cpu/vector_avx512-inl.h"

#include "cpu/kv_rows-inl.h"

#include "cpu/kv_fetch-inl.h"

#include "cpu/attention_tiles-inl.h"

#include "cpu/attention_scores-inl.h"

#include "cpu/attention-inl.h"

// Both products of a pair in one instruction. Softmax weights are rounded to bfloat16, and it is the rounded
// weights that are summed, so that they still add up to one.
struct Bf16 : Avx512 {
  using Cell = unsigned short;
  using Weight = unsigned short;
  using Sum = Reg;
  using Factors = __m512i;
  static constexpr bool kInt8 = false;
  static constexpr int kVecs = 4;
  static constexpr int kSteps = 1;
  static constexpr int kPairRows = 1;
  static constexpr int kLaneBytes = 4;

  static Sum zero() { return set(0.0f); }
  static Factors factors(const char* at, int64_t, int) { return _mm512_loadu_si512(at); }
  static Factors first_factors(const char* at) { return _mm512_maskz_mov_epi16(0x55555555, _mm512_loadu_si512(at)); }
  static Factors second_factors(const char* at, int64_t) {
    return _mm512_maskz_mov_epi16(0xaaaaaaaa, _mm512_loadu_si512(at));
  }
  static __m512i weights(const Weight* pair, int) {
    int both;
    __builtin_memcpy(&both, pair, sizeof both);
    return _mm512_set1_epi32(both);
  }
  static Reg fma(__m512i weight, Factors factor, Reg sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weight), reinterpret_cast<__m512bh>(factor));
  }
  static void pack(const Cell* in, Weight* out) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
  }
  static Reg put_weights(Weight* out, Reg low, Reg high, Reg sum) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(out, reinterpret_cast<__m512i>(rounded));
    return _mm512_dpbf16_ps(sum, rounded, reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80)));
  }
};

}  // namespace

void attention_kernels_avx512_bf16(DType dtype, KvDType kv, AttentionKernels& kernels) {
  if (dtype != DType::kBF16 || kv == KvDType::kInt8) return;   // integers are multiplied as in AVX-512
  kernels.isa = Isa::kAvx512Bf16;
  kernels.attend = Attend<Bf16>::attend;
  kernels.merge = Attend<Bf16>::merge;
}

}  // namespace splitfuse
