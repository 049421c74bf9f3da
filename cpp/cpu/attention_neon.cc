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

struct F32 : Neon {
  using Cell = float;
  using Weight = float;
  using Sum = Reg;
  using Factors = float32x4_t;
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
  static void pack(const Cell* in, Weight* out) {
    store(out, load(in));
    store(out + kLanes, load(in + kLanes));
  }
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
    const uint32x4_t pairs = vld1q_u32(reinterpret_cast<const uint32_t*>(at));
    return vreinterpretq_f32_u32(step == 0 ? vshlq_n_u32(pairs, 16) : vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
  }
  static Factors first_factors(const char* at) { return factors(at, 0, 0); }
  static Factors second_factors(const char* at, int64_t row_bytes) { return factors(at, row_bytes, 1); }
  static void pack(const Cell* in, Weight* out) {
    const uint16x8_t cells = vld1q_u16(in);
    store(out, vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(cells), 16)));
    store(out + kLanes, vreinterpretq_f32_u32(vshll_high_n_u16(cells, 16)));
  }
};

// Keys and values of 8 bits are multiplied by queries and softmax weights of 16.
template <class Activations>
struct Int8 : Activations {
  using Reg = float32x4_t;
  using Cell = typename Activations::Cell;
  using Weight = short;
  using Sum = int32x4_t;
  using Factors = int16x4_t;
  static constexpr bool kInt8 = true;
  static constexpr int kLanes = Activations::kLanes;
  static constexpr int kPairRows = 1;
  static constexpr int kLaneBytes = 2;

  static Sum zero() { return vdupq_n_s32(0); }
  static Factors factors(const char* at, int64_t, int step) {
    const int16x4_t pairs = vreinterpret_s16_s8(vld1_s8(reinterpret_cast<const int8_t*>(at)));
    return vshr_n_s16(step == 0 ? vshl_n_s16(pairs, 8) : pairs, 8);
  }
  static int16x4_t weights(const Weight* pair, int step) { return vdup_n_s16(pair[step]); }
  static Sum fma(int16x4_t weight, Factors factor, Sum sum) { return vmlal_s16(sum, weight, factor); }
  static Reg to_floats(Sum sum) { return vcvtq_f32_s32(sum); }
  static void widen(const Cell* in, float* out) { Activations::pack(in, out); }
  // Rows come in fours, so that n is all lanes.
  static void put_weights(Weight* out, Reg value, int) { vst1_s16(out, round_int16(value)); }
  static void put_int8(int8_t* out, Reg value, int) {
    const int16x4_t words = round_int16(value);
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    const int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
    __builtin_memcpy(out, &four, sizeof four);
  }

 private:
  static int16x4_t round_int16(Reg value) { return vqmovn_s32(vcvtnq_s32_f32(value)); }
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

void attention_kernels_neon(DType dtype, KvDType kv, AttentionKernels& kernels) {
  dtype == DType::kF32 ? fill<F32>(kv, kernels) : fill<Bf16>(kv, kernels);
  kernels.isa = Isa::kNeon;
}

}  // namespace splitfuse
