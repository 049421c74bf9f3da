// Row kernels for any vector width. Included only by files of one instruction set, inside their anonymous namespace,
// with a Vec as in vector_*-inl.h that adds
//
//   at_least(x, y), unordered(x)        lanes where x >= y, where x is NaN: lane 0 in bit 0
//   where_at_least(x, y, value)         value in the lanes where x >= y, else 0
//   Sum, no_sum, add_double, reduce     a sum of lanes in double

template <class Vec>
struct Rows {
  using Reg = typename Vec::Reg;
  static constexpr int kLanes = Vec::kLanes;
  static constexpr int kStep = 4 * kLanes;

  template <class Cell>
  static void rms_norm(const float* x, const float* weight, float eps, int32_t columns, void* out) {
    Reg squares[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) squares[j] = Vec::set(0.0f);
    int i = 0;
    for (; i + kStep <= columns; i += kStep) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Reg value = Vec::load(x + i + j * kLanes);
        squares[j] = Vec::madd(value, value, squares[j]);
      }
    }
    for (; i < columns; i += kLanes) {
      const Reg value = Vec::get(x + i, columns - i);
      squares[0] = Vec::madd(value, value, squares[0]);
    }
    const float sum = Vec::reduce_add(Vec::add(Vec::add(squares[0], squares[1]), Vec::add(squares[2], squares[3])));
    const Reg scale = Vec::set(1.0f / __builtin_sqrtf(sum / static_cast<float>(columns) + eps));
    auto* cells = static_cast<Cell*>(out);
    for (i = 0; i < columns; i += kLanes) {
      const int n = columns - i < kLanes ? columns - i : kLanes;
      Vec::put(cells + i, Vec::mul(Vec::mul(Vec::get(x + i, n), scale), Vec::get(weight + i, n)), n);
    }
  }

  static RowMax max(const float* x, int32_t count) {
    constexpr int kChunk = 1024;
    const Reg lowest = Vec::set(-__builtin_inff());
    RowMax best{-__builtin_inff(), 0, false};
    unsigned nan = 0;
    int where = 0;   // the first chunk that holds the maximum
    for (int begin = 0; begin < count; begin += kChunk) {
      const int end = count - begin < kChunk ? count : begin + kChunk;
      Reg top[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) top[j] = lowest;
      int i = begin;
      for (; i + kStep <= end; i += kStep) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const Reg value = Vec::load(x + i + j * kLanes);
          nan |= Vec::unordered(value);
          top[j] = Vec::max(top[j], value);
        }
      }
      for (; i < end; i += kLanes) {
        const Reg value = Vec::keep(Vec::get(x + i, end - i), end - i, lowest);
        nan |= Vec::unordered(value);
        top[0] = Vec::max(top[0], value);
      }
      const float highest = Vec::reduce_max(Vec::max(Vec::max(top[0], top[1]), Vec::max(top[2], top[3])));
      if (highest > best.value) {
        best.value = highest;
        where = begin;
      }
    }
    best.nan = nan != 0;
    best.index = where;
    while (!best.nan && x[best.index] != best.value) ++best.index;
    return best;
  }

  static double weigh(const float* x, int32_t count, float max, float scale, float floor, float* out) {
    const Reg shift = Vec::set(max);
    const Reg factor = Vec::set(scale);
    const Reg least = Vec::set(floor);
    const Reg zero = Vec::set(0.0f);
    typename Vec::Sum sum = Vec::no_sum();
    for (int i = 0; i < count; i += kLanes) {
      const int n = count - i < kLanes ? count - i : kLanes;
      const Reg value = Vec::get(x + i, n);
      // Most of a row is far below a floor.
      if (Vec::at_least(value, least) == 0) {
        Vec::put(out + i, zero, n);
        continue;
      }
      const Reg all = Vec::exp2(Vec::mul(Vec::sub(value, shift), factor));
      const Reg weights = Vec::keep(Vec::where_at_least(value, least, all), n, zero);
      Vec::put(out + i, weights, n);
      sum = Vec::add_double(weights, sum);
    }
    return Vec::reduce(sum);
  }

  static int32_t find(const float* x, int32_t count, float floor, int32_t* out) {
    const Reg least = Vec::set(floor);
    int found = 0;
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      unsigned mask = Vec::at_least(Vec::load(x + i), least);
      for (; mask != 0; mask &= mask - 1) out[found++] = i + __builtin_ctz(mask);
    }
    for (; i < count; ++i) {
      if (x[i] >= floor) out[found++] = i;
    }
    return found;
  }
};

template <class Vec>
void fill(DType dtype, RowKernels& kernels) {
  kernels.rms_norm =
      dtype == DType::kF32 ? Rows<Vec>::template rms_norm<float> : Rows<Vec>::template rms_norm<unsigned short>;
  kernels.max = Rows<Vec>::max;
  kernels.weigh = Rows<Vec>::weigh;
  kernels.find = Rows<Vec>::find;
}
