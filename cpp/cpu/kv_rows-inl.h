// Single rows of queries, keys and values on their way to attention. Included before attention_tiles-inl.h; a Format
// F as there.

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

  static void norm(float* x, const float* weight, int32_t columns, bool centered, float eps) {
    const auto count = static_cast<float>(columns);
    const Reg zero = F::set(0.0f);
    Reg mean = zero;
    if (centered) {
      Reg sum = zero;
      for (int i = 0; i < columns; i += kLanes) sum = F::add(sum, F::get(x + i, columns - i));
      mean = F::set(F::reduce_add(sum) / count);
    }
    Reg squares = zero;
    for (int i = 0; i < columns; i += kLanes) {
      const Reg value = F::keep(F::sub(F::get(x + i, columns - i), mean), columns - i, zero);
      squares = F::madd(value, value, squares);
    }
    const Reg scale = F::set(1.0f / __builtin_sqrtf(F::reduce_add(squares) / count + eps));
    for (int i = 0; i < columns; i += kLanes) {
      const int n = columns - i;
      F::put(x + i, F::mul(F::mul(F::sub(F::get(x + i, n), mean), scale), F::get(weight + i, n)), n);
    }
  }

  static void rotate(float* x, const float* cos, const float* sin, int32_t pairs) {
    for (int i = 0; i < pairs; i += kLanes) {
      const int n = pairs - i;
      const Reg low = F::get(x + i, n);
      const Reg high = F::get(x + pairs + i, n);
      const Reg c = F::get(cos + i, n);
      const Reg s = F::get(sin + i, n);
      F::put(x + i, F::sub(F::mul(low, c), F::mul(high, s)), n);
      F::put(x + pairs + i, F::add(F::mul(high, c), F::mul(low, s)), n);
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
