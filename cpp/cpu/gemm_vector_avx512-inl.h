// What GEMM asks of an AVX-512 register beyond the common. Include inside the anonymous namespace of an AVX-512 file.

#include "cpu/vector_avx512-inl.h"

struct GemmAvx512 : Avx512 {
  static void touch(Reg& x) { asm volatile("" : "+v"(x)); }  // the compiler may not know what x is

  /// The first, the second of kLanes pairs of bf16.
  static Reg load_first(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
  static Reg load_second(const uint16_t* p) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), upper));
  }

  /// Of 2 kLanes sums in groups of 8: those of gate, those of up.
  static Reg gates(const float* p) { return _mm512_shuffle_f32x4(load(p), load(p + 16), 0x44); }
  static Reg ups(const float* p) { return _mm512_shuffle_f32x4(load(p), load(p + 16), 0xee); }

  /// As f32 or bf16.
  static void store(float* p, Reg x) { Avx512::store(p, x); }
  static void store(uint16_t* p, Reg x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(x)); }
};
