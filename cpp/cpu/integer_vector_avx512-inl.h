// What integer GEMM asks of an AVX-512 register, but for the dot products. Include inside the anonymous namespace of an
// AVX-512 file.

struct IntAvx512 {
  using Sums = __m512i;
  using Bytes = __m512i;

  static Sums zero() { return _mm512_setzero_si512(); }
  static Bytes load(const std::byte* p) { return _mm512_loadu_si512(p); }
  static Bytes low(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
  static Bytes high(Bytes x) { return low(_mm512_srli_epi16(x, 4)); }
  static __m512 to_float(Sums x) { return _mm512_cvtepi32_ps(x); }
  static __m512 load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  // ---- For quantize_row
  static __m512 load_cells(const float* p) { return _mm512_loadu_ps(p); }
  static __m512 load_cells(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  /// As integers the magnitudes of floats are in order, infinity and NaN above all.
  static float largest_magnitude(const __m512 (&x)[2]) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512i first = _mm512_and_si512(_mm512_castps_si512(x[0]), magnitude);
    const __m512i second = _mm512_and_si512(_mm512_castps_si512(x[1]), magnitude);
    const int32_t bits = _mm512_reduce_max_epi32(_mm512_max_epi32(first, second));
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
  static Sums round(__m512 x) { return _mm512_cvtps_epi32(x); }
  /// Stores a group in 8 bits and returns its sum.
  static int32_t store_group(const Sums (&x)[2], signed char* out) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(x[0]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16), _mm512_cvtepi32_epi8(x[1]));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(x[0], x[1]));
  }
};
