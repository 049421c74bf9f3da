// Sums of the instructions that multiply two columns with two rows at a time. Include inside the anonymous namespace of
// a NEON file, after gemm-inl.h.

/// Registers c of a pair of rows hold two tiles while a format works, of the first two and the last two of their
/// columns: [first column: both rows, second column: both rows].
struct TwoByTwo {
  static constexpr int kRowStep = 2;

  template <int R, int C>
  [[gnu::always_inline]] static void to_tiles(Vec::Reg (&sums)[R][C]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r += 2) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const Vec::Reg first = sums[r][c];
        sums[r][c] = vzip1q_f32(first, sums[r + 1][c]);
        sums[r + 1][c] = vzip2q_f32(first, sums[r + 1][c]);
      }
    }
  }
  template <int R, int C>
  [[gnu::always_inline]] static void from_tiles(Vec::Reg (&sums)[R][C]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r += 2) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const Vec::Reg first = sums[r][c];
        sums[r][c] = vuzp1q_f32(first, sums[r + 1][c]);
        sums[r + 1][c] = vuzp2q_f32(first, sums[r + 1][c]);
      }
    }
  }
};
