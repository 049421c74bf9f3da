// Linear layers and rows on every instruction set that this processor has, held to the scalar reference on numbers
// drawn anew in each run.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "base/numeric.h"
#include "cpu/activation_ref.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/linear.h"
#include "cpu/row_kernels.h"
#include "kernel_ops.h"

namespace splitfuse {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kUnit = 0x1p-23f;   // in the last place of 1

/// 1 to 257, thinned: around the width of every register, tile, panel and group.
const std::vector<int32_t> kSizes = {1,  2,  3,  4,  5,  6,  7,  8,  9,  12, 15,  16,  17,  24,  25,  31,  32,
                                     33, 47, 48, 49, 63, 64, 65, 80, 95, 97, 127, 129, 160, 191, 255, 256, 257};

struct Size {
  int32_t m, n, k;
};

/// Each size once, as rows, columns or depth, beside others drawn so that the product stays small; then deep and long
/// ones, which are cut into blocks.
std::vector<Size> sizes(Draw& draw) {
  std::vector<Size> result;
  int32_t place = draw.below(3);
  for (const int32_t size : kSizes) {
    int32_t all[3] = {size, 1, 1};
    int32_t room = 40000 / size;
    for (int i = 1; i < 3; ++i) {
      all[i] = 1 + draw.below(std::clamp(room, 1, 70));
      room /= all[i];
    }
    result.push_back({all[place % 3], all[(place + 1) % 3], all[(place + 2) % 3]});
    ++place;
  }
  result.insert(result.end(), {{2, 17, 1601}, {530, 3, 34}, {9, 20, 2003}});
  return result;
}

using LinearParam = std::tuple<std::string, DType, WeightFormat>;

std::string linear_name(const testing::TestParamInfo<LinearParam>& test) {
  const auto& [isa, dtype, format] = test.param;
  return isa + "_" + dtype_name(dtype) + "_" + weight_format_name(format);
}

class LinearKernels : public testing::TestWithParam<LinearParam> {
 protected:
  std::string isa() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
  WeightFormat format() const { return std::get<2>(GetParam()); }
  Ops ops(int threads = 1) const { return {isa(), dtype(), format(), threads}; }

