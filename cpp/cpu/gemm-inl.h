// The GEMM loops, once for all vector instruction sets. Include inside the anonymous namespace of a file compiled
// for one of them, after a struct Vec: the set's registers Reg of kLanes floats, and what can be done with them.
// gcc keeps an array of registers in registers only if every loop over it is unrolled by pragma.

#include "cpu/functions-inl.h"

#include "cpu/activations-inl.h"

constexpr int64_t kLineBytes = 64;
/// Where a panel passes the rows once, it is fetched this far ahead of the arithmetic, into the next panel at its end.
/// Found by trial: memory is read at full speed from 6 KiB on, at two thirds of it without.
constexpr int64_t kAheadBytes = 8192;

/// Brings weights to the caches before they are asked for. Where several tiles of rows pass over a block of a panel,
/// each fetches its part of the next block, so that memory is as busy with the last tile as with the first.
class Ahead {
 public:
  /// For tile `tile` of `tiles` over `bytes` from `block` on.
  Ahead(const void* block, int64_t bytes, int32_t tile, int32_t tiles)
      : at_(static_cast<const char*>(block) + (tiles == 1 ? kAheadBytes : bytes + bytes * tile / tiles)),
        tiles_(tiles) {}

  /// While the tile passes the next `Bytes` of the block.
  template <int32_t Bytes>
  [[gnu::always_inline]] void fetch() {
    if (tiles_ == 1) {
#pragma GCC unroll 32
      for (int64_t i = 0; i < Bytes; i += kLineBytes) __builtin_prefetch(at_ + i);
      at_ += Bytes;
      return;
    }
    due_ += Bytes;
    for (; due_ > 0; due_ -= kLineBytes * tiles_, at_ += kLineBytes) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char* at_;
  int64_t tiles_;
  int64_t due_ = 0;  // bytes passed that no line was fetched for
};

// ---- Formats: how one step along k multiplies R rows with a panel of C registers' width

/// A format's sums lie as [row][column], unless it takes them to tiles of kRowStep rows while it works.
struct RowByRow {
  static constexpr int kRowStep = 1;
  template <int R, int C>
  static void to_tiles(Vec::Reg (&)[R][C]) {}
  template <int R, int C>
  static void from_tiles(Vec::Reg (&)[R][C]) {}
};

/// Rows that the sums of R rows have room for.
template <class Format>
constexpr int padded(int rows) {
  return (rows + Format::kRowStep - 1) / Format::kRowStep * Format::kRowStep;
}

struct F32Format : RowByRow {
  using In = float;  // as the rows come
  using Weight = float;
  using Out = float;  // of activations
  static constexpr int32_t kPerStep = 1;

  template <int R, int C>
  [[gnu::always_inline]] static void step(const In* in, int64_t stride, const Weight* panel, Vec::Reg (&sums)[R][C]) {
    Vec::Reg weights[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) weights[c] = Vec::load(panel + c * Vec::kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec::Reg x = Vec::set(in[r * stride]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[r][c] = Vec::madd(x, weights[c], sums[r][c]);
    }
  }
};

/// bf16 weights against rows widened to f32: both halves of a pair become f32 on the way to the registers.
struct WideBf16Format : RowByRow {
  using In = float;
  using Weight = uint16_t;
  using Out = uint16_t;
  static constexpr int32_t kPerStep = 2;

