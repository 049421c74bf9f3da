// GEMM for NEON. bf16 weights are widened on the way to the registers.
#include <arm_neon.h>

#include "cpu/gemm.h"

namespace splitfuse {
namespace {

#include "cpu/gemm_vector_neon-inl.h"

using Vec = GemmNeon;

#include "cpu/gemm-inl.h"

constexpr int kRegisters = 4;  // columns of a panel
constexpr int kRows = 6;       // 24 sums, 4 weights and 1 broadcast of 32 registers

void widen(const void* in, int64_t count, float* out) {
  const auto* values = static_cast<const uint16_t*>(in);
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    vst1q_f32(out + i, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(values + i), 16)));
  }
  for (; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(values[i]) << 16;
    __builtin_memcpy(out + i, &bits, sizeof bits);
  }
}

uint64_t read(const std::byte* data, int64_t bytes) {
  uint64x2_t all[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) all[j] = vdupq_n_u64(0);
  for (int64_t i = 0; i < bytes; i += 128) {
#pragma GCC unroll 8
    for (int j = 0; j < 2; ++j) __builtin_prefetch(data + i + kAheadBytes + kLineBytes * j);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      all[j] = vorrq_u64(all[j], vld1q_u64(reinterpret_cast<const uint64_t*>(data + i + 16 * j)));
    }
  }
#pragma GCC unroll 8
  for (int j = 1; j < 8; ++j) all[0] = vorrq_u64(all[0], all[j]);
  return vgetq_lane_u64(all[0], 0) | vgetq_lane_u64(all[0], 1);
}

}  // namespace

void add_gemm_neon(GemmTable& table) {
  table.f32 = {.isa = Isa::kNeon,
               .width = kRegisters * Vec::kLanes,
               .together = 1,
               .row_tile = kRows,
               .multiply = multiply<F32Format, kRows, kRegisters>,
               .widen = nullptr,
               .peak = peak_of_fma<24>};
  table.bf16 = {.isa = Isa::kNeon,
                .width = kRegisters * Vec::kLanes,
                .together = 2,
                .row_tile = kRows,
                .multiply = multiply<WideBf16Format, kRows, kRegisters>,
                .widen = widen,
                .peak = peak_of_fma<24>};
  table.read = read;
}

}  // namespace splitfuse
