// Single rows of queries, keys and values on their way to attention. Included before attention-inl.h; a Format F as
// there.

constexpr int least(int a, int b) { return a < b ? a : b; }

// The largest |x| of all registers added; NaN if one of them holds NaN or infinity.
template <class F>
struct Largest {
  using Reg = typename F::Reg;
  Reg top = F::set(0.0f);
  Reg broken = F::set(0.0f);

  void add(Reg x) {
    top = F::max(top, F::max(x, F::sub(F::set(0.0f), x)));
    broken = F::madd(x, F::set(0.0f), broken);   // NaN from NaN and infinity, else zero
  }
  float value() const { return F::reduce_max(top) + F::reduce_add(broken); }
};

// Numbers up to `largest` are about step * round(inverse * x), where no integer is beyond `most`.
struct Grid {
  static constexpr float kNothing = 1e-30f;   // what is smaller has no inverse, and counts as zero
  float step;                                 // NaN if `largest` is
  float inverse;

  Grid(float largest, float most)
      : step(largest < kNothing ? 0.0f : largest / most), inverse(largest >= kNothing ? most / largest : 0.0f) {}
};

template <class F>
struct KvRows {
  using Reg = typename F::Reg;
  using Cell = typename F::Cell;
  static constexpr int kLanes = F::kLanes;

  static void rotate(const float* in, const float* cos, const float* sin, int32_t head_dim, void* out) {
    const int half = head_dim / 2;
    auto* cells = static_cast<Cell*>(out);
    for (int i = 0; i < half; i += kLanes) {
      const int n = least(kLanes, half - i);
      const Reg low = F::get(in + i, n);
      const Reg high = F::get(in + half + i, n);
      const Reg c = F::get(cos + i, n);
      const Reg s = F::get(sin + i, n);
      F::put(cells + i, F::sub(F::mul(low, c), F::mul(high, s)), n);
      F::put(cells + half + i, F::add(F::mul(high, c), F::mul(low, s)), n);
    }
  }

  static void convert(const float* in, int32_t count, void* out) {
    auto* cells = static_cast<Cell*>(out);
    for (int i = 0; i < count; i += kLanes) {
      const int n = least(kLanes, count - i);
      F::put(cells + i, F::get(in + i, n), n);
    }
  }

  // F: an int8 format.
  static void quantize(const float* in, int32_t count, int8_t* out, float* scale) {
    Largest<F> largest;
    for (int i = 0; i < count; i += kLanes) largest.add(F::get(in + i, least(kLanes, count - i)));
    const Grid grid(largest.value(), kMostInt8);
    for (int i = 0; i < count; i += kLanes) {
      const int n = least(kLanes, count - i);
      F::put_int8(out + i, F::mul(F::get(in + i, n), F::set(grid.inverse)), n);
    }
    *scale = grid.step;
  }
};
