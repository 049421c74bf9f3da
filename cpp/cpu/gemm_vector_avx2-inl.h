// What GEMM asks of an AVX2 register beyond the common. Include inside the anonymous namespace of an AVX2 file.

#include "cpu/vector_avx2-inl.h"

struct GemmAvx2 : Avx2 {
  static void touch(Reg& x) { asm volatile("" : "+x"(x)); }  // the compiler may not know what x is

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
