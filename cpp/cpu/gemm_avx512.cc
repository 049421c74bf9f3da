// GEMM for AVX-512 (F, BW, VL, DQ). bf16 weights are widened on the way to the registers.
// gcc 12 takes the undefined registers in its own headers for mistakes of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "cpu/gemm.h"

namespace splitfuse {
namespace {

#include "cpu/gemm_vector_avx512-inl.h"

using Vec = GemmAvx512;

#include "cpu/gemm-inl.h"

constexpr int kRows = 8;
constexpr int kRegisters = 3;   // columns of a panel: 24 sums, 3 weights and 1 broadcast of 32 registers

void widen(const void* in, int64_t count, float* out) {
  const auto* values = static_cast<const uint16_t*>(in);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = Vec::lanes(count - i < 16 ? static_cast<int>(count - i) : 16);
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, values + i));
    _mm512_mask_storeu_ps(out + i, mask, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
  }
}

uint64_t read(const std::byte* data, int64_t bytes) {
  __m512i all[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) all[j] = _mm512_setzero_si512();
  for (int64_t i = 0; i < bytes; i += 512) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) __builtin_prefetch(data + i + kAheadBytes + kLineBytes * j);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) all[j] = _mm512_or_si512(all[j], _mm512_loadu_si512(data + i + 64 * j));
  }
#pragma GCC unroll 8
  for (int j = 1; j < 8; ++j) all[0] = _mm512_or_si512(all[0], all[j]);
  return static_cast<uint64_t>(_mm512_reduce_or_epi64(all[0]));
}

}  // namespace

void add_gemm_avx512(GemmTable& table) {
  table.f32 = {.isa = Isa::kAvx512,
               .width = kRegisters * Vec::kLanes,
               .together = 1,
               .row_tile = kRows,
               .multiply = multiply<F32Format, kRows, kRegisters>,
               .widen = nullptr,
               .peak = peak_of_fma<24>};
  table.bf16 = {.isa = Isa::kAvx512,
                .width = kRegisters * Vec::kLanes,
                .together = 2,
                .row_tile = kRows,
                .multiply = multiply<WideBf16Format, kRows, kRegisters>,
                .widen = widen,
                .peak = peak_of_fma<24>};
  table.read = read;
}

}  // namespace splitfuse
