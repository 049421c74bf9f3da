// The attention of one work item, for any vector width and number format. Included only by files of one
// instruction set, inside their anonymous namespace, with a Format:
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
//   factors(at, row_bytes, step), first_factors(at)   the latter with nothing of the pair's second factor in it
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
//
// The algorithm is the online softmax of Milakov and Gimelshein (arXiv:1805.02867), tiled as in FlashAttention
// (arXiv:2205.14135), over tiles and segments at fixed absolute positions. A row's operations and their order
// depend on its position alone: which rows share a register tile changes neither.
//
// Over an int8 cache a query row is rounded to 16 bits of its largest element, and a row's softmax weights in one
// tile, times the scales of their values, to 16 bits of the largest: errors of 2^-16, where the cache's own are 2^-8.

constexpr int kRows = kAttentionRows;
constexpr int kTileColumns = kTile / kColumn;
constexpr int kPack = 8;   // query elements of one row that lie together: every head_dim is a multiple
constexpr float kMostWeight = 32767.0f;   // of 16 bits: 256 products with int8, a tile of values, stay below 2^31

template <class F>
struct Attend {
  using Reg = typename F::Reg;
  using Cell = typename F::Cell;
  using Weight = typename F::Weight;
  using Sum = typename F::Sum;
  using Fetch = KvFetch<F>;
  static constexpr int kLanes = F::kLanes;
  static constexpr int kVecs = F::kVecs;
  static constexpr int kColumnVecs = kColumn / kLanes;

  struct State {
    float* m;
    float* l;
    float* o;
  };

  static State state_at(const AttentionItem& item, float* base) {
    const int64_t padded = (item.positions * item.group + 15) / 16 * 16;
    return {base, base + padded, base + 2 * padded};
  }

  // The keys and values of one tile, found in their blocks.
  struct Tile {
    const char* keys[kTileColumns];
    const char* values[kTileColumns];
    const float* key_scales[kTileColumns];     // int8 alone
    const float* value_scales[kTileColumns];
    const AttentionItem* item;
    AttentionAhead* ahead;   // null: nothing is fetched
    int64_t key_bytes;     // from one row of K to the next
    int64_t value_bytes;
    int head_dim;
    int padded_dim;
  };

  // Query rows in the order of scores(), and what their products with keys are multiplied by to be scores.
  struct Queries {
    Weight* weights;
    float* scales;
  };

  // ---- Register tiles

  // out [MR][kTile] = q k^T for NV registers of keys from `column` on. q: [head_dim / kPack][MR][kPack].
  template <int MR, int NV>
  static inline void scores(const Tile& tile, int column, const Weight* q, float* out) {
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
  static inline void values(const Tile& tile, const Weight* p, int64_t offset, int begin, int end, bool odd,
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
  static inline void add_odd(const Weight* p, const char* at, Reg (&sum)[MR][NV]) {
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const auto weight = F::weights(p + r * kTile, 0);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        sum[r][v] = F::fma(weight, F::first_factors(at + v * kLanes * F::kLaneBytes), sum[r][v]);
      }
    }
  }

  // ---- One tile of keys