  /// How far two float32 sums of the same products may be apart, in any order: each rounding by a unit. Over integers
  /// each 32 are exact; int4 sums a scaled and a constant part, each at most twice the channel's largest weight.
  Table bound(const Table& w, const Table& bias, const Table& x) const {
    const bool dense = format() == WeightFormat::kDense;
    const int32_t roundings = dense ? 2 * w.columns + 8 : 4 * ((w.columns + 31) / 32) + 8;
    Table result(x.rows, w.rows);
    for (int32_t n = 0; n < w.rows; ++n) {
      float largest = 0;
      for (int32_t k = 0; k < w.columns; ++k) largest = std::max(largest, std::fabs(w.at(n, k)));
      for (int32_t m = 0; m < x.rows; ++m) {
        float size = bias.columns > 0 ? std::fabs(bias.at(0, n)) : 0.0f;
        for (int32_t k = 0; k < w.columns; ++k) {
          size += std::fabs(x.at(m, k)) * (dense ? std::fabs(w.at(n, k)) : 4 * largest);
        }
        result.at(m, n) = static_cast<float>(roundings) * kUnit * size + 1e-30f;
      }
    }
    return result;
  }
};

void expect_near(const Table& out, const Table& ref, const Table& allowed) {
  ASSERT_EQ(out.values.size(), ref.values.size());
  for (int32_t r = 0; r < out.rows; ++r) {
    for (int32_t c = 0; c < out.columns; ++c) {
      ASSERT_LE(std::fabs(out.at(r, c) - ref.at(r, c)), allowed.at(r, c)) << "row " << r << ", column " << c;
    }
  }
}

constexpr Activation kActivations[] = {Activation::kNone,     Activation::kSilu, Activation::kGelu,
                                       Activation::kGeluTanh, Activation::kRelu, Activation::kSwigluClamped};
/// The last is of gated linears alone.
constexpr int kPlainActivations = 5;

/// How far act(gate) * up may be from its reference if the sums may be as far as these; no slope is above 1.15.
float gated_bound(Activation activation, float gate, float up, float gate_error, float up_error, DType dtype) {
  const bool clamped = activation == Activation::kSwigluClamped;
  const float left = clamped ? gated(activation, gate, 0.0f) : activated(activation, gate);
  const float right = clamped ? std::fabs(up) + 1.0f : std::fabs(up);
  return 1.15f * gate_error * right + up_error * std::fabs(left) + 1.15f * gate_error * up_error +
         std::fabs(gated(activation, gate, up)) * (16 * kUnit + (dtype == DType::kBF16 ? 0x1p-7f : 0.0f)) + 1e-30f;
}

TEST_P(LinearKernels, AreNearTheReference) {
  Draw draw;
  Ops run = ops();
  Ops ref("ref", dtype(), format());
  for (const auto& [m, n, k] : sizes(draw)) {
    SCOPED_TRACE(testing::Message() << m << " x " << n << " x " << k << ", seed " << Draw::seed());
    const Table w = draw.table(n, k), u = draw.table(n, k), x = draw.table(m, k), to = draw.table(m, n);
    const Table bias = draw.below(2) ? draw.table(1, n) : Table();
    const Table gate = ref.linear(w, bias, x), up = ref.linear(u, bias, x);
    Table gate_error = bound(w, bias, x);
    const Table up_error = bound(u, bias, x);
    expect_near(run.linear(w, bias, x), gate, gate_error);
    const Activation activation = kActivations[draw.below(6)], plain = kActivations[draw.below(kPlainActivations)];
    SCOPED_TRACE(testing::Message() << config_word(activation) << ", " << config_word(plain));
    Table gated_error(m, n), plain_error(m, n);
    for (size_t i = 0; i < gated_error.values.size(); ++i) {
      const float g = gate_error.values[i], v = up_error.values[i];
      gated_error.values[i] = gated_bound(activation, gate.values[i], up.values[i], g, v, dtype());
      plain_error.values[i] = gated_bound(plain, gate.values[i], 1.0f, g, 0.0f, dtype());
      gate_error.values[i] += 4 * kUnit * std::fabs(to.values[i]);
    }
    expect_near(run.linear_gated(w, u, bias, x, activation), ref.linear_gated(w, u, bias, x, activation), gated_error);
    expect_near(run.linear_act(w, bias, x, plain), ref.linear_act(w, bias, x, plain), plain_error);
    expect_near(run.linear_add(w, bias, x, to), ref.linear_add(w, bias, x, to), gate_error);
    const std::vector<int32_t> rows = {n - 1, 0};
    const Table two = draw.table(2, k);
    EXPECT_TRUE(run.embed(w, rows, 1.7f).same_bits(ref.embed(w, rows, 1.7f)));
    EXPECT_TRUE(run.embed_positions(w, {n - 1, 0}, 0, two).same_bits(ref.embed_positions(w, rows, 0, two)));
    if (HasFailure()) return;
  }
}

TEST_P(LinearKernels, RowsHaveTheSameBitsInAnyCompany) {
  Draw draw;
  SCOPED_TRACE(testing::Message() << "seed " << Draw::seed());
  for (const auto& [m, n, k] : {Size{29, 50, 67}, Size{14, 21, 2003}}) {
    const Table w = draw.table(n, k), u = draw.table(n, k), x = draw.table(m, k), to = draw.table(m, n);
    const Table bias = draw.table(1, n);
    Ops alone = ops();
    const Table plain = alone.linear(w, bias, x), add = alone.linear_add(w, {}, x, to);
    std::vector<Table> gated, act;
    for (const Activation activation : kActivations) gated.push_back(alone.linear_gated(w, u, bias, x, activation));
    for (int a = 0; a < kPlainActivations; ++a) act.push_back(alone.linear_act(w, bias, x, kActivations[a]));
    for (const int threads : {1, 3}) {
      Ops run = ops(threads);
      std::vector<std::vector<int32_t>> companies = {range(0, m)};
      for (const int32_t count : {1, 2, 3, 5, 7, 9, 13}) {
        std::vector<int32_t> chosen;
        for (int32_t i = 0; i < count; ++i) chosen.push_back(draw.below(m));
        companies.push_back(chosen);
      }
      for (const auto& rows : companies) {
        EXPECT_TRUE(run.linear(w, bias, x.take(rows)).same_bits(plain.take(rows))) << rows.size();
        EXPECT_TRUE(run.linear_add(w, {}, x.take(rows), to.take(rows)).same_bits(add.take(rows))) << rows.size();
        const int a = draw.below(6), b = draw.below(kPlainActivations);
        const Table in = x.take(rows);
        EXPECT_TRUE(run.linear_gated(w, u, bias, in, kActivations[a]).same_bits(gated[a].take(rows))) << a;
        EXPECT_TRUE(run.linear_act(w, bias, in, kActivations[b]).same_bits(act[b].take(rows))) << b;
      }
    }
  }
}

/// Every element outside `row` and `column` has the bits it had; those inside are not finite.
void expect_broken(const Table& out, const Table& clean, int32_t row, int32_t column) {
  for (int32_t r = 0; r < out.rows; ++r) {
    for (int32_t c = 0; c < out.columns; ++c) {
      if (r == row || c == column) {
        ASSERT_FALSE(std::isfinite(out.at(r, c))) << "row " << r << ", column " << c;
      } else {
        ASSERT_EQ(out.at(r, c), clean.at(r, c)) << "row " << r << ", column " << c;
      }
    }
  }
}

TEST_P(LinearKernels, NotANumberAndInfinityStayInTheirRowAndColumn) {
  Draw draw;
  SCOPED_TRACE(testing::Message() << "seed " << Draw::seed());
  constexpr int32_t kRows = 11, kColumns = 53, kDepth = 35;
  // No weight and no element of a row is zero: infinity times it is not a number then.
  const Table w = draw.table(kColumns, kDepth, 0.1f), u = draw.table(kColumns, kDepth), x = draw.table(kRows, kDepth);
  Ops run = ops();
  const Table clean = run.linear(w, {}, x);
  for (const float broken : {kNaN, kInfinity, -kInfinity}) {
    const int32_t row = draw.below(kRows), column = draw.below(kColumns), k = draw.below(kDepth);
    Table bad = x;
    bad.at(row, k) = broken;
    expect_broken(run.linear(w, {}, bad), clean, row, -1);
    for (int a = 0; a < 6 && std::isnan(broken); ++a) {
      const Activation activation = kActivations[a];
      expect_broken(run.linear_gated(w, u, {}, bad, activation), run.linear_gated(w, u, {}, x, activation), row, -1);
      if (a == kPlainActivations) break;
      expect_broken(run.linear_act(w, {}, bad, activation), run.linear_act(w, {}, x, activation), row, -1);
    }
    expect_broken(run.linear_add(w, {}, bad, Table(kRows, kColumns)), clean, row, -1);
    bad = w;
    bad.at(column, k) = broken;
    expect_broken(run.linear(bad, {}, x), clean, -1, column);
  }
}

INSTANTIATE_TEST_SUITE_P(All, LinearKernels,
                         testing::Combine(testing::ValuesIn(cpu_isas()), testing::Values(DType::kF32, DType::kBF16),
                                          testing::Values(WeightFormat::kDense, WeightFormat::kInt8,
                                                          WeightFormat::kInt4)),
                         linear_name);

// ---- What goes before and around a multiplication

std::string isa_name_of(const testing::TestParamInfo<std::string>& test) { return test.param; }

class RowKernelsOf : public testing::TestWithParam<std::string> {
 protected:
  Isa isa() const { return isa_from_name(GetParam()); }
};

bool same(float a, float b) {
  return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b) || (std::isnan(a) && std::isnan(b));
}

