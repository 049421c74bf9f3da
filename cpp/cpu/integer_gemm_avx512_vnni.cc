// Integer GEMM for AVX-512 with VNNI: four products of 8-bit integers are added to a sum by one instruction.
#include <immintrin.h>

#include "cpu/gemm.h"

namespace splitfuse {
namespace {

#include "cpu/gemm_vector_avx512-inl.h"
#include "cpu/integer_vector_avx512-inl.h"

using Vec = GemmAvx512;

struct Int : IntAvx512 {
  using Weights8 = __m512i;
  static Sums start(int32_t offset) { return _mm512_set1_epi32(offset); }
  static Weights8 prepare8(Bytes x) { return x; }
  static Sums dot8(Sums sums, Weights8 weights, int32_t four) {
    return _mm512_dpbusd_epi32(sums, weights, _mm512_set1_epi32(four));
  }
  static Sums dot4(Sums sums, Bytes weights, int32_t four) { return dot8(sums, weights, four); }
};

#include "cpu/gemm-inl.h"
#include "cpu/integer_gemm-inl.h"

#include "cpu/integer_dots-inl.h"

constexpr int kRows = 4;
constexpr int kRegisters =
    3;  // columns of a panel: 12 sums, 12 of the group, 3 weights and 1 broadcast of 32 registers

double peak(int64_t rounds) {
  constexpr int kSums = 24;
  __m512i acc[kSums];
  __m512i x = _mm512_set1_epi32(0x01010101);
  asm volatile("" : "+v"(x));
#pragma GCC unroll 32
  for (int r = 0; r < kSums; ++r) acc[r] = x;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int r = 0; r < kSums; ++r) acc[r] = _mm512_dpbusd_epi32(acc[r], x, x);
#pragma GCC unroll 32
    for (int r = 0; r < kSums; ++r) asm volatile("" : "+v"(acc[r]));
  }
  return 8.0 * kSums * Vec::kLanes * static_cast<double>(rounds);
}

}  // namespace

void add_integer_gemm_avx512_vnni(GemmTable& table) {
  table.int8 = integer_kernel<Int8Format, kRows, kRegisters>(Isa::kAvx512Vnni, peak);
  table.int4 = integer_kernel<Int4Format, kRows, kRegisters>(Isa::kAvx512Vnni, peak);
}

}  // namespace splitfuse
