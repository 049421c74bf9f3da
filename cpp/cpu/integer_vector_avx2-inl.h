// What integer GEMM asks of an AVX2 register, but for the dot products. Include inside the anonymous namespace of an
// AVX2 or AVX-VNNI file.

struct IntAvx2 {
  using Sums = __m256i;
  using Bytes = __m256i;

  static Sums zero() { return _mm256_setzero_si256(); }
  static Bytes load(const std::byte* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Bytes low(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
  static Bytes high(Bytes x) { return low(_mm256_srli_epi16(x, 4)); }
  static __m256 to_float(Sums x) { return _mm256_cvtepi32_ps(x); }
  static __m256 load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  // ---- For quantize_row
  static __m256 load_cells(const float* p) { return _mm256_loadu_ps(p); }
  static __m256 load_cells(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  /// As integers the magnitudes of floats are in order, infinity and NaN above all.
  static float largest_magnitude(const __m256 (&x)[4]) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i top = zero();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(x[i]), magnitude));
    }
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    const int32_t bits = _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
  static Sums round(__m256 x) { return _mm256_cvtps_epi32(x); }
  /// Stores a group in 8 bits and returns its sum.
  static int32_t store_group(const Sums (&x)[4], signed char* out) {
    __m256i sums = zero();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x[i]), _mm256_extracti128_si256(x[i], 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 8 * i), _mm_packs_epi16(words, words));
      sums = _mm256_add_epi32(sums, x[i]);
    }
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  }
};
