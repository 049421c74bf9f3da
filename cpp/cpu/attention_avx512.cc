#include <immintrin.h>

#include "cpu/attention_kernels.h"

namespace splitfuse {
namespace {

#include "cpu/vector_avx512-inl.h"

#include "cpu/kv_rows-inl.h"

#include "cpu/kv_fetch-inl.h"

#include "cpu/attention_tiles-inl.h"

#include "cpu/attention_scores-inl.h"

#include "cpu/attention-inl.h"

struct F32 : Avx512 {
  using Cell = float;
  using Weight = float;
  using Sum = Reg;
  using Factors = __m512;
  static constexpr bool kInt8 = false;
  static constexpr int kVecs = 4;
  static constexpr int kSteps = 2;
  static constexpr int kPairRows = 2;
  static constexpr int kLaneBytes = 4;

  static Sum zero() { return set(0.0f); }
  static Factors factors(const char* at, int64_t row_bytes, int step) {
    return load(reinterpret_cast<const float*>(at + step * row_bytes));
  }
  static Factors first_factors(const char* at) { return factors(at, 0, 0); }
  static Factors second_factors(const char* at, int64_t row_bytes) { return factors(at, row_bytes, 1); }
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
  static Factors second_factors(const char* at, int64_t row_bytes) { return factors(at, row_bytes, 1); }
  static void pack(const Cell* in, Weight* out) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
    _mm256_storeu_ps(out, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
  }
};

// Keys and values of 8 bits are multiplied by queries and softmax weights of 16, two products to a lane.
template <class Activations>
struct Int8 : Activations {
  using Reg = __m512;
  using Cell = typename Activations::Cell;
  using Weight = short;
  using Sum = __m512i;
  using Factors = __m512i;
  static constexpr bool kInt8 = true;
  static constexpr int kLanes = Activations::kLanes;
  static constexpr int kSteps = 1;
  static constexpr int kPairRows = 1;
  static constexpr int kLaneBytes = 2;

  static Sum zero() { return _mm512_setzero_si512(); }
  static Factors factors(const char* at, int64_t, int) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  }
  static __m512i weights(const Weight* pair, int) {
    int both;
    __builtin_memcpy(&both, pair, sizeof both);
    return _mm512_set1_epi32(both);
  }
  static Sum fma(__m512i weight, Factors factor, Sum sum) {
    Sum next = _mm512_add_epi32(sum, _mm512_madd_epi16(weight, factor));
    // Or the compiler adds the products of several steps up first, and runs out of registers.
    __asm__("" : "+v"(next));
    return next;
  }
  static Reg to_floats(Sum sum) { return _mm512_cvtepi32_ps(sum); }
  static void widen(const Cell* in, float* out) { Activations::pack(in, out); }
  static void put_weights(Weight* out, Reg value, int n) {
    const __m256i words = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(value));
    auto* at = reinterpret_cast<__m256i*>(out);
    n >= kLanes ? _mm256_storeu_si256(at, words) : _mm256_mask_storeu_epi16(at, Activations::lanes(n), words);
  }
  static void put_int8(int8_t* out, Reg value, int n) {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(value));
    auto* at = reinterpret_cast<__m128i*>(out);
    n >= kLanes ? _mm_storeu_si128(at, bytes) : _mm_mask_storeu_epi8(at, Activations::lanes(n), bytes);
  }
};

template <class Format>
void fill_attention(AttentionKernels& kernels) {
  kernels.attend = Attend<Format>::attend;
  kernels.merge = Attend<Format>::merge;
}

template <class Activations>
void fill(KvDType kv, AttentionKernels& kernels) {
  kv == KvDType::kInt8 ? fill_attention<Int8<Activations>>(kernels) : fill_attention<Activations>(kernels);
  kernels.norm = KvRows<F32>::norm;
  kernels.rotate = KvRows<F32>::rotate;
  kernels.convert = KvRows<Activations>::convert;
  kernels.quantize = KvRows<Int8<F32>>::quantize;
}

}  // namespace

void attention_kernels_avx512(DType dtype, KvDType kv, AttentionKernels& kernels) {
  dtype == DType::kF32 ? fill<F32>(kv, kernels) : fill<Bf16>(kv, kernels);
  kernels.isa = Isa::kAvx512;
}

}  // namespace splitfuse
