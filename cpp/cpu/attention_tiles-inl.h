// Products of queries with keys and of weights with values, in register tiles, for any vector width and number format.
// Included only by files of one instruction set, inside their anonymous namespace, after kv_fetch-inl.h, with a Format:
//
//   Reg                  a register of kLanes floats (4, 8 or 16)
//   Cell                 an element of q and the output
//   Weight               a packed query element or softmax weight: what a Reg of K or V is multiplied by
//   Sum, zero()          kLanes sums of products, which kVecs registers hold
//   kInt8                K and V are int8 with scales; else they are Cells
//   kVecs                registers in a row of the register tile, which has kAttentionRows of them
//   kSteps               operations that a pair of products takes: 2, or 1 where the hardware multiplies pairs
//   kPairRows            rows of memory that hold the pair's factors: 2 in float32, else 1
//   kLaneBytes           of such a row, for one lane: 2 in int8, else 4
//   factors(at, row_bytes, step)
//   first_factors(at), second_factors(at, row_bytes)   with nothing of the pair's other factor in them
//   weights(pair, step), fma(weights, factors, sum)
//   put(out, value, n), get(in, n)     n floats to and from Cells and floats
//   and set, add, mul, sub, max (NaN or the second if one is NaN), load, store, reduce_max, reduce_add, exp2,
//   keep(value, n, fill): lanes from n on replaced.
//
// Where K and V are Cells:
//   pack(cells, out)     8 query cells to Weights
//   put_weights(out, low, high, sum)   stores 2 kLanes softmax weights and returns sum + them, in kLanes lanes
// Where they are int8, all products are of integers, and exact:
//   widen(cells, out)    8 query cells to floats
//   put_weights(out, value, n)         n floats rounded to Weights
//   to_floats(sum)

constexpr int kRows = kAttentionRows;
constexpr int kTileColumns = kTile / kColumn;
constexpr int kPack = 8;  // query elements of one row that lie together: every head_dim is a multiple

// The keys and values of one tile, found in their blocks; those of columns that nobody sees are not.
struct Tile {
  const char* keys[kTileColumns];
  const char* values[kTileColumns];
  const float* key_scales[kTileColumns];  // int8 alone
  const float* value_scales[kTileColumns];
  const AttentionItem* item;
  AttentionAhead* ahead;  // null: nothing is fetched
  int64_t key_bytes;  // from one row of K to the next
  int64_t value_bytes;
  int begin;  // its first key
  int head_dim;
  int padded_dim;
};

template <class F>
struct Products {
  using Reg = typename F::Reg;
  using Weight = typename F::Weight;
  using Sum = typename F::Sum;
  using Fetch = KvFetch<F>;
  static constexpr int kLanes = F::kLanes;
  static constexpr int kVecs = F::kVecs;
  static constexpr int kColumnVecs = kColumn / kLanes;

