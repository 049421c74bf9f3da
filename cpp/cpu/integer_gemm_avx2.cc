// Integer GEMM for AVX2: products of bytes are added in pairs of 16 bits, then in fours of 32.
#include <immintrin.h>

#include "cpu/gemm.h"

namespace splitfuse {
namespace {

#include "cpu/gemm_vector_avx2-inl.h"

using Vec = GemmAvx2;

struct Int {
  using Sums = __m256i;
  using Bytes = __m256i;
  /// The first product is of unsigned with signed bytes: the weight's sign goes over to the row's value, and no sum of
  /// two leaves 16 bits while neither magnitude is above 127.
  struct Weights8 {
    __m256i weights;
    __m256i magnitude;
  };

  static Sums zero() { return _mm256_setzero_si256(); }
  static Sums start(int32_t) { return zero(); }
  static Bytes load(const std::byte* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Bytes low(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
  static Bytes high(Bytes x) { return low(_mm256_srli_epi16(x, 4)); }
  static Weights8 prepare8(Bytes x) {
    const __m256i weights = _mm256_xor_si256(x, _mm256_set1_epi8(static_cast<char>(kWeightBias)));
    return {weights, _mm256_abs_epi8(weights)};
  }
  static Sums dot8(Sums sums, const Weights8& weights, int32_t four) {
    return dot4(sums, weights.magnitude, _mm256_sign_epi8(_mm256_set1_epi32(four), weights.weights));
  }
  static Sums dot4(Sums sums, Bytes weights, int32_t four) { return dot4(sums, weights, _mm256_set1_epi32(four)); }
  static __m256 to_float(Sums x) { return _mm256_cvtepi32_ps(x); }
  static __m256 load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  // ---- For quantize_row
  static __m256 load_cells(const float* p) { return _mm256_loadu_ps(p); }
  static __m256 load_cells(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  /// As integers the magnitudes of floats are in order, infinity and NaN above all.
  static float largest_magnitude(const __m256 (&x)[4]) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i top = zero();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(x[i]), magnitude));
    }
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    const int32_t bits = _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
  static Sums round(__m256 x) { return _mm256_cvtps_epi32(x); }
  /// Stores a group in 8 bits and returns its sum.
  static int32_t store_group(const Sums (&x)[4], signed char* out) {
    __m256i sums = zero();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x[i]), _mm256_extracti128_si256(x[i], 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 8 * i), _mm_packs_epi16(words, words));
      sums = _mm256_add_epi32(sums, x[i]);
    }
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  }

 private:
  static Sums dot4(Sums sums, Bytes weights, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(weights, x);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

#include "cpu/gemm-inl.h"
#include "cpu/integer_gemm-inl.h"

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
