// Row kernels for any vector width. Included only by files of one instruction set, inside their anonymous namespace,
// with a Vec as in vector_*-inl.h that adds
//
//   at_least(x, y), unordered(x)        lanes where x >= y, where x is NaN: lane 0 in bit 0
//   where_at_least(x, y, value)         value in the lanes where x >= y, else 0
//   Sum, no_sum, add_double, reduce     a sum of lanes in double

#include "cpu/functions-inl.h"

template <class Vec>
struct Rows {
  using Reg = typename Vec::Reg;
  static constexpr int kLanes = Vec::kLanes;
  static constexpr int kStep = 4 * kLanes;

  /// Of a row: what a norm subtracts, and what it then multiplies with.
  struct Moments {
    Reg mean, scale;
  };

  /// The sum of Term(x - mean) over a row, in an order that depends on `columns` alone.
  template <Reg (*Term)(Reg value, Reg sum)>
  static float sum(const float* x, int columns, Reg mean) {
    const Reg zero = Vec::set(0.0f);
    Reg sums[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] = zero;
    int i = 0;
    for (; i + kStep <= columns; i += kStep) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[j] = Term(Vec::sub(Vec::load(x + i + j * kLanes), mean), sums[j]);
    }
    for (; i < columns; i += kLanes) {
      const int n = columns - i;
      sums[0] = Term(Vec::keep(Vec::sub(Vec::get(x + i, n), mean), n, zero), sums[0]);
    }
    return Vec::reduce_add(Vec::add(Vec::add(sums[0], sums[1]), Vec::add(sums[2], sums[3])));
  }
  static Reg itself(Reg value, Reg sum) { return Vec::add(value, sum); }
  static Reg square(Reg value, Reg sum) { return Vec::madd(value, value, sum); }

  static Moments moments(const RowNorm& norm, const float* x) {
    const auto columns = static_cast<float>(norm.columns);
    Reg mean = Vec::set(0.0f);
    if (norm.centered) mean = Vec::set(sum<itself>(x, norm.columns, mean) / columns);
    const float variance = sum<square>(x, norm.columns, mean) / columns;
    return {mean, Vec::set(1.0f / __builtin_sqrtf(variance + norm.eps))};
  }

  /// Columns i and on of norm(x), n of them.
  static Reg normed(const RowNorm& norm, const Moments& row, const float* x, int i, int n) {
    const Reg value =
        Vec::mul(Vec::mul(Vec::sub(Vec::get(x + i, n), row.mean), row.scale), Vec::get(norm.weight + i, n));
    return norm.bias != nullptr ? Vec::add(value, Vec::get(norm.bias + i, n)) : value;
  }

  /// Calls use(i, n, columns i to i + n of norm(x)) for all of a row.
  template <class Use>
  static void for_normed(const RowNorm& norm, const float* x, const Use& use) {
    const Moments row = norm.weight != nullptr ? moments(norm, x) : Moments{};
    for (int i = 0; i < norm.columns; i += kLanes) {
      const int n = norm.columns - i < kLanes ? norm.columns - i : kLanes;
      use(i, n, norm.weight != nullptr ? normed(norm, row, x, i, n) : Vec::get(x + i, n));
    }
  }

  template <class Cell>
  static void norm(const RowNorm& norm, const float* x, void* out) {
    auto* cells = static_cast<Cell*>(out);
    for_normed(norm, x, [&](int i, int n, Reg value) { Vec::put(cells + i, value, n); });
  }

  static void norm_in_place(const RowNorm& row_norm, float* x) { norm<float>(row_norm, x, x); }

  static void add(const RowNorm& norm, const float* y, float scale, float* x) {
    const Reg factor = Vec::set(scale);
    for_normed(norm, y,
               [&](int i, int n, Reg value) { Vec::put(x + i, Vec::madd(factor, value, Vec::get(x + i, n)), n); });
  }

  static void scale_and_cap(float* x, int32_t count, float scale, float cap) {
    const Reg factor = Vec::set(scale);
    const Reg most = Vec::set(cap);
    for (int i = 0; i < count; i += kLanes) {
      Reg value = Vec::mul(Vec::get(x + i, count - i), factor);
      if (cap != 0.0f) value = Vec::mul(most, Functions<Vec>::tanh(Vec::div(value, most)));
      Vec::put(x + i, value, count - i);
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
  using Of = Rows<Vec>;
  kernels.norm = dtype == DType::kF32 ? Of::template norm<float> : Of::template norm<unsigned short>;
  kernels.norm_in_place = Of::norm_in_place;
  kernels.add = Of::add;
  kernels.scale_and_cap = Of::scale_and_cap;
  kernels.max = Of::max;
  kernels.weigh = Of::weigh;
  kernels.find = Of::find;
}
