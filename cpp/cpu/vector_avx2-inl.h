// Floats in one AVX2 register. Included by files of that instruction set alone, inside their anonymous namespace.

struct Avx2 {
  using Reg = __m256;
  static constexpr int kLanes = 8;

  static Reg set(float x) { return _mm256_set1_ps(x); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg madd(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  // The second if one is NaN.
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg round(Reg x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static float first(Reg x) { return _mm256_cvtss_f32(x); }

  // All ones in the lowest n lanes; n of 0 or less: none.
  static __m256i lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Reg keep(Reg x, int n, Reg fill) { return _mm256_blendv_ps(fill, x, _mm256_castsi256_ps(lanes(n))); }
  // Lanes from n on are zero; their memory is not touched.
  static Reg get(const float* p, int n) { return n >= kLanes ? load(p) : _mm256_maskload_ps(p, lanes(n)); }
  // Masked stores are slow on some processors: whole registers go without.
  static void put(float* p, Reg x, int n) { n >= kLanes ? store(p, x) : _mm256_maskstore_ps(p, lanes(n), x); }

  static float reduce_add(Reg x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
  static float reduce_max(Reg x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
  }

  // x * 2^n for whole n, in two factors so that results may underflow or overflow.
  static Reg scale(Reg x, Reg n) {
    const __m256i whole = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    return mul(mul(x, power(half)), power(_mm256_sub_epi32(whole, half)));
  }
  static Reg power(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }

  // 2^x for x <= 127, within 2 ulp; 0 below 2^-126; NaN for NaN. A minimax polynomial of 2^f on [-1/2, 1/2].
  static Reg exp2(Reg x) {
    x = _mm256_max_ps(set(-127.0f), x);
    const Reg whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Reg f = _mm256_sub_ps(x, whole);
    Reg y = madd(set(0.000153458120f), f, set(0.00133999312f));
    y = madd(y, f, set(0.00961848896f));
    y = madd(y, f, set(0.0555032878f));
    y = madd(y, f, set(0.240226469f));
    y = madd(y, f, set(0.693147206f));
    y = madd(y, f, set(1.0f));
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }

  // To bfloat16 in the low half of each lane: nearest, ties to even; NaN stays NaN.
  static __m256i round_bf16(Reg x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(sum, quiet, nan), 16);
  }
  static __m128i to_bf16(Reg x) {
    const __m256i wide = round_bf16(x);
    return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  }
  static void put(unsigned short* p, Reg x, int n) {
    if (n >= kLanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(x));
    unsigned short some[kLanes];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(some), to_bf16(x));
    for (int i = 0; i < n; ++i) p[i] = some[i];
  }
};
