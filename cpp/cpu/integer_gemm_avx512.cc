// Integer GEMM for AVX-512 (F, BW, VL, DQ): products of bytes are added in pairs of 16 bits, then in fours of 32.
#include <immintrin.h>

#include "cpu/gemm.h"

namespace splitfuse {
namespace {

#include "cpu/gemm_vector_avx512-inl.h"
#include "cpu/integer_vector_avx512-inl.h"

using Vec = GemmAvx512;

struct Int : IntAvx512 {
  /// Magnitudes, and where the sign is set. The first product is of unsigned with signed bytes, and no sum of two
  /// leaves 16 bits while neither magnitude is above 127.
  struct Weights8 {
    __m512i magnitude;
    __mmask64 negative;
  };
  static Sums start(int32_t) { return zero(); }
  static Weights8 prepare8(Bytes x) {
    const __m512i weights = _mm512_xor_si512(x, _mm512_set1_epi8(static_cast<char>(kWeightBias)));
    return {_mm512_abs_epi8(weights), _mm512_movepi8_mask(weights)};
  }
  static Sums dot8(Sums sums, const Weights8& weights, int32_t four) {
    const __m512i x = _mm512_set1_epi32(four);
    return dot4(sums, weights.magnitude, _mm512_mask_sub_epi8(x, weights.negative, zero(), x));
  }
  static Sums dot4(Sums sums, Bytes weights, int32_t four) { return dot4(sums, weights, _mm512_set1_epi32(four)); }

 private:
  static Sums dot4(Sums sums, Bytes weights, __m512i x) {
    const __m512i pairs = _mm512_maddubs_epi16(weights, x);
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
};

#include "cpu/gemm-inl.h"
#include "cpu/integer_gemm-inl.h"

#include "cpu/integer_dots-inl.h"

constexpr int kRows = 4;
constexpr int kRegisters = 2;  // columns of a panel: 8 sums, 8 of the group, 2 weights and what they become

double peak(int64_t rounds) {
  constexpr int kSums = 12;
  __m512i acc[kSums];
  __m512i x = _mm512_set1_epi32(0x01010101);
  __m512i ones = _mm512_set1_epi16(1);
  asm volatile("" : "+v"(x), "+v"(ones));
#pragma GCC unroll 32
  for (int r = 0; r < kSums; ++r) acc[r] = x;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int r = 0; r < kSums; ++r) {
      acc[r] = _mm512_add_epi32(acc[r], _mm512_madd_epi16(_mm512_maddubs_epi16(x, acc[r]), ones));
    }
#pragma GCC unroll 32
    for (int r = 0; r < kSums; ++r) asm volatile("" : "+v"(acc[r]));
  }
  return 8.0 * kSums * Vec::kLanes * static_cast<double>(rounds);
}

}  // namespace

void add_integer_gemm_avx512(GemmTable& table) {
  table.int8 = integer_kernel<Int8Format, kRows, kRegisters>(Isa::kAvx512, peak);
  table.int4 = integer_kernel<Int4Format, kRows, kRegisters>(Isa::kAvx512, peak);
}

}  // namespace splitfuse