  template <int R, int C>
  [[gnu::always_inline]] static void step(const In* in, int64_t stride, const Weight* panel, Vec::Reg (&sums)[R][C]) {
    Vec::Reg weights[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) weights[c] = Vec::load_first(panel + 2 * c * Vec::kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec::Reg x = Vec::set(in[r * stride]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[r][c] = Vec::madd(x, weights[c], sums[r][c]);
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) weights[c] = Vec::load_second(panel + 2 * c * Vec::kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec::Reg x = Vec::set(in[r * stride + 1]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[r][c] = Vec::madd(x, weights[c], sums[r][c]);
    }
  }
};

// ---- Epilogues, on sums [rows][width] that still are in the first cache

template <int W>
void add_bias(float* sums, int32_t rows, const float* bias) {
  for (int32_t r = 0; r < rows; ++r) {
    for (int c = 0; c < W; c += Vec::kLanes) {
      Vec::store(sums + r * W + c, Vec::add(Vec::load(sums + r * W + c), Vec::load(bias + c)));
    }
  }
}

template <int W, bool Add>
void write_sums(const float* sums, int32_t rows, float* out, int64_t stride, int32_t columns) {
  if (columns >= W) {  // masked stores are slow on many processors
    for (int32_t r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < W; c += Vec::kLanes) {
        Vec::Reg value = Vec::load(sums + r * W + c);
        if constexpr (Add) value = Vec::add(Vec::load(out + r * stride + c), value);
        Vec::store(out + r * stride + c, value);
      }
    }
    return;
  }
  for (int32_t r = 0; r < rows; ++r) {
    for (int32_t c = 0; c < columns; c += Vec::kLanes) {
      Vec::Reg value = Vec::load(sums + r * W + c);
      if constexpr (Add) value = Vec::add(Vec::get(out + r * stride + c, columns - c), value);
      Vec::put(out + r * stride + c, value, columns - c);
    }
  }
}

/// Rows of W values in the format of activations. The last register of a whole row may cover some of the one before.
template <int W, class Out>
void write_values(const float* values, int32_t rows, Out* out, int64_t stride, int32_t columns) {
  static_assert(W >= Vec::kLanes);
  for (int32_t r = 0; r < rows; ++r, values += W, out += stride) {
    if (columns >= W) {
#pragma GCC unroll 16
      for (int c = 0; c < W; c += Vec::kLanes) {
        const int at = c + Vec::kLanes <= W ? c : W - Vec::kLanes;
        Vec::store(out + at, Vec::load(values + at));
      }
      continue;
    }
    for (int32_t c = 0; c < columns; c += Vec::kLanes) {
      Out some[Vec::kLanes];
      Vec::store(some, Vec::load(values + c));
      for (int32_t i = c; i < columns && i < c + Vec::kLanes; ++i) out[i] = some[i - c];
    }
  }
}

// ---- Loops

/// One block of k of one tile of rows against one panel.
template <class Format>
struct Block {
  const typename Format::In* in;
  int64_t stride;
  const typename Format::Weight* panel;
  int32_t steps;
  bool from_zero;  // or from where the sums stand
  float* sums;  // [rows][W]
  int32_t tile;  // of `tiles` that pass over this block of the panel
  int32_t tiles;
};

/// sums [R][W] += R rows times the panel.
template <class Format, int R, int C>
void micro(const Block<Format>& block) {
  constexpr int W = C * Vec::kLanes;
  float* sums = block.sums;
  constexpr int kPadded = padded<Format>(R);
  Vec::Reg acc[kPadded][C];
  if (block.from_zero) {
#pragma GCC unroll 16
    for (int r = 0; r < kPadded; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = Vec::set(0.0f);
    }
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < kPadded; ++r) {   // what pads them repeats the last
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = Vec::load(sums + (r < R ? r : R - 1) * W + c * Vec::kLanes);
    }
  }
  Format::to_tiles(acc);
  const typename Format::In* in = block.in;
  const typename Format::Weight* panel = block.panel;
  const int64_t stride = block.stride;
  const int32_t steps = block.steps;
  constexpr int32_t kStepBytes = Format::kPerStep * W * int32_t{sizeof(typename Format::Weight)};
  Ahead ahead(panel, int64_t{steps} * kStepBytes, block.tile, block.tiles);
#pragma GCC unroll 1
  for (int32_t s = 0; s < steps; ++s) {
    ahead.fetch<kStepBytes>();
    Format::template step<R, C>(in, stride, panel, acc);
    in += Format::kPerStep;
    panel += Format::kPerStep * W;
  }
  Format::from_tiles(acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) Vec::store(sums + r * W + c * Vec::kLanes, acc[r][c]);
  }
}

/// micro<R> for a number of rows known only now; R counts down to it.
template <class Format, int R, int C>
[[gnu::always_inline]] inline void micro_rows(int32_t rows, const Block<Format>& block) {
  if (rows == R) {
    micro<Format, R, C>(block);
  } else if constexpr (R > 1) {
    micro_rows<Format, R - 1, C>(rows, block);
  }
}

/// The first row of tile `tile` of `tiles`: they are of equal size, give or take kRowStep rows.
template <class Format>
int32_t tile_begin(int32_t tile, int32_t tiles, int32_t rows) {
  const int32_t steps = (rows + Format::kRowStep - 1) / Format::kRowStep;
  const auto begin = static_cast<int32_t>(int64_t{tile} * steps / tiles) * Format::kRowStep;
  return begin < rows ? begin : rows;
}

/// Writes sums [rows][W] of a panel to rows of `task.out` that begin at `row`. Spoils the sums.
template <class Out, int W>
void finish(const GemmTask& task, int32_t p, int32_t row, int32_t rows, float* sums) {
  if (task.bias != nullptr) add_bias<W>(sums, rows, task.bias + int64_t{p} * W);
  if (task.epilogue == Epilogue::kAct) {
    const int32_t outputs = task.gated ? W / 2 : W;
    activate(task.activation, task.gated, sums, rows * outputs);
    Out* out = static_cast<Out*>(task.out) + row * task.out_stride + p * outputs;
    const int32_t columns = task.columns - p * outputs;
    task.gated ? write_values<W / 2>(sums, rows, out, task.out_stride, columns)
               : write_values<W>(sums, rows, out, task.out_stride, columns);
    return;
  }
  float* out = static_cast<float*>(task.out) + row * task.out_stride + p * W;
  if (task.epilogue == Epilogue::kAdd) {
    write_sums<W, true>(sums, rows, out, task.out_stride, task.columns - p * W);
  } else {
    write_sums<W, false>(sums, rows, out, task.out_stride, task.columns - p * W);
  }
}

/// R rows by C registers at a time. k is walked in blocks that keep a tile's rows in the first cache and the
/// panel's block in the second; between blocks the sums wait in memory, which changes no bit of them.
template <class Format, int R, int C>
void multiply(const GemmTask& task) {
  constexpr int32_t W = C * Vec::kLanes;
  using In = typename Format::In;
  using Weight = typename Format::Weight;
  const int32_t steps = (task.depth + Format::kPerStep - 1) / Format::kPerStep;
  constexpr int32_t kBlockSteps = kDepthBytes / (Format::kPerStep * int32_t{sizeof(In)});
  const int32_t blocks = (steps + kBlockSteps - 1) / kBlockSteps;
  const int32_t block_steps = (steps + blocks - 1) / blocks;
  const int32_t tiles = (task.rows + R - 1) / R;
  constexpr int64_t kStepWeights = int64_t{Format::kPerStep} * W;
  for (int32_t p = task.panel_begin; p < task.panel_end; ++p) {
    const Weight* panel = reinterpret_cast<const Weight*>(task.panels) + p * steps * kStepWeights;
    for (int32_t begin = 0; begin < steps; begin += block_steps) {
      Block<Format> block;
      block.stride = task.in_stride;
      block.panel = panel + begin * kStepWeights;
      block.steps = steps - begin < block_steps ? steps - begin : block_steps;
      block.from_zero = begin == 0;
      block.tiles = tiles;
      for (int32_t tile = 0; tile < tiles; ++tile) {
        const int32_t row = tile_begin<Format>(tile, tiles, task.rows);
        const int32_t rows = tile_begin<Format>(tile + 1, tiles, task.rows) - row;
        block.in = static_cast<const In*>(task.in) + row * task.in_stride + int64_t{begin} * Format::kPerStep;
        block.sums = task.sums + (blocks > 1 ? row * W : 0);
        block.tile = tile;
        micro_rows<Format, R, C>(rows, block);
        if (begin + block.steps == steps) finish<typename Format::Out, W>(task, p, row, rows, block.sums);
      }
    }
  }
}

// ---- Probes

template <int R>
double peak_of_fma(int64_t rounds) {
  Vec::Reg acc[R];
  const Vec::Reg x = Vec::set(0.5f);
  const Vec::Reg y = Vec::set(1.0f);
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) acc[r] = y;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) acc[r] = Vec::madd(acc[r], x, y);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) Vec::touch(acc[r]);
  }
  return 2.0 * R * Vec::kLanes * static_cast<double>(rounds);
}