  // out [MR][kTile] = q k^T for NV registers of keys from `column` on. q: [head_dim / kPack][MR][kPack].
  template <int MR, int NV>
  [[gnu::always_inline]] static inline void scores(const Tile& tile, int column, const Weight* q, float* out) {
    const int64_t row_bytes = tile.key_bytes;
    Sum sum[MR][NV];
    const char* at[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      at[v] = tile.keys[column + v / kColumnVecs] + (v % kColumnVecs) * kLanes * F::kLaneBytes;
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[r][v] = F::zero();
    }
    for (int d = 0; d < tile.head_dim; d += kPack) {
#pragma GCC unroll 8
      for (int pair = 0; pair < kPack; pair += 2) {
        Fetch::template step<NV * kLanes * F::kPairRows * F::kLaneBytes>(*tile.item, tile.ahead, pair / 2);
#pragma GCC unroll 2
        for (int step = 0; step < F::kSteps; ++step) {
          typename F::Factors key[NV];
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) key[v] = F::factors(at[v], row_bytes, step);
#pragma GCC unroll 8
          for (int r = 0; r < MR; ++r) {
            const auto weight = F::weights(q + r * kPack + pair, step);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[r][v] = F::fma(weight, key[v], sum[r][v]);
          }
        }
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) at[v] += F::kPairRows * row_bytes;
      }
      q += MR * kPack;
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        Reg score;
        if constexpr (F::kInt8) {
          const float* scales = tile.key_scales[column + v / kColumnVecs] + (v % kColumnVecs) * kLanes;
          score = F::mul(F::to_floats(sum[r][v]), F::load(scales));
        } else {
          score = sum[r][v];
        }
        F::store(out + r * kTile + v * kLanes, score);
      }
    }
  }

  // o [MR][stride] = o * alpha + step * p v for NV registers of dimensions, over key pairs [begin, end) of the tile
  // and, if `odd`, the first key of pair `end`. p: [MR][kTile]. step: of int8 alone.
  template <int MR, int NV>
  [[gnu::noinline]] static void values(const Tile& tile, const Weight* p, int64_t offset, int begin, int end, bool odd,
                                       const float* alpha, const float* step, float* o) {
    constexpr int kPairs = kColumn / 2;
    const char* const* columns = tile.values;
    const int64_t row_bytes = tile.value_bytes;
    const int64_t stride = tile.padded_dim;
    Sum sum[MR][NV];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        if constexpr (F::kInt8) {
          sum[r][v] = F::zero();
        } else {
          sum[r][v] = F::mul(F::load(o + r * stride + v * kLanes), F::set(alpha[r]));
        }
      }
    }
    const int64_t pair_bytes = F::kPairRows * row_bytes;
    for (int pair = begin; pair < end;) {
      const char* at = columns[pair / kPairs] + offset + (pair % kPairs) * pair_bytes;
      const int stop = least(end, (pair / kPairs + 1) * kPairs);
      for (; pair < stop; ++pair, at += pair_bytes) {
        Fetch::template step<NV * kLanes * F::kPairRows * F::kLaneBytes>(*tile.item, tile.ahead, pair);
#pragma GCC unroll 2
        for (int half = 0; half < F::kSteps; ++half) {
          typename F::Factors value[NV];
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) value[v] = F::factors(at + v * kLanes * F::kLaneBytes, row_bytes, half);
#pragma GCC unroll 8
          for (int r = 0; r < MR; ++r) {
            const auto weight = F::weights(p + r * kTile + 2 * pair, half);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[r][v] = F::fma(weight, value[v], sum[r][v]);
          }
        }
      }
    }
    if constexpr (!F::kInt8) {
      if (odd) add_odd<MR, NV>(p + 2 * end, columns[end / kPairs] + offset + (end % kPairs) * pair_bytes, sum);
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        float* out = o + r * stride + v * kLanes;
        if constexpr (F::kInt8) {
          const Reg before = F::mul(F::load(out), F::set(alpha[r]));
          F::store(out, F::madd(F::to_floats(sum[r][v]), F::set(step[r]), before));
        } else {
          F::store(out, sum[r][v]);
        }
      }
    }
  }

  // The first key of a pair alone.
  template <int MR, int NV>
  [[gnu::always_inline]] static inline void add_odd(const Weight* p, const char* at, Reg (&sum)[MR][NV]) {
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const auto weight = F::weights(p + r * kTile, 0);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        sum[r][v] = F::fma(weight, F::first_factors(at + v * kLanes * F::kLaneBytes), sum[r][v]);
      }
    }
  }

  // o [padded_dim] = o * alpha + the weight of the second key of pair `pair` times its value.
  [[gnu::noinline]] static void add_second(const Tile& tile, const Weight* p, int pair, float alpha, float* o) {
    constexpr int kPairs = kColumn / 2;
    const char* at = tile.values[pair / kPairs] + pair % kPairs * F::kPairRows * tile.value_bytes;
    const auto weight = F::weights(p + 2 * pair, F::kSteps - 1);
    for (int d = 0; d < tile.padded_dim; d += kLanes) {
      const Reg before = F::mul(F::load(o + d), F::set(alpha));
      F::store(o + d, F::fma(weight, F::second_factors(at + d * F::kLaneBytes, tile.value_bytes), before));
    }
  }

  // ---- A whole tile of keys

  // Scores of keys [begin, end) and the rest of their columns.
  template <int MR>
  static void all_scores(const Tile& tile, const Weight* q, int begin, int end, float* out) {
    static_assert(kVecs % kColumnVecs == 0);
    const int vecs = (end + kLanes - 1) / kLanes;
    int v = begin / kColumn * kColumnVecs;
    for (; v + kVecs <= vecs; v += kVecs) {
      scores<MR, kVecs>(tile, v / kColumnVecs, q, out + v * kLanes);
    }
    // The rest by whole columns: what lies past the last key is never looked at.
    const int column = v / kColumnVecs;
    out += v * kLanes;
    switch ((vecs - v + kColumnVecs - 1) / kColumnVecs) {
      case 0:
        break;
      case 1:
        scores<MR, kColumnVecs>(tile, column, q, out);
        break;
      case 2:
        scores<MR, least(2 * kColumnVecs, kVecs)>(tile, column, q, out);
        break;
      default:
        scores<MR, least(3 * kColumnVecs, kVecs)>(tile, column, q, out);
        break;
    }
  }

  template <int MR>
  static void all_values(const Tile& tile, const Weight* p, int begin, int end, bool odd, const float* alpha,
                         const float* step, float* o) {
    const int vecs = tile.padded_dim / kLanes;
    for (int v = 0; v < vecs;) {
      const int parts = (vecs - v + kVecs - 1) / kVecs;
      const int count = (vecs - v + parts - 1) / parts;
      const int64_t offset = v * kLanes * F::kLaneBytes;
      float* out = o + v * kLanes;
      const auto run = [&](auto kernel) { kernel(tile, p, offset, begin, end, odd, alpha, step, out); };
      switch (count) {
        case 1:
          run(values<MR, 1>);
          break;
        case 2:
          run(values<MR, 2>);
          break;
        case 3:
          run(values<MR, least(3, kVecs)>);
          break;
        default:
          run(values<MR, kVecs>);
          break;
      }
      v += count;
    }
  }
};
