// GEMM for AVX-512 with BF16: pairs of bf16 are multiplied and added by one instruction.
// gcc 12 takes the undefined registers in its own headers for mistakes of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "cpu/gemm.h"

namespace splitfuse {
namespace {

#include "cpu/gemm_vector_avx512-inl.h"

struct Vec : GemmAvx512 {
  using GemmAvx512::store;
  static void store(uint16_t* p, Reg x) {   // rounds as to_bf16 does, but makes denormals zero
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  }
};

#include "cpu/gemm-inl.h"

constexpr int kRows = 8;
constexpr int kRegisters = 3;   // columns of a panel: 24 sums, 3 weights and 1 broadcast of 32 registers

[[gnu::always_inline]] inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

struct Bf16Format : RowByRow {
  using In = uint16_t;
  using Weight = uint16_t;
  using Out = uint16_t;
  static constexpr int32_t kPerStep = 2;

  template <int R, int C>
  [[gnu::always_inline]] static void step(const In* in, int64_t stride, const Weight* panel, Vec::Reg (&sums)[R][C]) {
    __m512i weights[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) weights[c] = _mm512_loadu_si512(panel + 2 * c * Vec::kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, in + r * stride, sizeof pair);
      const __m512i x = _mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[r][c] = dot(sums[r][c], x, weights[c]);
    }
  }
};

double peak(int64_t rounds) {
  constexpr int kSums = 24;
  Vec::Reg acc[kSums];
  __m512i x = _mm512_set1_epi32(0x3f003f00);   // pairs of 0.5
  asm volatile("" : "+v"(x));
#pragma GCC unroll 32
  for (int r = 0; r < kSums; ++r) acc[r] = Vec::set(0.0f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int r = 0; r < kSums; ++r) acc[r] = dot(acc[r], x, x);
#pragma GCC unroll 32
    for (int r = 0; r < kSums; ++r) Vec::touch(acc[r]);
  }
  return 4.0 * kSums * Vec::kLanes * static_cast<double>(rounds);
}

}  // namespace

void add_gemm_avx512_bf16(GemmTable& table) {
  table.bf16 = {.isa = Isa::kAvx512Bf16,
                .width = kRegisters * Vec::kLanes,
                .together = 2,
                .row_tile = kRows,
                .multiply = multiply<Bf16Format, kRows, kRegisters>,
                .widen = nullptr,
                .peak = peak};
}

}  // namespace splitfuse
