// The GEMM loops over integer weights and rows (RowRecord), once for all vector instruction sets. Include inside the
// anonymous namespace of a file compiled for one of them, after Vec and gemm-inl.h and a struct Int:
//
//   Sums                          a register of Vec::kLanes 32-bit sums
//   Bytes                         a register of 4 kLanes weights, four neighbours along k in a lane
//   start(offset)                 sums before the first dot8: `offset`, or 0 where dot8 takes signed weights
//   Weights8, prepare8(Bytes)     int8 weights as dot8 wants them
//   dot8(Sums, Weights8, four)    sums + weights times four values of a row
//   dot4(Sums, Bytes, four)       the same for weights of 0 to 15
//   load, low, high               Bytes from memory; the low, the high halves of their bytes
//   to_float(Sums), load_half(p), zero()
//   load_cells, largest_magnitude, round, store_values   what quantize_row asks for
//
// A row's sums are a chain of multiply-adds, group after group, whatever the tile; within a group they are exact.

/// Bytes of a panel that a walk over the tiles of rows covers, so that they stay in the first cache.
constexpr int32_t kIntegerBlockBytes = 24 << 10;

/// The same group of R rows.
template <int R>
struct RowGroup {
  const std::byte* values;    // of the first row
  const std::byte* scales;
  const std::byte* offsets;
  const std::byte* totals;
  int64_t stride;

  int32_t four(int r, int step) const { return number<int32_t>(values + r * stride + 4 * step); }
  float scale(int r) const { return number<float>(scales + r * stride); }
  int32_t offset(int r) const { return number<int32_t>(offsets + r * stride); }
  float total(int r) const { return number<float>(totals + r * stride); }
  void advance() {
    values += kQuantGroup;
    scales += 4;
    offsets += 4;
    totals += 4;
  }

 private:
  template <class T>
  static T number(const std::byte* at) {
    T value;
    __builtin_memcpy(&value, at, sizeof value);
    return value;
  }
};

/// Fetches what comes kAheadBytes after C registers of a panel.
template <int C>
[[gnu::always_inline]] inline void fetch_ahead(const std::byte* panel) {
#pragma GCC unroll 8
  for (size_t i = 0; i < C * 4 * Vec::kLanes; i += kLineBytes) __builtin_prefetch(panel + kAheadBytes + i);
}

struct Int8Format {
  static constexpr int32_t group_bytes(int32_t width) { return (kQuantGroup + 2) * width; }

  template <int R, int C>
  [[gnu::always_inline]] static void group(const RowGroup<R>& rows, const std::byte* panel, Vec::Reg (&sums)[R][C]) {
    typename Int::Sums dots[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) dots[r][c] = Int::start(rows.offset(r));
    }
#pragma GCC unroll 8
    for (int step = 0; step < kQuantGroup / 4; ++step) {
      fetch_ahead<C>(panel + step * C * 4 * Vec::kLanes);
      typename Int::Weights8 weights[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) weights[c] = Int::prepare8(Int::load(panel + (step * C + c) * 4 * Vec::kLanes));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) dots[r][c] = Int::dot8(dots[r][c], weights[c], rows.four(r, step));
      }
    }
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

struct Int4Format {
  static constexpr int32_t group_bytes(int32_t width) { return (kQuantGroup / 2 + 4) * width; }

  template <int R, int C>
  [[gnu::always_inline]] static void group(const RowGroup<R>& rows, const std::byte* panel, Vec::Reg (&sums)[R][C]) {
    constexpr int kLoads = kQuantGroup / 8;
    typename Int::Sums dots[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) dots[r][c] = Int::zero();
    }
#pragma GCC unroll 8
    for (int i = 0; i < kLoads; ++i) {
      fetch_ahead<C>(panel + i * C * 4 * Vec::kLanes);
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
    fetch_ahead<C>(panel + kLoads * C * 4 * Vec::kLanes);
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

/// One block of groups of one tile of rows against one panel.
struct IntegerBlock {
  const std::byte* in;       // first row
  int64_t stride;
  RowRecord record;
  int32_t begin;             // the first group
  int32_t groups;
  const std::byte* panel;    // of the first group
  float* sums;               // [rows][W]
};

/// sums [R][W] += R rows times the block of the panel; from zero at the first group.
template <class Format, int R, int C>
void integer_micro(const IntegerBlock& block) {
  constexpr int W = C * Vec::kLanes;
  Vec::Reg sums[R][C];
  if (block.begin == 0) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[r][c] = Vec::set(0.0f);
    }
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[r][c] = Vec::load(block.sums + r * W + c * Vec::kLanes);
    }
  }
  RowGroup<R> rows = {block.in + block.begin * kQuantGroup, block.in + block.record.scales + 4 * block.begin,
                      block.in + block.record.offsets + 4 * block.begin,
                      block.in + block.record.totals + 4 * block.begin, block.stride};
  const std::byte* panel = block.panel;
  const int32_t groups = block.groups;
