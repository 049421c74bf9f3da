// What GEMM asks of a NEON register beyond the common. Include inside the anonymous namespace of a NEON file.

#include "cpu/vector_neon-inl.h"

struct GemmNeon : Neon {
  static void touch(Reg& x) { asm volatile("" : "+w"(x)); }  // the compiler may not know what x is

  /// The first, the second of kLanes pairs of bf16.
  static Reg load_first(const uint16_t* p) { return vreinterpretq_f32_u32(vshlq_n_u32(load_pairs(p), 16)); }
  static Reg load_second(const uint16_t* p) {
    return vreinterpretq_f32_u32(vandq_u32(load_pairs(p), vdupq_n_u32(0xffff0000u)));
  }
  static uint32x4_t load_pairs(const uint16_t* p) { return vreinterpretq_u32_u16(vld1q_u16(p)); }

  /// Where groups of 8 sums of gate and of up alternate, from the first of kLanes of gate: these, those of up.
  static Reg gates(const float* p) { return load(p); }
  static Reg ups(const float* p) { return load(p + 8); }

  /// As f32 or bf16.
  static void store(float* p, Reg x) { Neon::store(p, x); }
  static void store(uint16_t* p, Reg x) { put(p, x, kLanes); }
};
