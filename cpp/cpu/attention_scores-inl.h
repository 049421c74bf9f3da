// From scores to softmax weights. Included only by files of one instruction set, inside their anonymous namespace,
// after attention_tiles-inl.h, which says what a Format F has.

constexpr float kMostWeight = 32767.0f;   // of 16 bits: 256 products with int8, a tile of values, stay below 2^31

template <class F>
struct Scores {
  using Reg = typename F::Reg;
  using Weight = typename F::Weight;
  static constexpr int kLanes = F::kLanes;
  static constexpr float kLog2e = 1.44269504f;

  // scores = the softcapped and, by `slope` for each position, biased scores of keys [begin, keys), in units of log2,
  // from products that are scores when multiplied by `scale`. distance: of key 0 from the query's position.
  [[gnu::noinline]] static void bend(const AttentionItem& item, int begin, int keys, float scale, float slope,
                                     float distance, float* scores) {
    static constexpr float kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Reg factor = F::set(item.softcap > 0.0f ? 2.0f * scale / item.softcap : scale);
    const Reg cap = F::set(item.softcap * kLog2e);
    const Reg rise = F::set(slope * kLog2e);
    for (int key = begin / kLanes * kLanes; key < keys; key += kLanes) {
      Reg score = F::mul(F::load(scores + key), factor);
      if (item.softcap > 0.0f) score = F::mul(cap, tanh_of_half(score));
      const Reg way = F::add(F::set(distance + static_cast<float>(key)), F::load(kLane));
      F::store(scores + key, F::madd(way, rise, score));
    }
  }

  // Nothing is left of scores before key `begin`, from key `from` on; from: a multiple of kLanes.
  [[gnu::noinline]] static void hide(int from, int begin, float* scores) {
    const Reg lowest = F::set(-__builtin_inff());
    for (; from < begin; from += kLanes) {
      F::store(scores + from, F::keep(lowest, begin - from, F::load(scores + from)));
    }
  }

  // The maximum of a row's scores of keys [begin, keys) and of `before`; begin: a multiple of kLanes.
  static inline float highest(const float* scores, int begin, int keys, float scale, float before) {
    const Reg lowest = F::set(-__builtin_inff());
    Reg top = lowest;
    int key = begin;
    for (; key + kLanes <= keys; key += kLanes) top = F::max(top, F::load(scores + key));
    if (key < keys) top = F::max(top, F::keep(F::load(scores + key), keys - key, lowest));
    const float now = F::reduce_max(top) * scale;
    return now > before ? now : before;
  }

  // Turns a row's scores of keys [begin, keys) into weights and updates its m and l; the factor for what o holds so
  // far. begin: a multiple of 2 kLanes.
  static inline float weigh(const float* scores, Weight* p, int begin, int keys, float scale, float* m, float* l) {
    const float before = *m;
    const float after = highest(scores, begin, keys, scale, before);
    const Reg factor = F::set(scale);
    const Reg shift = F::set(-after);
    Reg sum = F::set(0.0f);
    int key = begin;
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
  // *step is the unit of these. Keys of [first, past) that are not of [begin, keys) weigh nothing. first: the first of
  // a column.
  static inline float weigh_int8(const float* const* value_scales, float* scores, Weight* p, int first, int begin,
                                 int keys, int past, float scale, float* m, float* l, float* step) {
    const int start = begin / kLanes * kLanes;
    const float before = *m;
    const float after = highest(scores, start, keys, scale, before);
    const Reg factor = F::set(scale);
    const Reg shift = F::set(-after);
    const Reg zero = F::set(0.0f);
    Reg sum = zero;
    Reg top = zero;
    int key = start;
    const auto weigh_lanes = [&](auto kept) {
      const Reg weight = kept(F::exp2(F::madd(F::load(scores + key), factor, shift)));
      const Reg scales = kept(F::load(value_scales[key / kColumn] + key % kColumn));
      const Reg scaled = F::mul(weight, scales);
      sum = F::add(sum, weight);
      top = F::max(top, scaled);
      F::store(scores + key, scaled);
      key += kLanes;
    };
    const auto kept = [&](Reg x) { return F::keep(F::keep(zero, begin - key, x), keys - key, zero); };
    if (start < begin) weigh_lanes(kept);
    while (key + kLanes <= keys) weigh_lanes([](Reg x) { return x; });
    if (key < keys) weigh_lanes(kept);
    const Grid grid(F::reduce_max(top), kMostWeight);
    const Reg inverse = F::set(grid.inverse);
    for (key = first; key < start; key += kLanes) F::put_weights(p + key, zero, kLanes);
    for (; key < keys; key += kLanes) F::put_weights(p + key, F::mul(F::load(scores + key), inverse), kLanes);
    for (; key < past; key += kLanes) F::put_weights(p + key, zero, kLanes);
    const float alpha = F::first(F::exp2(F::set(before - after)));
    *step = grid.step;
    *m = after;
    *l = *l * alpha + F::reduce_add(sum);
    return alpha;
  }

 private:
  // tanh(x ln(2) / 2), within some ulp everywhere: (2^x - 1) / (2^x + 1), where 2^x - 1 is summed from its small parts.
  static inline Reg tanh_of_half(Reg x) {
    // Far out the result is 1. As max has it, NaN stays.
    x = F::max(F::set(-64.0f), x);
    x = F::sub(F::set(0.0f), F::max(F::set(-64.0f), F::sub(F::set(0.0f), x)));
    const Reg round = F::set(0x1.8p23f);
    const Reg whole = F::sub(F::add(x, round), round);
    const Reg f = F::sub(x, whole);
    // 2^f - 1 for f in [-1/2, 1/2], the polynomial of exp2.
    Reg y = F::madd(F::set(0.000153458120f), f, F::set(0.00133999312f));
    y = F::madd(y, f, F::set(0.00961848896f));
    y = F::madd(y, f, F::set(0.0555032878f));
    y = F::madd(y, f, F::set(0.240226469f));
    y = F::madd(y, f, F::set(0.693147206f));
    y = F::mul(y, f);
    const Reg power = F::exp2(whole);
    const Reg less = F::madd(power, y, F::sub(power, F::set(1.0f)));
    return less / F::add(less, F::set(2.0f));
  }
};
