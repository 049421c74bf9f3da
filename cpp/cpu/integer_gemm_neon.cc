// Integer GEMM for NEON with dot products: four products of signed bytes are added to a sum by one instruction.
#include <arm_neon.h>

#include "cpu/gemm.h"

namespace splitfuse {
namespace {

#include "cpu/gemm_vector_neon-inl.h"
#include "cpu/integer_vector_neon-inl.h"

using Vec = GemmNeon;

struct Int : IntNeon {
  using Weights8 = int8x16_t;
  static Sums start(int32_t) { return zero(); }
  static Weights8 prepare8(Bytes x) { return vreinterpretq_s8_u8(veorq_u8(x, vdupq_n_u8(kWeightBias))); }
  static Sums dot8(Sums sums, Weights8 weights, int32_t four) {
    return vdotq_s32(sums, weights, vreinterpretq_s8_s32(vdupq_n_s32(four)));
  }
  static Sums dot4(Sums sums, Bytes weights, int32_t four) { return dot8(sums, vreinterpretq_s8_u8(weights), four); }
};

#include "cpu/gemm-inl.h"
#include "cpu/integer_gemm-inl.h"

#include "cpu/integer_dots-inl.h"

constexpr int kRegisters = 4;  // columns of a panel
constexpr int kRows = 3;       // 12 sums, 12 of the group, 4 weights and 1 broadcast of 32 registers

double peak(int64_t rounds) {
  constexpr int kSums = 24;
  int32x4_t acc[kSums];
  int8x16_t x = vdupq_n_s8(1);
  asm volatile("" : "+w"(x));
#pragma GCC unroll 32
  for (int r = 0; r < kSums; ++r) acc[r] = Int::zero();
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int r = 0; r < kSums; ++r) acc[r] = vdotq_s32(acc[r], x, x);
#pragma GCC unroll 32
    for (int r = 0; r < kSums; ++r) asm volatile("" : "+w"(acc[r]));
  }
  return 8.0 * kSums * Vec::kLanes * static_cast<double>(rounds);
}

}  // namespace

void add_integer_gemm_neon(GemmTable& table) {
  table.int8 = integer_kernel<Int8Format, kRows, kRegisters>(Isa::kNeon, peak);
  table.int4 = integer_kernel<Int4Format, kRows, kRegisters>(Isa::kNeon, peak);
}

}  // namespace splitfuse