/// `depth` cells, zeros behind them, and in one case out of three something that is not finite.
std::vector<float> cells(Draw& draw, int32_t depth) {
  std::vector<float> values(static_cast<size_t>(row_stride(depth)));
  const float size = std::exp2(static_cast<float>(draw.below(40) - 20));
  for (int32_t i = 0; i < depth; ++i) values[i] = draw.number(size);
  const float broken[] = {kNaN, kInfinity, -kInfinity};
  if (draw.below(3) == 0) values[draw.below(depth)] = broken[draw.below(3)];
  return values;
}

TEST_P(RowKernelsOf, RowsBecomeTheIntegersOfTheReference) {
  Draw draw;
  const GemmTable table = gemm_table(isa()), ref = gemm_table(Isa::kRef);
  for (const int32_t depth : kSizes) {
    SCOPED_TRACE(testing::Message() << depth << ", seed " << Draw::seed());
    const std::vector<float> wide = cells(draw, depth);
    std::vector<uint16_t> narrow;
    for (const float value : wide) narrow.push_back(float_to_bf16(value));
    const RowRecord record = row_record(depth);
    for (const bool bf16 : {false, true}) {
      std::vector<std::byte> out(static_cast<size_t>(record.bytes), std::byte{0x5a}), expected = out;
      bf16 ? table.int8.quantize_bf16(narrow.data(), depth, out.data())
           : table.int8.quantize_f32(wide.data(), depth, out.data());
      bf16 ? ref.int8.quantize_bf16(narrow.data(), depth, expected.data())
           : ref.int8.quantize_f32(wide.data(), depth, expected.data());
      for (int32_t i = 0; i < record.bytes;) {
        const bool number =
            (i >= record.scales && i < record.offsets) || (i >= record.totals && i < 44 * record.groups);
        float got = 0, want = 0;
        std::memcpy(&got, out.data() + i, number ? 4 : 1);
        std::memcpy(&want, expected.data() + i, number ? 4 : 1);
        ASSERT_TRUE(same(got, want)) << "byte " << i << " of " << record.bytes;
        i += number ? 4 : 1;
      }
    }
  }
}

