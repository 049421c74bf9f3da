// Integer GEMM for NEON with I8MM: USMMLA multiplies two columns with two rows, eight bytes of each.
#include <arm_neon.h>

#include "cpu/gemm.h"

namespace splitfuse {
namespace {

#include "cpu/gemm_vector_neon-inl.h"
#include "cpu/integer_vector_neon-inl.h"

using Vec = GemmNeon;
using Int = IntNeon;

#include "cpu/gemm-inl.h"
#include "cpu/integer_gemm-inl.h"

#include "cpu/tiles_neon-inl.h"

constexpr int kRegisters = 4;  // columns of a panel
constexpr int kRows = 4;       // 16 tiles of sums, 8 registers of rows, and of the group 2 tiles of 32 registers
constexpr int kSteps = kQuantGroup / 8;

/// What USMMLA takes of a group of R rows, at r for rows r and r + 1; a last row without a partner is its own.
template <int R>
struct PairedRows {
  /// Of step s: eight values of the first, then of the second.
  [[gnu::always_inline]] static void values(const RowGroup<R>& rows, int8x16_t (&out)[R][kSteps]) {
#pragma GCC unroll 2
    for (int r = 0; r < R; r += 2) {
      const std::byte* first = rows.values + r * rows.stride;
      const std::byte* second = rows.values + partner(r) * rows.stride;
#pragma GCC unroll 2
      for (int s = 0; s < kSteps; s += 2) {
        const int64x2_t a = vreinterpretq_s64_u8(Int::load(first + 8 * s));
        const int64x2_t b = vreinterpretq_s64_u8(Int::load(second + 8 * s));
        out[r][s] = vreinterpretq_s8_s64(vzip1q_s64(a, b));
        out[r][s + 1] = vreinterpretq_s8_s64(vzip2q_s64(a, b));
      }
    }
  }

  // A number of each row as a tile has them.
  [[gnu::always_inline]] static int32x4_t offsets(const RowGroup<R>& rows, int r) {
    return vzip1q_s32(vdupq_n_s32(rows.offset(r)), vdupq_n_s32(rows.offset(partner(r))));
  }
  [[gnu::always_inline]] static void scales(const RowGroup<R>& rows, Vec::Reg (&out)[R]) {
#pragma GCC unroll 2
    for (int r = 0; r < R; r += 2) out[r] = vzip1q_f32(Vec::set(rows.scale(r)), Vec::set(rows.scale(partner(r))));
  }
  [[gnu::always_inline]] static void totals(const RowGroup<R>& rows, Vec::Reg (&out)[R]) {
#pragma GCC unroll 2
    for (int r = 0; r < R; r += 2) out[r] = vzip1q_f32(Vec::set(rows.total(r)), Vec::set(rows.total(partner(r))));
  }

 private:
  static constexpr int partner(int r) { return r + 1 < R ? r + 1 : r; }
};

/// Of four columns' numbers, those of the first two or the last two as a tile has them.
[[gnu::always_inline]] inline Vec::Reg columns_of(Vec::Reg four, int half) {
  return half == 0 ? vzip1q_f32(four, four) : vzip2q_f32(four, four);
}

struct Int8Format : TwoByTwo {
  static constexpr int32_t kTogether = 8;
  static constexpr int32_t group_bytes(int32_t width) { return (kQuantGroup + 2) * width; }

  template <int R, int C>
  [[gnu::always_inline]] static void group(const RowGroup<R>& rows, const std::byte* panel, Ahead& ahead,
                                           Vec::Reg (&sums)[R + R % 2][C]) {
    constexpr int W = C * Vec::kLanes;
    const auto* scales = reinterpret_cast<const uint16_t*>(panel + kQuantGroup * W);
    int8x16_t values[R][kSteps];
    PairedRows<R>::values(rows, values);
    Vec::Reg row_scales[R];
    PairedRows<R>::scales(rows, row_scales);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      ahead.fetch<kQuantGroup * Vec::kLanes>();
      const Vec::Reg four = Int::load_half(scales + c * Vec::kLanes);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        int32x4_t dots[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; r += 2) dots[r] = PairedRows<R>::offsets(rows, r);
#pragma GCC unroll 4
        for (int s = 0; s < kSteps; ++s) {
          const uint8x16_t weights = Int::load(panel + s * 8 * W + (2 * c + half) * 16);
#pragma GCC unroll 2
          for (int r = 0; r < R; r += 2) dots[r] = vusmmlaq_s32(dots[r], weights, values[r][s]);
        }
        const Vec::Reg scale = columns_of(four, half);
#pragma GCC unroll 2
        for (int r = 0; r < R; r += 2) {
          sums[r + half][c] = Vec::madd(Vec::mul(Int::to_float(dots[r]), row_scales[r]), scale, sums[r + half][c]);
        }
      }
    }
    ahead.fetch<2 * W>();
  }
};

