// What GEMM asks of an AVX2 register beyond the common. Include inside the anonymous namespace of an AVX2 file.

#include "cpu/vector_avx2-inl.h"

struct GemmAvx2 : Avx2 {
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }   // the second if one is NaN
  static Reg round(Reg x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static void touch(Reg& x) { asm volatile("" : "+x"(x)); }      // the compiler may not know what x is

  /// x * 2^n for whole n, in two factors so that results may underflow or overflow.
  static Reg scale(Reg x, Reg n) {
    const __m256i whole = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    return mul(mul(x, power(half)), power(_mm256_sub_epi32(whole, half)));
  }
  static Reg power(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }

  /// The first, the second of kLanes pairs of bf16.
  static Reg load_first(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
  }
  static Reg load_second(const uint16_t* p) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), upper));
  }

  /// Of 2 kLanes sums in groups of 8: those of gate, those of up.
  static Reg gates(const float* p) { return load(p); }
  static Reg ups(const float* p) { return load(p + 8); }

  /// As f32 or bf16.
  static void store(float* p, Reg x) { Avx2::store(p, x); }
  static void store(uint16_t* p, Reg x) { put(p, x, kLanes); }
};
