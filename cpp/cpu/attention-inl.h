// The attention of one work item, for any vector width and number format. Included only by files of one instruction
// set, inside their anonymous namespace, after attention_scores-inl.h; attention_tiles-inl.h says what a Format F has.
//
// The algorithm is the online softmax of Milakov and Gimelshein (arXiv:1805.02867), tiled as in FlashAttention
// (arXiv:2205.14135), over tiles and segments at fixed absolute positions. A row's operations and their order
// depend on its position alone: which rows share a register tile changes neither.
//
// Over an int8 cache a query row is rounded to 16 bits of its largest element, and a row's softmax weights in one
// tile, times the scales of their values, to 16 bits of the largest: errors of 2^-16, where the cache's own are 2^-8.

template <class F>
struct Attend {
  using Reg = typename F::Reg;
  using Cell = typename F::Cell;
  using Weight = typename F::Weight;
  using Fetch = KvFetch<F>;
  using Product = Products<F>;
  using Score = Scores<F>;
  static constexpr int kLanes = F::kLanes;

  struct State {
    float* m;
    float* l;
    float* o;
  };

  static State state_at(const AttentionItem& item, float* base) {
    const int64_t padded = (item.positions * item.group + 15) / 16 * 16;
    return {base, base + padded, base + 2 * padded};
  }

  // Query rows in the order of Products::scores(), and what their products with keys are multiplied by to be scores.
  struct Queries {
    Weight* weights;
    float* scales;
    int first;   // the first row of these in the item
  };

  // Row r of a register tile sees keys [begin[r], past[r]) of a tile, both ascending with r.
  struct Seen {
    int begin[kRows];
    int past[kRows];

    bool some(int r) const { return begin[r] < past[r]; }
  };

  // ---- One tile of keys

  template <int MR>
  static void bend_scores(const Tile& tile, const Queries& q, const Seen& seen, float* sums) {
    const AttentionItem& item = *tile.item;
    for (int r = 0; r < MR; ++r) {
      const int row = q.first + r;
      const float slope = item.slopes != nullptr ? item.slopes[row % item.group] : 0.0f;
      const int distance = tile.begin - (item.first + row / item.group);
      Score::bend(item, seen.begin[0], seen.past[r], q.scales[r], slope, static_cast<float>(distance),
                  sums + r * kTile);
    }
  }

  // Rows of one register tile over one tile of keys.
  template <int MR>
  static void tile_rows(const Tile& tile, const Queries& q, const Seen& seen, float* m, float* l, float* o) {
    alignas(64) float sums[MR * kTile];
    alignas(64) Weight weights[MR * kTile];
    float alpha[MR];
    float scales[MR];
    const int past = seen.past[MR - 1];
    Product::template all_scores<MR>(tile, q.weights, seen.begin[0], past, sums);
    for (int r = 0; r < MR; ++r) scales[r] = q.scales[r];
    if (tile.item->softcap > 0.0f || tile.item->slopes != nullptr) {
      bend_scores<MR>(tile, q, seen, sums);
      for (int r = 0; r < MR; ++r) scales[r] = 1.0f;
    }
    const int from = seen.begin[0] / (2 * kLanes) * (2 * kLanes);
    for (int r = 0; r < MR; ++r) {
      if (seen.begin[r] > 0) Score::hide(from, seen.begin[r], sums + r * kTile);
    }
    if constexpr (F::kInt8) {
      const int first = seen.begin[0] / kColumn * kColumn;
      float step[MR];
      for (int r = 0; r < MR; ++r) {
        if (!seen.some(r)) continue;
        alpha[r] = Score::weigh_int8(tile.value_scales, sums + r * kTile, weights + r * kTile, first, seen.begin[r],
                                     seen.past[r], past, scales[r], m + r, l + r, step + r);
      }
      int8_values<MR>(tile, seen, weights, alpha, step, o);
    } else {
      for (int r = 0; r < MR; ++r) {
        alpha[r] = seen.some(r) ? Score::weigh(sums + r * kTile, weights + r * kTile, from, seen.past[r], scales[r],
                                               m + r, l + r)
                                : 1.0f;
      }
      cell_values<MR>(tile, seen, weights, alpha, o);
    }
  }

