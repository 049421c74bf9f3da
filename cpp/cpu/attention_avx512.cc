#include <immintrin.h>

#include "cpu/attention_kernels.h"

namespace splitfuse {
namespace {

#include "cpu/vector_avx512-inl.h"

#include "cpu/attention-inl.h"

struct F32 : Avx512 {
  using Cell = float;
  using Weight = float;
  using Factors = __m512;
  static constexpr int kVecs = 4;
  static constexpr int kSteps = 2;
  static constexpr int kPairRows = 2;

  static Factors factors(const char* at, int64_t row_bytes, int step) {
    return load(reinterpret_cast<const float*>(at + step * row_bytes));
  }
  static Factors first_factors(const char* at) { return factors(at, 0, 0); }
  static Reg weights(const Weight* pair, int step) { return set(pair[step]); }
  static Reg fma(Reg weight, Factors factor, Reg sum) { return madd(weight, factor, sum); }
  static void pack(const Cell* in, Weight* out) { _mm256_storeu_ps(out, _mm256_loadu_ps(in)); }
  static Reg put_weights(Weight* out, Reg low, Reg high, Reg sum) {
    store(out, low);
    store(out + kLanes, high);
    return add(sum, add(low, high));
  }
};

struct Bf16 : F32 {
  using Cell = unsigned short;
  static constexpr int kPairRows = 1;

  static Factors factors(const char* at, int64_t, int step) {
    const __m512i pairs = _mm512_loadu_si512(at);
    return _mm512_castsi512_ps(step == 0 ? _mm512_slli_epi32(pairs, 16) : _mm512_maskz_mov_epi16(0xaaaaaaaa, pairs));
  }
  static Factors first_factors(const char* at) { return factors(at, 0, 0); }
  static void pack(const Cell* in, Weight* out) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
    _mm256_storeu_ps(out, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
  }
};

template <class Format>
void fill(AttentionKernels& kernels) {
  kernels.attend = Attend<Format>::attend;
  kernels.merge = Attend<Format>::merge;
  kernels.rotate = Attend<Format>::rotate;
  kernels.convert = Attend<Format>::convert;
}

}  // namespace

void attention_kernels_avx512(DType dtype, AttentionKernels& kernels) {
  dtype == DType::kF32 ? fill<F32>(kernels) : fill<Bf16>(kernels);
}

}  // namespace splitfuse