#pragma GCC unroll 1
  for (int32_t g = 0; g < groups; ++g) {
    Format::template group<R, C>(rows, panel, sums);
    rows.advance();
    panel += Format::group_bytes(W);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) Vec::store(block.sums + r * W + c * Vec::kLanes, sums[r][c]);
  }
}

template <class Format, int R, int C>
[[gnu::always_inline]] inline void integer_micro_rows(int32_t rows, const IntegerBlock& block) {
  if (rows == R) {
    integer_micro<Format, R, C>(block);
  } else if constexpr (R > 1) {
    integer_micro_rows<Format, R - 1, C>(rows, block);
  }
}

/// As multiply() of gemm-inl.h; here it is a block of the panel that stays in the first cache while all rows pass.
template <class Format, int R, int C>
void integer_multiply(const GemmTask& task) {
  constexpr int32_t W = C * Vec::kLanes;
  constexpr int32_t kGroupBytes = Format::group_bytes(W);
  constexpr int32_t kBlockGroups = kIntegerBlockBytes / kGroupBytes;
  IntegerBlock block;
  block.stride = task.in_stride;
  block.record = row_record(task.depth);
  const int32_t all = block.record.groups;
  const int32_t blocks = (all + kBlockGroups - 1) / kBlockGroups;
  const int32_t block_groups = (all + blocks - 1) / blocks;
  const int32_t tiles = (task.rows + R - 1) / R;
  const int64_t panel_bytes = int64_t{all} * kGroupBytes;
  for (int32_t p = task.panel_begin; p < task.panel_end; ++p) {
    const std::byte* panel = task.panels + p * panel_bytes;
    for (block.begin = 0; block.begin < all; block.begin += block_groups) {
      block.panel = panel + int64_t{block.begin} * kGroupBytes;
      block.groups = all - block.begin < block_groups ? all - block.begin : block_groups;
      for (int32_t tile = 0; tile < tiles; ++tile) {  // of equal size, give or take a row
        const auto row = static_cast<int32_t>(int64_t{tile} * task.rows / tiles);
        const int32_t rows = static_cast<int32_t>(int64_t{tile + 1} * task.rows / tiles) - row;
        block.in = static_cast<const std::byte*>(task.in) + row * task.in_stride;
        block.sums = task.sums + (blocks > 1 ? row * W : 0);
        integer_micro_rows<Format, R, C>(rows, block);
        if (block.begin + block.groups < all) continue;
        if (task.narrow) {
          finish<uint16_t, R, W>(task, p, row, rows, block.sums);
        } else {
          finish<float, R, W>(task, p, row, rows, block.sums);
        }
      }
    }
  }
}

/// A row's record: symmetric, by the largest magnitude of each group, rounded to nearest even.
template <class Cell>
void quantize_row(const void* in, int32_t depth, std::byte* out) {
  const RowRecord record = row_record(depth);
  const auto* cells = static_cast<const Cell*>(in);
  auto* values = reinterpret_cast<signed char*>(out);
  auto* scales = reinterpret_cast<float*>(out + record.scales);
  auto* offsets = reinterpret_cast<int32_t*>(out + record.offsets);
  auto* totals = reinterpret_cast<float*>(out + record.totals);
  constexpr int kRegs = kQuantGroup / Vec::kLanes;
  for (int32_t g = 0; g < record.groups; ++g) {
    Vec::Reg x[kRegs];
#pragma GCC unroll 4
    for (int i = 0; i < kRegs; ++i) x[i] = Int::load_cells(cells + g * kQuantGroup + i * Vec::kLanes);
    const float largest = Int::largest_magnitude(x);
    // NaN for NaN, 0 for what is too small to be divided by.
    const float inverse = largest >= 0x1p-100f ? 127.0f / largest : 0.0f;
    const bool finite = largest < __builtin_inff();
    int32_t sum = 0;
#pragma GCC unroll 4
    for (int i = 0; i < kRegs; ++i) {
      const auto whole = Int::round(Vec::mul(x[i], Vec::set(finite ? inverse : 0.0f)));
      sum += Int::store_values(finite ? whole : Int::zero(), values + g * kQuantGroup + i * Vec::kLanes);
    }
    const float scale = finite ? largest * (1.0f / 127.0f) : __builtin_nanf("");
    scales[g] = scale;
    offsets[g] = -kWeightBias * sum;
    totals[g] = scale * static_cast<float>(sum);
  }
}

/// `peak`: GemmKernel's.
template <class Format, int R, int C>
GemmKernel integer_kernel(double (*peak)(int64_t rounds)) {
  return {.width = C * Vec::kLanes,
          .row_tile = R,
          .multiply = integer_multiply<Format, R, C>,
          .widen = nullptr,
          .quantize_f32 = quantize_row<float>,
          .quantize_bf16 = quantize_row<uint16_t>,
          .peak = peak};
}