  template <int MR>
  static void all_scores(const Tile& tile, const Weight* q, int keys, float* out) {
    const int vecs = (keys + kLanes - 1) / kLanes;
    int v = 0;
    for (; v + kVecs <= vecs; v += kVecs) {
      scores<MR, kVecs>(tile, v / kColumnVecs, q, out + v * kLanes);
    }
    // The rest by whole columns: what lies past the last key is never looked at.
    const auto run = [&](auto kernel) { kernel(tile, v / kColumnVecs, q, out + v * kLanes); };
    switch ((vecs - v + kColumnVecs - 1) / kColumnVecs) {
      case 0:
        break;
      case 1:
        run(scores<MR, kColumnVecs>);
        break;
      case 2:
        run(scores<MR, least(2 * kColumnVecs, kVecs)>);
        break;
      default:
        run(scores<MR, least(3 * kColumnVecs, kVecs)>);
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

  // The maximum of a row's `keys` scores and of `before`.
  static inline float highest(const float* scores, int keys, float scale, float before) {
    const Reg lowest = F::set(-__builtin_inff());
    Reg top = lowest;
    int key = 0;
    for (; key + kLanes <= keys; key += kLanes) top = F::max(top, F::load(scores + key));
    if (key < keys) top = F::max(top, F::keep(F::load(scores + key), keys - key, lowest));
    const float now = F::reduce_max(top) * scale;
    return now > before ? now : before;
  }

  // Turns a row's scores of `keys` keys into weights and updates its m and l; the factor for what o holds so far.
  static inline float weigh(const float* scores, Weight* p, int keys, float scale, float* m, float* l) {
    const float before = *m;
    const float after = highest(scores, keys, scale, before);
    const Reg factor = F::set(scale);
    const Reg shift = F::set(-after);
    Reg sum = F::set(0.0f);
    int key = 0;
    for (; key + 2 * kLanes <= keys; key += 2 * kLanes) {
      const Reg low = F::exp2(F::madd(F::load(scores + key), factor, shift));
      const Reg high = F::exp2(F::madd(F::load(scores + key + kLanes), factor, shift));
      sum = F::put_weights(p + key, low, high, sum);
    }
    if (key < keys) {
      const Reg low = F::exp2(F::madd(F::load(scores + key), factor, shift));
      const Reg high = F::exp2(F::madd(F::load(scores + key + kLanes), factor, shift));
      const Reg zero = F::set(0.0f);
      sum = F::put_weights(p + key, F::keep(low, keys - key, zero), F::keep(high, keys - key - kLanes, zero), sum);
    }
    const float alpha = F::first(F::exp2(F::set(before - after)));
    *m = after;
    *l = *l * alpha + F::reduce_add(sum);
    return alpha;
  }

  // The same for int8: weights times the scales of their values, which take the scores' place, then in 16 bits;
  // *step is the unit of these. Keys from `keys` up to `past` weigh nothing.
  static inline float weigh_int8(const Tile& tile, float* scores, Weight* p, int keys, int past, float scale, float* m,
                                 float* l, float* step) {
    const float before = *m;
    const float after = highest(scores, keys, scale, before);
    const Reg factor = F::set(scale);
    const Reg shift = F::set(-after);
    const Reg zero = F::set(0.0f);
    Reg sum = zero;
    Reg top = zero;
    int key = 0;
    for (; key + kLanes <= keys; key += kLanes) {
      const Reg weight = F::exp2(F::madd(F::load(scores + key), factor, shift));
      const Reg scaled = F::mul(weight, F::load(tile.value_scales[key / kColumn] + key % kColumn));
      sum = F::add(sum, weight);
      top = F::max(top, scaled);
      F::store(scores + key, scaled);
    }
    if (key < keys) {
      const Reg weight = F::keep(F::exp2(F::madd(F::load(scores + key), factor, shift)), keys - key, zero);
      const Reg scales = F::keep(F::load(tile.value_scales[key / kColumn] + key % kColumn), keys - key, zero);
      sum = F::add(sum, weight);
      top = F::max(top, F::mul(weight, scales));
      F::store(scores + key, F::mul(weight, scales));
    }
    const Grid grid(F::reduce_max(top), kMostWeight);
    const Reg inverse = F::set(grid.inverse);
    for (key = 0; key < keys; key += kLanes) F::put_weights(p + key, F::mul(F::load(scores + key), inverse), kLanes);
    for (; key < past; key += kLanes) F::put_weights(p + key, zero, kLanes);
    const float alpha = F::first(F::exp2(F::set(before - after)));
    *step = grid.step;
    *m = after;
    *l = *l * alpha + F::reduce_add(sum);
    return alpha;
  }

  // Rows of one register tile over one tile of keys. keys[r] of them are in row r's past, ascending with r.
  template <int MR>
  static void tile_rows(const Tile& tile, const Queries& q, const int* keys, float* m, float* l, float* o) {
    alignas(64) float sums[MR * kTile];
    alignas(64) Weight weights[MR * kTile];
    float alpha[MR];
    all_scores<MR>(tile, q.weights, keys[MR - 1], sums);
    if constexpr (F::kInt8) {
      // A row may pass over values that are not in its past: they are integers, and zero times them is zero. And it
      // has to: the sums of a tile are exact only as long as they are not scaled.
      const int past = keys[MR - 1];
      float step[MR];
      for (int r = 0; r < MR; ++r) {
        alpha[r] =
            weigh_int8(tile, sums + r * kTile, weights + r * kTile, keys[r], past, q.scales[r], m + r, l + r, step + r);
      }
      all_values<MR>(tile, weights, 0, (past + 1) / 2, false, alpha, step, o);
    } else {
      for (int r = 0; r < MR; ++r) {
        alpha[r] =
            keys[r] > 0 ? weigh(sums + r * kTile, weights + r * kTile, keys[r], q.scales[r], m + r, l + r) : 1.0f;
      }
      if (keys[0] == keys[MR - 1]) {
        all_values<MR>(tile, weights, 0, keys[0] / 2, keys[0] % 2 != 0, alpha, nullptr, o);
        return;
      }
      // On the diagonal: what all rows share together, then each row's own keys. No row reads a value that is not in
      // its past, not even to multiply it by zero: it might be infinite.
      const int shared = keys[0] / 2;
      all_values<MR>(tile, weights, 0, shared, false, alpha, nullptr, o);
      const float one = 1.0f;
      for (int r = 0; r < MR; ++r) {
        if (keys[r] > 2 * shared) {
          all_values<1>(tile, weights + r * kTile, shared, keys[r] / 2, keys[r] % 2 != 0, &one, nullptr,
                        o + r * tile.padded_dim);
        }
      }
    }
  }

  static void tile_group(const Tile& tile, const Queries& q, int rows, const int* keys, float* m, float* l, float* o) {
    static_assert(kRows == 6);
    switch (rows) {
      case 1:
        return tile_rows<1>(tile, q, keys, m, l, o);
      case 2:
        return tile_rows<2>(tile, q, keys, m, l, o);
      case 3:
        return tile_rows<3>(tile, q, keys, m, l, o);
      case 4:
        return tile_rows<4>(tile, q, keys, m, l, o);
      case 5:
        return tile_rows<5>(tile, q, keys, m, l, o);
      default:
        return tile_rows<6>(tile, q, keys, m, l, o);
    }
  }

  // ---- One item

  // The columns of keys [begin, past) of one tile.
  static void find_columns(const AttentionItem& item, int begin, int past, Tile& tile) {
    for (int i = 0; begin + i * kColumn < past; ++i) {
      const int column = begin / kColumn + i;
      const char* block = Fetch::block_at(item.layout, item.kv, item.block_table, column);
      tile.keys[i] = Fetch::keys_at(item.layout, block, column);
      tile.values[i] = Fetch::values_at(item.layout, block, column);
      if constexpr (F::kInt8) {
        tile.key_scales[i] = Fetch::key_scales_at(item.layout, block, column);
        tile.value_scales[i] = tile.key_scales[i] + item.layout.block_size;
      }
    }
  }

  static void pack_queries(const AttentionItem& item, const Queries& q) {
    Weight* out = q.weights;
    const int rows = item.positions * item.group;
    const int head_dim = item.layout.head_dim;
    for (int first = 0; first < rows; first += kRows) {
      const int count = least(kRows, rows - first);
      for (int r = 0; r < count; ++r) {
        const Cell* in = static_cast<const Cell*>(item.q) + (first + r) / item.group * item.row_stride +
                         (first + r) % item.group * head_dim;
        q.scales[first + r] = item.scale;
        if constexpr (F::kInt8) {
          q.scales[first + r] *= pack_int16(in, head_dim, count * kPack, out + r * kPack);
        } else {
          for (int d = 0; d < head_dim; d += kPack) F::pack(in + d, out + d * count + r * kPack);
        }
      }
      out += count * head_dim;
    }
  }

  // One query row in 16 bits, kPack elements every `stride`; their unit, or NaN if one is not finite.
  static float pack_int16(const Cell* in, int head_dim, int stride, Weight* out) {
    float wide[kPack];
    Largest<F> largest;
    for (int d = 0; d < head_dim; d += kPack) {
      F::widen(in + d, wide);
      for (int i = 0; i < kPack; i += kLanes) largest.add(F::get(wide + i, kPack));
    }
    // So that the sum of all its products stays below 2^31.
    const float most = head_dim <= 512 ? kMostWeight : kMostWeight * 512 / static_cast<float>(head_dim);
    const Grid grid(largest.value(), most);
    for (int d = 0; d < head_dim; d += kPack, out += stride) {
      F::widen(in + d, wide);
      for (int i = 0; i < kPack; i += kLanes) {
        F::put_weights(out + i, F::mul(F::get(wide + i, kPack), F::set(grid.inverse)), kPack);
      }
    }
    return grid.step;
  }

  static void reset(const AttentionItem& item, const State& state) {
    const int rows = item.positions * item.group;
    for (int r = 0; r < rows; ++r) {
      state.m[r] = -__builtin_inff();
      state.l[r] = 0.0f;
    }
    const int64_t size = static_cast<int64_t>(rows) * item.layout.padded_dim;
    for (int64_t i = 0; i < size; i += kLanes) F::store(state.o + i, F::set(0.0f));
  }

  static void segment(const AttentionItem& item, const Queries& q, int index, const State& state) {
    const int rows = item.positions * item.group;
    const int past = least((index + 1) * kAttentionSegment, item.first + item.positions);
    Tile tile;
    tile.head_dim = item.layout.head_dim;
    tile.padded_dim = item.layout.padded_dim;
    tile.key_bytes = item.layout.block_size * F::kLaneBytes;
    tile.value_bytes = tile.padded_dim * F::kLaneBytes;
    tile.item = &item;
    reset(item, state);
    for (int begin = index * kAttentionSegment; begin < past; begin += kTile) {
      find_columns(item, begin, least(past, begin + kTile), tile);
      tile.ahead = item.ahead;
      if (tile.ahead != nullptr && begin == item.first_segment * kAttentionSegment) Fetch::begin(item, *tile.ahead);
      for (int row = 0; row < rows; row += kRows) {
        const int count = least(kRows, rows - row);
        int keys[kRows];
        for (int r = 0; r < count; ++r) {
          const int seen = item.first + (row + r) / item.group + 1 - begin;
          keys[r] = seen < 0 ? 0 : least(seen, kTile);
        }
        if (keys[count - 1] == 0) continue;
        tile_group(tile, {q.weights + row * tile.head_dim, q.scales + row}, count, keys, state.m + row, state.l + row,
                   state.o + static_cast<int64_t>(row) * tile.padded_dim);
        tile.ahead = nullptr;   // the first rows fetched for all
      }
    }
  }

  // Adds segment `index` to the rows that have keys in it.
  static void join(const AttentionItem& item, int index, const State& total, const State& part) {
    const int dim = item.layout.padded_dim;
    for (int r = 0; r < item.positions * item.group; ++r) {
      if (item.first + r / item.group < index * kAttentionSegment) continue;
      const float m = part.m[r] > total.m[r] ? part.m[r] : total.m[r];
      const float old_scale = F::first(F::exp2(F::set(total.m[r] - m)));
      const float new_scale = F::first(F::exp2(F::set(part.m[r] - m)));
      total.m[r] = m;
      total.l[r] = total.l[r] * old_scale + part.l[r] * new_scale;
      float* sum = total.o + static_cast<int64_t>(r) * dim;
      const float* add = part.o + static_cast<int64_t>(r) * dim;
      for (int d = 0; d < dim; d += kLanes) {
        F::store(sum + d,
                 F::add(F::mul(F::load(sum + d), F::set(old_scale)), F::mul(F::load(add + d), F::set(new_scale))));
      }
    }
  }

  static void finish(const AttentionItem& item, const State& total) {
    const int head_dim = item.layout.head_dim;
    for (int r = 0; r < item.positions * item.group; ++r) {
      const Reg scale = F::set(1.0f / total.l[r]);
      const float* in = total.o + static_cast<int64_t>(r) * item.layout.padded_dim;
      Cell* out = static_cast<Cell*>(item.out) + r / item.group * item.row_stride + r % item.group * head_dim;
      for (int d = 0; d < head_dim; d += kLanes) {
        F::put(out + d, F::mul(F::load(in + d), scale), least(kLanes, head_dim - d));
      }
    }
  }

  static void attend(const AttentionItem& item) {
    const State total = state_at(item, item.scratch);
    const State part = state_at(item, item.scratch + item.state_floats);
    float* const scales = item.scratch + 2 * item.state_floats;
    const Queries q = {reinterpret_cast<Weight*>(scales + (item.positions * item.group + 15) / 16 * 16), scales};
    pack_queries(item, q);
    for (int s = item.first_segment; s < item.last_segment; ++s) {
      if (item.partials != nullptr) {
        segment(item, q, s, state_at(item, item.partials + s * item.state_floats));
      } else if (s == 0) {
        segment(item, q, s, total);
      } else {
        segment(item, q, s, part);
        join(item, s, total, part);
      }
    }
    if (item.partials == nullptr) finish(item, total);
  }

  static void merge(const AttentionItem& item) {
    const State total = state_at(item, item.partials);
    for (int s = 1; s < item.last_segment; ++s) {
      join(item, s, total, state_at(item, item.partials + s * item.state_floats));
    }
    finish(item, total);
  }
};
