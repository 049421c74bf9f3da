// Integer GEMM for AVX2: products of bytes are added in pairs of 16 bits, then in fours of 32.
#include <immintrin.h>

#include "cpu/gemm.h"

namespace splitfuse {
namespace {

#include "cpu/gemm_vector_avx2-inl.h"
#include "cpu/integer_vector_avx2-inl.h"

using Vec = GemmAvx2;

struct Int : IntAvx2 {
  /// The first product is of unsigned with signed bytes: the weight's sign goes over to the row's value, and no sum of
  /// two leaves 16 bits while neither magnitude is above 127.
  struct Weights8 {
    __m256i weights;
    __m256i magnitude;
  };

  static Sums start(int32_t) { return zero(); }
  static Weights8 prepare8(Bytes x) {
    const __m256i weights = _mm256_xor_si256(x, _mm256_set1_epi8(static_cast<char>(kWeightBias)));
    return {weights, _mm256_abs_epi8(weights)};
  }
  static Sums dot8(Sums sums, const Weights8& weights, int32_t four) {
    return dot4(sums, weights.magnitude, _mm256_sign_epi8(_mm256_set1_epi32(four), weights.weights));
  }
  static Sums dot4(Sums sums, Bytes weights, int32_t four) { return dot4(sums, weights, _mm256_set1_epi32(four)); }

 private:
  static Sums dot4(Sums sums, Bytes weights, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(weights, x);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

#include "cpu/gemm-inl.h"
#include "cpu/integer_gemm-inl.h"

#include "cpu/integer_dots-inl.h"

constexpr int kRows = 2;
constexpr int kRegisters = 2;  // columns of a panel: 4 sums, 4 of the group, 2 weights and their magnitudes

double peak(int64_t rounds) {
  constexpr int kSums = 10;
  __m256i acc[kSums];
  __m256i x = _mm256_set1_epi32(0x01010101);
  __m256i ones = _mm256_set1_epi16(1);
  asm volatile("" : "+x"(x), "+x"(ones));
#pragma GCC unroll 32
  for (int r = 0; r < kSums; ++r) acc[r] = x;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int r = 0; r < kSums; ++r) {
      acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(_mm256_maddubs_epi16(x, acc[r]), ones));
    }
#pragma GCC unroll 32
    for (int r = 0; r < kSums; ++r) asm volatile("" : "+x"(acc[r]));
  }
  return 8.0 * kSums * Vec::kLanes * static_cast<double>(rounds);
}

}  // namespace

void add_integer_gemm_avx2(GemmTable& table) {
  table.int8 = integer_kernel<Int8Format, kRows, kRegisters>(Isa::kAvx2, peak);
  table.int4 = integer_kernel<Int4Format, kRows, kRegisters>(Isa::kAvx2, peak);
}

}  // namespace splitfuse
