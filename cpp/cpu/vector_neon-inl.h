// Floats in one NEON register. Included by files of that instruction set alone, inside their anonymous namespace.

struct Neon {
  using Reg = float32x4_t;
  static constexpr int kLanes = 4;

  static Reg set(float x) { return vdupq_n_f32(x); }
  static Reg load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Reg x) { vst1q_f32(p, x); }
  static Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static Reg sub(Reg a, Reg b) { return vsubq_f32(a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  static Reg madd(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  // NaN if one is NaN.
  static Reg max(Reg a, Reg b) { return vmaxq_f32(a, b); }
  static Reg min(Reg a, Reg b) { return vminq_f32(a, b); }
  static Reg div(Reg a, Reg b) { return vdivq_f32(a, b); }
  static Reg round(Reg x) { return vrndnq_f32(x); }
  static float first(Reg x) { return vgetq_lane_f32(x, 0); }

  // All ones in the lowest n lanes; n of 0 or less: none.
  static uint32x4_t lanes(int n) {
    const int32x4_t index = {0, 1, 2, 3};
    return vcltq_s32(index, vdupq_n_s32(n));
  }
  static Reg keep(Reg x, int n, Reg fill) { return vbslq_f32(lanes(n), x, fill); }
  // Lanes from n on are zero; their memory is not touched.
  static Reg get(const float* p, int n) {
    if (n >= kLanes) return load(p);
    float some[kLanes] = {};
    for (int i = 0; i < n; ++i) some[i] = p[i];
    return load(some);
  }
  static void put(float* p, Reg x, int n) {
    if (n >= kLanes) return store(p, x);
    float some[kLanes];
    store(some, x);
    for (int i = 0; i < n; ++i) p[i] = some[i];
  }

  static float reduce_add(Reg x) { return vaddvq_f32(x); }
  static float reduce_max(Reg x) { return vmaxvq_f32(x); }

  // x * 2^n for whole n, in two factors so that results may underflow or overflow.
  static Reg scale(Reg x, Reg n) {
    const int32x4_t whole = vcvtq_s32_f32(n);
    const int32x4_t half = vshrq_n_s32(whole, 1);
    return mul(mul(x, power(half)), power(vsubq_s32(whole, half)));
  }
  static Reg power(int32x4_t n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }

  // 2^x for x <= 127, within 2 ulp; 0 below 2^-126; NaN for NaN. A minimax polynomial of 2^f on [-1/2, 1/2].
  static Reg exp2(Reg x) {
    x = max(set(-127.0f), x);
    const Reg whole = vrndnq_f32(x);
    const Reg f = sub(x, whole);
    Reg y = madd(set(0.000153458120f), f, set(0.00133999312f));
    y = madd(y, f, set(0.00961848896f));
    y = madd(y, f, set(0.0555032878f));
    y = madd(y, f, set(0.240226469f));
    y = madd(y, f, set(0.693147206f));
    y = madd(y, f, set(1.0f));
    const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(whole), vdupq_n_s32(127));
    return mul(y, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  }

  // To bfloat16: nearest, ties to even; NaN stays NaN.
  static uint16x4_t to_bf16(Reg x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t sum = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), sum, quiet), 16);
  }
  static void put(unsigned short* p, Reg x, int n) {
    if (n >= kLanes) return vst1_u16(p, to_bf16(x));
    unsigned short some[kLanes];
    vst1_u16(some, to_bf16(x));
    for (int i = 0; i < n; ++i) p[i] = some[i];
  }
};
