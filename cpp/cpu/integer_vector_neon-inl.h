// What integer GEMM asks of a NEON register, but for the products. Include inside the anonymous namespace of a NEON
// file.

struct IntNeon {
  using Sums = int32x4_t;
  using Bytes = uint8x16_t;

  static Sums zero() { return vdupq_n_s32(0); }
  static Bytes load(const std::byte* p) { return vld1q_u8(reinterpret_cast<const uint8_t*>(p)); }
  static Bytes low(Bytes x) { return vandq_u8(x, vdupq_n_u8(15)); }
  static Bytes high(Bytes x) { return vshrq_n_u8(x, 4); }
  static float32x4_t to_float(Sums x) { return vcvtq_f32_s32(x); }
  static float32x4_t load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

  // ---- For quantize_row
  static float32x4_t load_cells(const float* p) { return vld1q_f32(p); }
  static float32x4_t load_cells(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  /// As integers the magnitudes of floats are in order, infinity and NaN above all.
  static float largest_magnitude(const float32x4_t (&x)[8]) {
    uint32x4_t top = vdupq_n_u32(0);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) top = vmaxq_u32(top, vreinterpretq_u32_f32(vabsq_f32(x[i])));
    const uint32_t bits = vmaxvq_u32(top);
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
  static Sums round(float32x4_t x) { return vcvtnq_s32_f32(x); }
  /// Stores a group in 8 bits and returns its sum.
  static int32_t store_group(const Sums (&x)[8], signed char* out) {
    Sums sums = zero();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int16x8_t words = vcombine_s16(vmovn_s32(x[2 * i]), vmovn_s32(x[2 * i + 1]));
      vst1_s8(out + 8 * i, vmovn_s16(words));
      sums = vaddq_s32(sums, vaddq_s32(x[2 * i], x[2 * i + 1]));
    }
    return vaddvq_s32(sums);
  }
};
