#include <arm_neon.h>

#include "cpu/attention_kernels.h"

namespace splitfuse {
namespace {

#include "cpu/vector_neon-inl.h"

#include "cpu/kv_rows-inl.h"

#include "cpu/kv_fetch-inl.h"

#include "cpu/attention_tiles-inl.h"

#include "cpu/attention_scores-inl.h"

#include "cpu/attention-inl.h"

// Both products of a pair in one instruction. Softmax weights are rounded to bfloat16, and it is the rounded
// weights that are summed, so that they still add up to one.
struct Bf16 : Neon {
  using Cell = unsigned short;
  using Weight = unsigned short;
  using Sum = Reg;
  using Factors = bfloat16x8_t;
  static constexpr bool kInt8 = false;
  static constexpr int kVecs = 4;
  static constexpr int kSteps = 1;
  static constexpr int kPairRows = 1;
  static constexpr int kLaneBytes = 4;

  static Sum zero() { return set(0.0f); }
  static uint32x4_t load_pairs(const char* at) { return vld1q_u32(reinterpret_cast<const uint32_t*>(at)); }
  static Factors factors(const char* at, int64_t, int) { return vreinterpretq_bf16_u32(load_pairs(at)); }
  static Factors first_factors(const char* at) {
    return vreinterpretq_bf16_u32(vandq_u32(load_pairs(at), vdupq_n_u32(0xffff)));
  }
  static Factors second_factors(const char* at, int64_t) {
    return vreinterpretq_bf16_u32(vandq_u32(load_pairs(at), vdupq_n_u32(0xffff0000u)));
  }
  static bfloat16x8_t weights(const Weight* pair, int) {
    uint32_t both;
    __builtin_memcpy(&both, pair, sizeof both);
    return vreinterpretq_bf16_u32(vdupq_n_u32(both));
  }
  static Reg fma(bfloat16x8_t weight, Factors factor, Reg sum) { return vbfdotq_f32(sum, weight, factor); }
  static void pack(const Cell* in, Weight* out) { vst1q_u16(out, vld1q_u16(in)); }
  static Reg put_weights(Weight* out, Reg low, Reg high, Reg sum) {
    const bfloat16x8_t rounded = vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high);
    vst1q_u16(out, vreinterpretq_u16_bf16(rounded));
    uint32x4_t ones = vdupq_n_u32(0x3f803f80);
    // Or gcc 12 takes them for bfloat16, and loads ones in half precision.
    __asm__("" : "+w"(ones));
    return vbfdotq_f32(sum, rounded, vreinterpretq_bf16_u32(ones));
  }
};

}  // namespace

void attention_kernels_neon_bf16(DType dtype, KvDType kv, AttentionKernels& kernels) {
  if (dtype != DType::kBF16 || kv == KvDType::kInt8) return;   // integers are multiplied as in NEON
  kernels.attend = Attend<Bf16>::attend;
  kernels.merge = Attend<Bf16>::merge;
  kernels.isa = Isa::kNeonBf16;
}

}  // namespace splitfuse
