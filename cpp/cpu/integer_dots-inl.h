// Groups of integers where an instruction adds four products of neighbours along k to a sum. Include after
// integer_gemm-inl.h; Int also has
//
//   Sums                          a register of Vec::kLanes 32-bit sums
//   Bytes                         a register of 4 kLanes weights, four neighbours along k in a lane
//   start(offset)                 sums before the first dot8: `offset`, or 0 where dot8 takes signed weights
//   Weights8, prepare8(Bytes)     int8 weights as dot8 wants them
//   dot8(Sums, Weights8, four)    sums + weights times four values of a row
//   dot4(Sums, Bytes, four)       the same for weights of 0 to 15
//   load, low, high               Bytes from memory; the low, the high halves of their bytes
//   to_float(Sums), load_half(p)

struct Int8Format : RowByRow {
  static constexpr int32_t kTogether = 4;
  static constexpr int32_t group_bytes(int32_t width) { return (kQuantGroup + 2) * width; }

  template <int R, int C>
  [[gnu::always_inline]] static void group(const RowGroup<R>& rows, const std::byte* panel, Ahead& ahead,
                                           Vec::Reg (&sums)[R][C]) {
    typename Int::Sums dots[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) dots[r][c] = Int::start(rows.offset(r));
    }
#pragma GCC unroll 8
    for (int step = 0; step < kQuantGroup / 4; ++step) {
      ahead.fetch<4 * C * Vec::kLanes>();
      typename Int::Weights8 weights[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) weights[c] = Int::prepare8(Int::load(panel + (step * C + c) * 4 * Vec::kLanes));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) dots[r][c] = Int::dot8(dots[r][c], weights[c], rows.four(r, step));
      }
    }
    ahead.fetch<2 * C * Vec::kLanes>();
    const auto* scales = reinterpret_cast<const uint16_t*>(panel + kQuantGroup * C * Vec::kLanes);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Vec::Reg scale = Int::load_half(scales + c * Vec::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec::Reg dot = Vec::mul(Int::to_float(dots[r][c]), Vec::set(rows.scale(r)));
        sums[r][c] = Vec::madd(dot, scale, sums[r][c]);
      }
    }
  }
};

struct Int4Format : RowByRow {
  static constexpr int32_t kTogether = 4;
  static constexpr int32_t group_bytes(int32_t width) { return (kQuantGroup / 2 + 4) * width; }

  template <int R, int C>
  [[gnu::always_inline]] static void group(const RowGroup<R>& rows, const std::byte* panel, Ahead& ahead,
                                           Vec::Reg (&sums)[R][C]) {
    constexpr int kLoads = kQuantGroup / 8;
    typename Int::Sums dots[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) dots[r][c] = Int::zero();
    }
#pragma GCC unroll 8
    for (int i = 0; i < kLoads; ++i) {
      ahead.fetch<4 * C * Vec::kLanes>();
      typename Int::Bytes both[C];
      typename Int::Bytes weights[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        both[c] = Int::load(panel + (i * C + c) * 4 * Vec::kLanes);
        weights[c] = Int::low(both[c]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) dots[r][c] = Int::dot4(dots[r][c], weights[c], rows.four(r, i));
      }
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) weights[c] = Int::high(both[c]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) dots[r][c] = Int::dot4(dots[r][c], weights[c], rows.four(r, kLoads + i));
      }
    }
    ahead.fetch<4 * C * Vec::kLanes>();
    const auto* scales = reinterpret_cast<const uint16_t*>(panel + kLoads * C * 4 * Vec::kLanes);
    const uint16_t* minima = scales + C * Vec::kLanes;
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Vec::Reg scale = Int::load_half(scales + c * Vec::kLanes);
      const Vec::Reg minimum = Int::load_half(minima + c * Vec::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec::Reg dot = Vec::mul(Int::to_float(dots[r][c]), Vec::set(rows.scale(r)));
        sums[r][c] = Vec::madd(minimum, Vec::set(rows.total(r)), Vec::madd(dot, scale, sums[r][c]));
      }
    }
  }
};