  // A row may pass over values that it does not see: they are integers, and zero times them is zero. And it has to: the
  // sums of a tile are exact only as long as they are not scaled.
  template <int MR>
  static void int8_values(const Tile& tile, const Seen& seen, const Weight* weights, const float* alpha,
                          const float* step, float* o) {
    const int begin = seen.begin[0] / 2;
    const int end = (seen.past[MR - 1] + 1) / 2;
    if (seen.some(0) && seen.some(MR - 1)) {
      Product::template all_values<MR>(tile, weights, begin, end, false, alpha, step, o);
      return;
    }
    for (int r = 0; r < MR; ++r) {
      if (!seen.some(r)) continue;
      Product::template all_values<1>(tile, weights + r * kTile, begin, end, false, alpha + r, step + r,
                                      o + r * tile.padded_dim);
    }
  }

  // What all rows see they take together; at a window's edge and on the diagonal each takes what else it sees alone. No
  // row reads a value that it does not see, not even to multiply it by zero: it might be infinite.
  template <int MR>
  static void cell_values(const Tile& tile, const Seen& seen, const Weight* weights, float* alpha, float* o) {
    // Key pairs [begin, end) of row r, and the first key of pair `end` where `odd`.
    const auto alone = [&](int r, int begin, int end, bool odd) {
      Product::template all_values<1>(tile, weights + r * kTile, begin, end, odd, alpha + r, nullptr,
                                      o + r * tile.padded_dim);
      alpha[r] = 1.0f;
    };
    int begin[MR];
    for (int r = 0; r < MR; ++r) {
      begin[r] = (seen.begin[r] + 1) / 2;
      if (seen.begin[r] % 2 == 0 || !seen.some(r)) continue;
      Product::add_second(tile, weights + r * kTile, seen.begin[r] / 2, alpha[r], o + r * tile.padded_dim);
      alpha[r] = 1.0f;
    }
    const int from = begin[MR - 1];
    const int to = seen.past[0] / 2;
    if (from < to) {
      for (int r = 0; r < MR && begin[r] < from; ++r) alone(r, begin[r], from, false);
      const bool together = seen.past[0] == seen.past[MR - 1];
      Product::template all_values<MR>(tile, weights, from, to, together && seen.past[0] % 2 != 0, alpha, nullptr, o);
      if (together) return;
      for (int r = 0; r < MR; ++r) {
        alpha[r] = 1.0f;
        begin[r] = to;
      }
    }
    for (int r = 0; r < MR; ++r) {
      if (seen.some(r) && 2 * begin[r] < seen.past[r]) alone(r, begin[r], seen.past[r] / 2, seen.past[r] % 2 != 0);
    }
  }

  static void tile_group(const Tile& tile, const Queries& q, int rows, const Seen& seen, float* m, float* l, float* o) {
    static_assert(kRows == 6);
    switch (rows) {
      case 1:
        return tile_rows<1>(tile, q, seen, m, l, o);
      case 2:
        return tile_rows<2>(tile, q, seen, m, l, o);
      case 3:
        return tile_rows<3>(tile, q, seen, m, l, o);
      case 4:
        return tile_rows<4>(tile, q, seen, m, l, o);
      case 5:
        return tile_rows<5>(tile, q, seen, m, l, o);
      default:
        return tile_rows<6>(tile, q, seen, m, l, o);
    }
  }

  // ---- One item