struct Int4Format : TwoByTwo {
  static constexpr int32_t kTogether = 8;
  static constexpr int32_t group_bytes(int32_t width) { return (kQuantGroup / 2 + 4) * width; }

  template <int R, int C>
  [[gnu::always_inline]] static void group(const RowGroup<R>& rows, const std::byte* panel, Ahead& ahead,
                                           Vec::Reg (&sums)[R + R % 2][C]) {
    constexpr int W = C * Vec::kLanes;
    const auto* scales = reinterpret_cast<const uint16_t*>(panel + kQuantGroup / 2 * W);
    add_dots(rows, panel, scales, ahead, sums);
    Vec::Reg totals[R];
    PairedRows<R>::totals(rows, totals);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Vec::Reg four = Int::load_half(scales + W + c * Vec::kLanes);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const Vec::Reg minimum = columns_of(four, half);
#pragma GCC unroll 2
        for (int r = 0; r < R; r += 2) sums[r + half][c] = Vec::madd(minimum, totals[r], sums[r + half][c]);
      }
    }
    ahead.fetch<4 * W>();
  }

 private:
  /// All but the minima, which wait until the rows' values have left the registers.
  template <int R, int P, int C>
  [[gnu::always_inline]] static void add_dots(const RowGroup<R>& rows, const std::byte* panel, const uint16_t* scales,
                                              Ahead& ahead, Vec::Reg (&sums)[P][C]) {
    constexpr int W = C * Vec::kLanes;
    int8x16_t values[R][kSteps];
    PairedRows<R>::values(rows, values);
    Vec::Reg row_scales[R];
    PairedRows<R>::scales(rows, row_scales);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      ahead.fetch<kQuantGroup / 2 * Vec::kLanes>();
      const Vec::Reg four = Int::load_half(scales + c * Vec::kLanes);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        int32x4_t dots[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; r += 2) dots[r] = Int::zero();
#pragma GCC unroll 2
        for (int s = 0; s < kSteps / 2; ++s) {
          const uint8x16_t both = Int::load(panel + s * 8 * W + (2 * c + half) * 16);
#pragma GCC unroll 2
          for (int r = 0; r < R; r += 2) {
            dots[r] = vusmmlaq_s32(dots[r], Int::low(both), values[r][s]);
            dots[r] = vusmmlaq_s32(dots[r], Int::high(both), values[r][kSteps / 2 + s]);
          }
        }
        const Vec::Reg scale = columns_of(four, half);
#pragma GCC unroll 2
        for (int r = 0; r < R; r += 2) {
          sums[r + half][c] = Vec::madd(Vec::mul(Int::to_float(dots[r]), row_scales[r]), scale, sums[r + half][c]);
        }
      }
    }
  }
};

double peak(int64_t rounds) {
  constexpr int kSums = 24;
  int32x4_t acc[kSums];
  uint8x16_t x = vdupq_n_u8(1);
  asm volatile("" : "+w"(x));
#pragma GCC unroll 32
  for (int r = 0; r < kSums; ++r) acc[r] = Int::zero();
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int r = 0; r < kSums; ++r) acc[r] = vusmmlaq_s32(acc[r], x, vreinterpretq_s8_u8(x));
#pragma GCC unroll 32
    for (int r = 0; r < kSums; ++r) asm volatile("" : "+w"(acc[r]));
  }
  return 16.0 * kSums * Vec::kLanes * static_cast<double>(rounds);
}

}  // namespace

void add_integer_gemm_neon_i8mm(GemmTable& table) {
  table.int8 = integer_kernel<Int8Format, kRows, kRegisters>(Isa::kNeonI8mm, peak);
  table.int4 = integer_kernel<Int4Format, kRows, kRegisters>(Isa::kNeonI8mm, peak);
}

}  // namespace splitfuse
