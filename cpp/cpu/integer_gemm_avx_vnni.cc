// Integer GEMM for AVX-VNNI, which has no AVX-512: four products of 8-bit integers are added by one instruction.
#include <immintrin.h>

#include "cpu/gemm.h"

namespace splitfuse {
namespace {

#include "cpu/gemm_vector_avx2-inl.h"
#include "cpu/integer_vector_avx2-inl.h"

using Vec = GemmAvx2;

struct Int : IntAvx2 {
  using Weights8 = __m256i;
  static Sums start(int32_t offset) { return _mm256_set1_epi32(offset); }
  static Weights8 prepare8(Bytes x) { return x; }
  static Sums dot8(Sums sums, Weights8 weights, int32_t four) {
    return _mm256_dpbusd_avx_epi32(sums, weights, _mm256_set1_epi32(four));
  }
  static Sums dot4(Sums sums, Bytes weights, int32_t four) { return dot8(sums, weights, four); }
};

#include "cpu/gemm-inl.h"
#include "cpu/integer_gemm-inl.h"

#include "cpu/integer_dots-inl.h"

constexpr int kRows = 3;
constexpr int kRegisters = 2;  // columns of a panel: 6 sums, 6 of the group, 2 weights and 1 broadcast of 16 registers

double peak(int64_t rounds) {
  constexpr int kSums = 12;
  __m256i acc[kSums];
  __m256i x = _mm256_set1_epi32(0x01010101);
  asm volatile("" : "+x"(x));
#pragma GCC unroll 32
  for (int r = 0; r < kSums; ++r) acc[r] = x;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int r = 0; r < kSums; ++r) acc[r] = _mm256_dpbusd_avx_epi32(acc[r], x, x);
#pragma GCC unroll 32
    for (int r = 0; r < kSums; ++r) asm volatile("" : "+x"(acc[r]));
  }
  return 8.0 * kSums * Vec::kLanes * static_cast<double>(rounds);
}

}  // namespace

void add_integer_gemm_avx_vnni(GemmTable& table) {
  table.int8 = integer_kernel<Int8Format, kRows, kRegisters>(Isa::kAvxVnni, peak);
  table.int4 = integer_kernel<Int4Format, kRows, kRegisters>(Isa::kAvxVnni, peak);
}

}  // namespace splitfuse
