// GEMM for AVX2 with FMA. bf16 weights are widened on the way to the registers.
#include <immintrin.h>

#include "cpu/gemm.h"

namespace splitfuse {
namespace {

#include "cpu/gemm_vector_avx2-inl.h"

using Vec = GemmAvx2;

#include "cpu/gemm-inl.h"

constexpr int kRegisters = 2;   // columns of a panel
constexpr int kRows = 6;        // 12 sums, 2 weights and 1 broadcast of 16 registers
constexpr int kWideRows = 5;  // 10 sums: with 12 and the mask of widening gcc keeps some in memory, a quarter slower

void widen(const void* in, int64_t count, float* out) {
  const auto* values = static_cast<const uint16_t*>(in);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i)));
    _mm256_storeu_ps(out + i, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
  }
  for (; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(values[i]) << 16;
    __builtin_memcpy(out + i, &bits, sizeof bits);
  }
}

uint64_t read(const std::byte* data, int64_t bytes) {
  __m256i all[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) all[j] = _mm256_setzero_si256();
  for (int64_t i = 0; i < bytes; i += 256) {
#pragma GCC unroll 8
    for (int j = 0; j < 4; ++j) __builtin_prefetch(data + i + kAheadBytes + kLineBytes * j);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      all[j] = _mm256_or_si256(all[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i + 32 * j)));
    }
  }
#pragma GCC unroll 8
  for (int j = 1; j < 8; ++j) all[0] = _mm256_or_si256(all[0], all[j]);
  const __m128i half = _mm_or_si128(_mm256_castsi256_si128(all[0]), _mm256_extracti128_si256(all[0], 1));
  return static_cast<uint64_t>(_mm_extract_epi64(half, 0) | _mm_extract_epi64(half, 1));
}

}  // namespace

void add_gemm_avx2(GemmTable& table) {
  table.f32 = {.isa = Isa::kAvx2,
               .width = kRegisters * Vec::kLanes,
               .together = 1,
               .row_tile = kRows,
               .multiply = multiply<F32Format, kRows, kRegisters>,
               .widen = nullptr,
               .peak = peak_of_fma<12>};
  table.bf16 = {.isa = Isa::kAvx2,
                .width = kRegisters * Vec::kLanes,
                .together = 2,
                .row_tile = kWideRows,
                .multiply = multiply<WideBf16Format, kWideRows, kRegisters>,
                .widen = widen,
                .peak = peak_of_fma<12>};
  table.read = read;
}

}  // namespace splitfuse
