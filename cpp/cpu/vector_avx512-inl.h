// Floats in one AVX-512 register. Included by files of that instruction set alone, inside their anonymous namespace.

struct Avx512 {
  using Reg = __m512;
  static constexpr int kLanes = 16;

  static Reg set(float x) { return _mm512_set1_ps(x); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg madd(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  // The second if one is NaN.
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg round(Reg x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // x * 2^n for whole n.
  static Reg scale(Reg x, Reg n) { return _mm512_scalef_ps(x, n); }
  static float first(Reg x) { return _mm512_cvtss_f32(x); }

  // The lowest n lanes; n of 0 or less: none.
  static __mmask16 lanes(int n) { return n >= kLanes ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
  static Reg keep(Reg x, int n, Reg fill) { return _mm512_mask_mov_ps(fill, lanes(n), x); }
  // Lanes from n on are zero; their memory is not touched.
  static Reg get(const float* p, int n) { return n >= kLanes ? load(p) : _mm512_maskz_loadu_ps(lanes(n), p); }
  // Masked stores are slow on some processors: whole registers go without.
  static void put(float* p, Reg x, int n) { n >= kLanes ? store(p, x) : _mm512_mask_storeu_ps(p, lanes(n), x); }

  static float reduce_add(Reg x) {
    x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, _MM_SHUFFLE(1, 0, 3, 2)));
    x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, _MM_SHUFFLE(2, 3, 0, 1)));
    x = _mm512_add_ps(x, _mm512_permute_ps(x, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm512_cvtss_f32(_mm512_add_ps(x, _mm512_permute_ps(x, _MM_SHUFFLE(2, 3, 0, 1))));
  }
  static float reduce_max(Reg x) {
    x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, _MM_SHUFFLE(1, 0, 3, 2)));
    x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, _MM_SHUFFLE(2, 3, 0, 1)));
    x = _mm512_max_ps(x, _mm512_permute_ps(x, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm512_cvtss_f32(_mm512_max_ps(x, _mm512_permute_ps(x, _MM_SHUFFLE(2, 3, 0, 1))));
  }

  // 2^x for x <= 127, within 2 ulp; 0 far below; NaN for NaN. A minimax polynomial of 2^f on [-1/2, 1/2].
  static Reg exp2(Reg x) {
    x = _mm512_max_ps(set(-160.0f), x);
    const Reg whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Reg f = _mm512_sub_ps(x, whole);
    Reg y = madd(set(0.000153458120f), f, set(0.00133999312f));
    y = madd(y, f, set(0.00961848896f));
    y = madd(y, f, set(0.0555032878f));
    y = madd(y, f, set(0.240226469f));
    y = madd(y, f, set(0.693147206f));
    y = madd(y, f, set(1.0f));
    return _mm512_scalef_ps(y, whole);
  }

  // To bfloat16: nearest, ties to even; NaN stays NaN.
  static __m256i to_bf16(Reg x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(sum, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
  static void put(unsigned short* p, Reg x, int n) {
    n >= kLanes ? _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(x))
                : _mm256_mask_storeu_epi16(p, lanes(n), to_bf16(x));
  }
};
