// GEMM for NEON with BF16: BFMMLA multiplies two columns with two rows, four bf16 of each, one pair along k after the
// other: its sums have the bits that BFDOT would give them. On processors without extended BF16 behaviour, and wherever
// it is not asked for, each of its additions rounds to odd and makes denormals zero.
#include <arm_neon.h>

#include "cpu/gemm.h"

namespace splitfuse {
namespace {

#include "cpu/gemm_vector_neon-inl.h"

struct Vec : GemmNeon {
  using GemmNeon::store;
  static void store(uint16_t* p, Reg x) { vst1_u16(p, vreinterpret_u16_bf16(vcvt_bf16_f32(x))); }
};

#include "cpu/gemm-inl.h"

#include "cpu/tiles_neon-inl.h"

constexpr int kRegisters = 4;  // columns of a panel
constexpr int kRows = 6;  // 24 tiles, 3 pairs of rows and the weights of 32 registers

struct Bf16Format : TwoByTwo {
  using In = uint16_t;
  using Weight = uint16_t;
  using Out = uint16_t;
  static constexpr int32_t kPerStep = 4;

  template <int R, int C>
  [[gnu::always_inline]] static void step(const In* in, int64_t stride, const Weight* panel,
                                          Vec::Reg (&sums)[R + R % 2][C]) {
    bfloat16x8_t rows[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r += 2) {
      const int second = r + 1 < R ? r + 1 : r;
      rows[r] = vreinterpretq_bf16_u16(vcombine_u16(vld1_u16(in + r * stride), vld1_u16(in + second * stride)));
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const bfloat16x8_t columns = vreinterpretq_bf16_u16(vld1q_u16(panel + (2 * c + half) * 2 * Vec::kLanes));
#pragma GCC unroll 8
        for (int r = 0; r < R; r += 2) sums[r + half][c] = vbfmmlaq_f32(sums[r + half][c], columns, rows[r]);
      }
    }
  }
};

double peak(int64_t rounds) {
  constexpr int kSums = 24;
  Vec::Reg acc[kSums];
  uint32x4_t halves = vdupq_n_u32(0x3f003f00);  // 0.5 twice
  asm volatile("" : "+w"(halves));
  const bfloat16x8_t x = vreinterpretq_bf16_u32(halves);
#pragma GCC unroll 32
  for (int r = 0; r < kSums; ++r) acc[r] = Vec::set(0.0f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int r = 0; r < kSums; ++r) acc[r] = vbfmmlaq_f32(acc[r], x, x);
#pragma GCC unroll 32
    for (int r = 0; r < kSums; ++r) Vec::touch(acc[r]);
  }
  return 8.0 * kSums * Vec::kLanes * static_cast<double>(rounds);
}

}  // namespace

void add_gemm_neon_bf16(GemmTable& table) {
  table.bf16 = {.isa = Isa::kNeonBf16,
                .width = kRegisters * Vec::kLanes,
                .together = Bf16Format::kPerStep,
                .row_tile = kRows,
                .multiply = multiply<Bf16Format, kRows, kRegisters>,
                .widen = nullptr,
                .peak = peak};
}

}  // namespace splitfuse