TEST_P(RowKernelsOf, WidenReadAndPeakDoWhatTheySay) {
  Draw draw;
  const GemmTable table = gemm_table(isa());
  for (const int32_t count : kSizes) {
    std::vector<uint16_t> narrow;
    for (int32_t i = 0; i < count; ++i) narrow.push_back(static_cast<uint16_t>(draw.below(0x10000)));
    std::vector<float> wide(static_cast<size_t>(count) + 1, 7.0f);
    if (table.bf16.widen == nullptr) continue;   // it takes bfloat16 as it is
    table.bf16.widen(narrow.data(), count, wide.data());
    for (int32_t i = 0; i < count; ++i) ASSERT_TRUE(same(wide[i], bf16_to_float(narrow[i]))) << i;
    EXPECT_EQ(wide[count], 7.0f);
  }
  for (const GemmKernel* kernel : {&table.f32, &table.bf16, &table.int8, &table.int4}) EXPECT_GT(kernel->peak(10), 0);
  std::vector<uint64_t> words(512 / 8 * 3);
  EXPECT_EQ(table.read(reinterpret_cast<const std::byte*>(words.data()), 512 * 3), 0u);
  for (size_t i = 0; i < words.size(); ++i) {
    words[i] = 1;
    EXPECT_NE(table.read(reinterpret_cast<const std::byte*>(words.data()), 512 * 3), 0u) << i;
    words[i] = 0;
  }
}

/// Broken rows are so in both; elsewhere `out` is as near to `ref` as `size`, of what was added up, allows.
void expect_near_rows(const Table& out, const Table& ref, float size) {
  for (size_t i = 0; i < out.values.size(); ++i) {
    if (!std::isfinite(ref.values[i])) {
      ASSERT_TRUE(same(out.values[i], ref.values[i])) << i;
    } else {
      ASSERT_LE(std::fabs(out.values[i] - ref.values[i]), 0x1p-20f * (std::fabs(ref.values[i]) + size) + 1e-30f) << i;
    }
  }
}

TEST_P(RowKernelsOf, NormsAreNearTheReferenceAndRoundOnce) {
  Draw draw;
  Ops run(GetParam(), DType::kF32), narrow(GetParam(), DType::kBF16), ref("ref", DType::kF32);
  for (const int32_t columns : {1, 4, 7, 8, 12, 17, 24, 31, 60, 64, 67, 68, 72, 88, 136, 576, 1001}) {
    const NormKind kind = draw.below(2) ? NormKind::kRms : NormKind::kLayer;
    SCOPED_TRACE(testing::Message() << config_word(kind) << ", " << columns << ", seed " << Draw::seed());
    const float size = std::exp2(static_cast<float>(draw.below(30) - 10));
    Table x = draw.table(5, columns, size);
    for (float& value : x.values) value += kind == NormKind::kLayer ? size : 0.0f;
    x.at(3, draw.below(columns)) = draw.below(2) ? kNaN : kInfinity;
    const Table weight = draw.below(4) ? draw.table(1, columns) : Table();
    const Table bias = kind == NormKind::kLayer && draw.below(2) ? draw.table(1, columns) : Table();
    const Table to = draw.table(5, columns);
    const Table out = run.norm(x, weight, bias, kind), rounded = narrow.norm(x, weight, bias, kind);
    // A centered row has lost what its mean had, and one of a single column is nothing but rounding.
    const float lost = kind == NormKind::kLayer && weight.rows > 0 ? 8.0f : 0.0f;
    expect_near_rows(out, ref.norm(x, weight, bias, kind), lost);
    expect_near_rows(run.add(to, x, 0.3f, weight, bias, kind), ref.add(to, x, 0.3f, weight, bias, kind), lost + 2.0f);
    const Table in_place = run.norm_in_place(x, weight, bias, kind);
    for (int32_t r = 0; r < x.rows; ++r) {
      for (int32_t c = 0; c < columns; ++c) {
        ASSERT_TRUE(same(in_place.at(r, c), out.at(r, c)));
        ASSERT_TRUE(same(rounded.at(r, c), bf16_to_float(float_to_bf16(out.at(r, c)))));
      }
      if (r != 3) EXPECT_TRUE(run.norm(x.take({r}), weight, bias, kind).same_bits(out.take({r})));
    }
  }
}

