// The GEMM loops over integer weights and rows (RowRecord), once for all vector instruction sets. Include inside the
// anonymous namespace of a file compiled for one of them, after Vec and gemm-inl.h and a struct Int that has what
// quantize_row asks for: load_cells, largest_magnitude, round, store_group, zero(). A format (integer_dots-inl.h) says
// how one group of R rows is multiplied.
//
// A row's sums are a chain of multiply-adds, group after group, whatever the tile; within a group they are exact.

/// Bytes of a panel that a walk over the tiles of rows covers, so that they stay in the first cache.
constexpr int32_t kIntegerBlockBytes = 29 << 10;

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

/// One block of groups of one tile of rows against one panel.
struct IntegerBlock {
  const std::byte* in;       // first row
  int64_t stride;
  RowRecord record;
  int32_t begin;             // the first group
  int32_t groups;
  const std::byte* panel;    // of the first group
  int32_t tile;              // of `tiles` that pass over this block
  int32_t tiles;
  float* sums;               // [rows][W]
  float* out;                // for the last block: where the sums go instead, at out_stride; or none
  int64_t out_stride;
  bool add;                  // to what is in `out`
};

/// A row beyond R repeats the last.
template <int R, int P, int C>
[[gnu::always_inline]] inline void begin_sums(const IntegerBlock& block, Vec::Reg (&sums)[P][C]) {
#pragma GCC unroll 8
  for (int r = 0; r < P; ++r) {
    const float* const from = block.sums + (r < R ? r : R - 1) * C * Vec::kLanes;
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      sums[r][c] = block.begin == 0 ? Vec::set(0.0f) : Vec::load(from + c * Vec::kLanes);
    }
  }
}

template <int R, int P, int C>
[[gnu::always_inline]] inline void end_sums(const IntegerBlock& block, const Vec::Reg (&sums)[P][C]) {
  float* const out = block.out != nullptr ? block.out : block.sums;
  const int64_t stride = block.out != nullptr ? block.out_stride : C * Vec::kLanes;
  const bool add = block.out != nullptr && block.add;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      float* const at = out + r * stride + c * Vec::kLanes;
      Vec::store(at, add ? Vec::add(Vec::load(at), sums[r][c]) : sums[r][c]);
    }
  }
}

/// sums [R][W] += R rows times the block of the panel; from zero at the first group.
template <class Format, int R, int C>
void integer_micro(const IntegerBlock& block) {
  Vec::Reg sums[padded<Format>(R)][C];
  begin_sums<R>(block, sums);
  Format::to_tiles(sums);
  RowGroup<R> rows = {block.in + block.begin * kQuantGroup, block.in + block.record.scales + 4 * block.begin,
                      block.in + block.record.offsets + 4 * block.begin,
                      block.in + block.record.totals + 4 * block.begin, block.stride};
  const std::byte* panel = block.panel;
  const int32_t groups = block.groups;
  constexpr int32_t kGroupBytes = Format::group_bytes(C * Vec::kLanes);
  Ahead ahead(panel, int64_t{groups} * kGroupBytes, block.tile, block.tiles);
#pragma GCC unroll 1
  for (int32_t g = 0; g < groups; ++g) {
    Format::template group<R, C>(rows, panel, ahead, sums);
    rows.advance();
    panel += kGroupBytes;
  }
  Format::from_tiles(sums);
  end_sums<R>(block, sums);
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
/// Whole panels without bias go from the registers to where they belong.
template <class Format, int R, int C>
void integer_multiply(const GemmTask& task) {
  constexpr int32_t W = C * Vec::kLanes;
  constexpr int32_t kGroupBytes = Format::group_bytes(W);
  constexpr int32_t kBlockGroups = kIntegerBlockBytes / kGroupBytes;
  IntegerBlock block = {};
  block.stride = task.in_stride;
  block.record = row_record(task.depth);
  block.out_stride = task.out_stride;
  block.add = task.epilogue == Epilogue::kAdd;
  const int32_t all = block.record.groups;
  const int32_t blocks = (all + kBlockGroups - 1) / kBlockGroups;
  const int32_t block_groups = (all + blocks - 1) / blocks;
  const int32_t tiles = (task.rows + R - 1) / R;
  block.tiles = tiles;
  const int64_t panel_bytes = int64_t{all} * kGroupBytes;
  for (int32_t p = task.panel_begin; p < task.panel_end; ++p) {
    const std::byte* panel = task.panels + p * panel_bytes;
    const bool direct = task.bias == nullptr && task.epilogue != Epilogue::kAct && task.columns - p * W >= W;
    for (block.begin = 0; block.begin < all; block.begin += block_groups) {
      block.panel = panel + int64_t{block.begin} * kGroupBytes;
      block.groups = all - block.begin < block_groups ? all - block.begin : block_groups;
      const bool last = block.begin + block.groups == all;
      for (int32_t tile = 0; tile < tiles; ++tile) {
        const int32_t row = tile_begin<Format>(tile, tiles, task.rows);
        const int32_t rows = tile_begin<Format>(tile + 1, tiles, task.rows) - row;
        block.in = static_cast<const std::byte*>(task.in) + row * task.in_stride;
        block.sums = task.sums + (blocks > 1 ? row * W : 0);
        block.tile = tile;
        block.out = last && direct ? static_cast<float*>(task.out) + row * task.out_stride + p * W : nullptr;
        integer_micro_rows<Format, R, C>(rows, block);
        if (!last || direct) continue;
        if (task.narrow) {
          finish<uint16_t, W>(task, p, row, rows, block.sums);
        } else {
          finish<float, W>(task, p, row, rows, block.sums);
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
#pragma GCC unroll 8
    for (int i = 0; i < kRegs; ++i) x[i] = Int::load_cells(cells + g * kQuantGroup + i * Vec::kLanes);
    const float largest = Int::largest_magnitude(x);
    // NaN for NaN, 0 for what is too small to be divided by.
    const float inverse = largest >= 0x1p-100f ? 127.0f / largest : 0.0f;
    const bool finite = largest < __builtin_inff();
    typename Int::Sums whole[kRegs];
#pragma GCC unroll 8
    for (int i = 0; i < kRegs; ++i) {
      whole[i] = finite ? Int::round(Vec::mul(x[i], Vec::set(inverse))) : Int::zero();
    }
    const int32_t sum = Int::store_group(whole, values + g * kQuantGroup);
    const float scale = finite ? largest * (1.0f / 127.0f) : __builtin_nanf("");
    scales[g] = scale;
    offsets[g] = -kWeightBias * sum;
    totals[g] = scale * static_cast<float>(sum);
  }
}

/// `isa`, `peak`: GemmKernel's.
template <class Format, int R, int C>
GemmKernel integer_kernel(Isa isa, double (*peak)(int64_t rounds)) {
  return {.isa = isa,
          .width = C * Vec::kLanes,
          .together = Format::kTogether,
          .row_tile = R,
          .multiply = integer_multiply<Format, R, C>,
          .widen = nullptr,
          .quantize_f32 = quantize_row<float>,
          .quantize_bf16 = quantize_row<uint16_t>,
          .peak = peak};
}