  // The columns of keys up to `past` of the tile that begins at `begin`, from the item's first key on: behind it blocks
  // may be anybody's, and the table anything.
  static void find_columns(const AttentionItem& item, int begin, int past, Tile& tile) {
    tile.begin = begin;
    for (int i = item.begin > begin ? (item.begin - begin) / kColumn : 0; begin + i * kColumn < past; ++i) {
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

  // The first key that the row sees.
  static int first_key(const AttentionItem& item, int row) {
    const int key = item.first + row / item.group - item.window + 1;
    return key < 0 ? 0 : key;
  }

  // `key` within the tile that begins at `begin`.
  static int within(int key, int begin) { return key < begin ? 0 : least(key - begin, kTile); }

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
    const int first_tile = item.begin / kTile * kTile;
    const int first = index * kAttentionSegment;
    for (int begin = first < first_tile ? first_tile : first; begin < past; begin += kTile) {
      find_columns(item, begin, least(past, begin + kTile), tile);
      tile.ahead = item.ahead;
      if (tile.ahead != nullptr && begin == first_tile) Fetch::begin(item, *tile.ahead);
      for (int row = 0; row < rows; row += kRows) {
        const int count = least(kRows, rows - row);
        Seen seen;
        for (int r = 0; r < count; ++r) {
          seen.begin[r] = within(first_key(item, row + r), begin);
          seen.past[r] = within(item.first + (row + r) / item.group + 1, begin);
        }
        if (seen.past[count - 1] == 0 || seen.begin[0] == kTile) continue;
        tile_group(tile, {q.weights + row * tile.head_dim, q.scales + row, row}, count, seen, state.m + row,
                   state.l + row, state.o + static_cast<int64_t>(row) * tile.padded_dim);
        tile.ahead = nullptr;   // the first rows fetched for all
      }
    }
  }

  // Adds segment `index` to the rows that have keys in it; a row's first is taken as it is.
  static void join(const AttentionItem& item, int index, const State& total, const State& part) {
    const int dim = item.layout.padded_dim;
    for (int r = 0; r < item.positions * item.group; ++r) {
      const int first = first_key(item, r) / kAttentionSegment;
      if (index < first || index > (item.first + r / item.group) / kAttentionSegment) continue;
      float* sum = total.o + static_cast<int64_t>(r) * dim;
      const float* add = part.o + static_cast<int64_t>(r) * dim;
      if (index == first) {
        total.m[r] = part.m[r];
        total.l[r] = part.l[r];
        for (int d = 0; d < dim; d += kLanes) F::store(sum + d, F::load(add + d));
        continue;
      }
      const float m = part.m[r] > total.m[r] ? part.m[r] : total.m[r];
      const float old_scale = F::first(F::exp2(F::set(total.m[r] - m)));
      const float new_scale = F::first(F::exp2(F::set(part.m[r] - m)));
      total.m[r] = m;
      total.l[r] = total.l[r] * old_scale + part.l[r] * new_scale;
      for (int d = 0; d < dim; d += kLanes) {
        F::store(sum + d,
                 F::add(F::mul(F::load(sum + d), F::set(old_scale)), F::mul(F::load(add + d), F::set(new_scale))));
      }
    }
  }

  // What o is multiplied by to be the row's result. A sink joins the sum with nothing behind it.
  static float share(const AttentionItem& item, int r, const State& total) {
    if (item.sinks == nullptr) return 1.0f / total.l[r];

    const float sink = item.sinks[r % item.group] * Score::kLog2e;
    const float m = sink > total.m[r] ? sink : total.m[r];
    const float scale = F::first(F::exp2(F::set(total.m[r] - m)));
    return scale / (total.l[r] * scale + F::first(F::exp2(F::set(sink - m))));
  }

  static void finish(const AttentionItem& item, const State& total) {
    const int head_dim = item.layout.head_dim;
    for (int r = 0; r < item.positions * item.group; ++r) {
      const Reg scale = F::set(share(item, r, total));
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
    const Queries q = {reinterpret_cast<Weight*>(scales + (item.positions * item.group + 15) / 16 * 16), scales, 0};
    pack_queries(item, q);
    for (int s = item.first_segment; s < item.last_segment; ++s) {
      if (item.partials != nullptr) {
        segment(item, q, s, state_at(item, item.partials + (s - item.first_segment) * item.state_floats));
      } else if (s == item.first_segment) {
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
    for (int s = item.first_segment + 1; s < item.last_segment; ++s) {
      join(item, s, total, state_at(item, item.partials + (s - item.first_segment) * item.state_floats));
    }
    finish(item, total);
  }
};