TEST_P(RowKernelsOf, LogitsAreScaledAndCappedAsByTheReference) {
  Draw draw;
  const RowKernels run = make_row_kernels(DType::kF32, isa()), ref = make_row_kernels(DType::kF32, Isa::kRef);
  for (const int32_t count : kSizes) {
    SCOPED_TRACE(testing::Message() << count << ", seed " << Draw::seed());
    for (const float cap : {0.0f, 30.0f}) {
      std::vector<float> x(static_cast<size_t>(count) + 1, 7.0f);
      for (int32_t i = 0; i < count; ++i) x[i] = draw.number(std::exp2(static_cast<float>(draw.below(40) - 20)));
      if (draw.below(3) == 0) x[draw.below(count)] = kNaN;
      std::vector<float> expected = x;
      run.scale_and_cap(x.data(), count, 0.3f, cap);
      ref.scale_and_cap(expected.data(), count, 0.3f, cap);
      for (int32_t i = 0; i < count; ++i) {
        if (std::isnan(expected[i])) {
          ASSERT_TRUE(std::isnan(x[i])) << i;
        } else {
          ASSERT_LE(std::fabs(x[i] - expected[i]), 8 * kUnit * std::fabs(expected[i])) << i;
        }
      }
      EXPECT_EQ(x[count], 7.0f);
    }
  }
}

TEST_P(RowKernelsOf, MaximumSumAndSearchAreThoseOfTheReference) {
  Draw draw;
  const RowKernels run = make_row_kernels(DType::kF32, isa()), ref = make_row_kernels(DType::kF32, Isa::kRef);
  std::vector<int32_t> counts = kSizes;
  counts.insert(counts.end(), {1023, 1024, 1025, 3001});
  for (const int32_t count : counts) {
    for (int trial = 0; trial < 4; ++trial) {
      SCOPED_TRACE(testing::Message() << count << ", seed " << Draw::seed());
      std::vector<float> x;
      // Few different values, so that the largest comes more than once.
      for (int32_t i = 0; i < count; ++i) x.push_back(static_cast<float>(draw.below(30)) - 30.0f);
      if (trial == 1) x[draw.below(count)] = -kInfinity;
      const RowMax highest = ref.max(x.data(), count);
      RowMax got = run.max(x.data(), count);
      EXPECT_FALSE(got.nan);
      EXPECT_EQ(got.value, highest.value);
      EXPECT_EQ(got.index, highest.index);

      if (trial >= 2) x[draw.below(count)] = kNaN;
      EXPECT_EQ(run.max(x.data(), count).nan, trial >= 2);
      const float floor = trial == 3 ? -kInfinity : -9.0f;
      std::vector<int32_t> found(static_cast<size_t>(count), -1), expected = found;
      EXPECT_EQ(run.find(x.data(), count, floor, found.data()), ref.find(x.data(), count, floor, expected.data()));
      EXPECT_EQ(found, expected);

      std::vector<float> out(static_cast<size_t>(count) + 1, 7.0f), weights = out;
      const double sum = run.weigh(x.data(), count, highest.value, 1.7f, floor, out.data());
      EXPECT_NEAR(sum, ref.weigh(x.data(), count, highest.value, 1.7f, floor, weights.data()), 1e-6 * sum + 1e-30);
      for (int32_t i = 0; i < count; ++i) ASSERT_LE(std::fabs(out[i] - weights[i]), 4 * kUnit * weights[i]) << i;
      EXPECT_EQ(out[count], 7.0f);
      if (HasFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, RowKernelsOf, testing::ValuesIn(cpu_isas()), isa_name_of);

}  // namespace
}  // namespace splitfuse
