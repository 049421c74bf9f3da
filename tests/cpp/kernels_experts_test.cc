// Mixtures of experts on every instruction set that this processor has: held to the single linear layers that they are
// made of, bit for bit, on numbers drawn anew in each run.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/routing.h"
#include "kernel_ops.h"

namespace splitfuse {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// ---- Routing

std::vector<ExpertChoice> choose(const Routing& routing, const std::vector<float>& logits) {
  const Bytes scratch(routing_scratch_bytes(routing.experts));
  std::vector<ExpertChoice> choices(static_cast<size_t>(experts_of_row(routing)));
  choose_experts(routing, logits.data(), scratch.data(), choices.data());
  return choices;
}

Routing routing_of(int32_t experts, int32_t top_k, Scoring scoring) {
  Routing routing;
  routing.experts = experts;
  routing.top_k = top_k;
  routing.scoring = scoring;
  return routing;
}

TEST(Routing, TakesTheLargestAndWeighsThemAsTheirScoringHasIt) {
  const std::vector<float> logits = {1.0f, -2.0f, 3.0f, 0.5f};
  double all = 0;
  for (const float logit : logits) all += std::exp(logit);
  Routing routing = routing_of(4, 2, Scoring::kSoftmax);
  std::vector<ExpertChoice> choices = choose(routing, logits);
  EXPECT_EQ(choices[0].expert, 0);
  EXPECT_EQ(choices[1].expert, 2);
  EXPECT_NEAR(choices[0].weight, std::exp(1.0) / all, 1e-6);
  EXPECT_NEAR(choices[1].weight, std::exp(3.0) / all, 1e-6);
  const double first = std::exp(1.0) / (std::exp(1.0) + std::exp(3.0));
  EXPECT_NEAR(choose(routing_of(4, 2, Scoring::kTopSoftmax), logits)[0].weight, first, 1e-6);
  routing.normalize = true;
  routing.scale = 2.5f;
  EXPECT_NEAR(choose(routing, logits)[0].weight, 2.5 * first, 1e-6);
  EXPECT_NEAR(choose(routing_of(4, 1, Scoring::kSigmoid), logits)[0].weight, 1 / (1 + std::exp(-3.0)), 1e-6);
}

TEST(Routing, KeepsToTheBestGroups) {
  const std::vector<float> logits = {3.0f, -9.0f, 2.0f, 2.5f, 0.0f, 1.0f};
  Routing routing = routing_of(6, 2, Scoring::kSigmoid);
  routing.groups = 3;
  std::vector<ExpertChoice> choices = choose(routing, logits);   // the group with the best expert
  EXPECT_EQ(choices[0].expert, 0);
  EXPECT_EQ(choices[1].expert, 1);
  const std::vector<float> correction(6, -1.0f);
  routing.correction = correction.data();
  choices = choose(routing, logits);   // the group with the best two
  EXPECT_EQ(choices[0].expert, 2);
  EXPECT_EQ(choices[1].expert, 3);
  EXPECT_NEAR(choices[0].weight, 1 / (1 + std::exp(-2.0)), 1e-6);
}

TEST(Routing, AnythingChoosesExpertsThatThereAreAndNotANumberIsTheLargest) {
  Draw draw;
  const float odd[] = {kNaN, std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(), 0.0f};
  for (int trial = 0; trial < 2000; ++trial) {
    SCOPED_TRACE(testing::Message() << "seed " << Draw::seed());
    Routing routing = routing_of(8 * (1 + draw.below(20)), 1 + draw.below(8), static_cast<Scoring>(draw.below(3)));
    routing.groups = 1 << draw.below(4);
    routing.top_groups = routing.groups;
    routing.normalize = draw.below(2) == 1;
    std::vector<float> logits;
    for (int32_t e = 0; e < routing.experts; ++e) logits.push_back(draw.below(3) ? draw.number() : odd[draw.below(4)]);
    const std::vector<ExpertChoice> choices = choose(routing, logits);
    for (size_t i = 0; i < choices.size(); ++i) {
      ASSERT_LT(i == 0 ? -1 : choices[i - 1].expert, choices[i].expert);
      ASSERT_LT(choices[i].expert, routing.experts);
    }
    const auto broken = [](const auto& value) { return std::isnan(value); };
    if (std::ranges::none_of(logits, broken)) continue;
    EXPECT_TRUE(std::ranges::any_of(choices, broken, &ExpertChoice::weight)) << "a NaN was not chosen";
  }
}

// ---- The whole of it

using Param = std::tuple<std::string, DType, WeightFormat>;

std::string param_name(const testing::TestParamInfo<Param>& test) {
  const auto& [isa, dtype, format] = test.param;
  return isa + "_" + dtype_name(dtype) + "_" + weight_format_name(format);
}

struct Sizes {
  int32_t hidden = 37;
  int32_t intermediate = 19;
  int32_t shared = 45;
  int32_t experts = 6;
  int32_t top_k = 2;
  int32_t max_rows = 150;
};

/// A mixture with random weights, in a backend of its own.
class Mixture {
 public:
  Mixture(const Param& param, int threads, uint32_t seed)
      : backend_(make_cpu_backend(std::get<1>(param), threads, std::get<0>(param))), random_(seed) {
    const int32_t all = size_.experts + 1;
    experts_.routing = routing_of(size_.experts, size_.top_k, Scoring::kSoftmax);
    experts_.routing.shared = experts_.routing.shared_gate = true;
    experts_.router = pack({all, size_.hidden, true});
    for (int32_t e = 0; e < all; ++e) {
      const int32_t width = e < size_.experts ? size_.intermediate : size_.shared;
      experts_.in.push_back(pack({width, size_.hidden, true, true, std::get<2>(param), Activation::kSilu}));
      experts_.out.push_back(pack({size_.hidden, width, true, false, std::get<2>(param)}));
    }
    prepare();
  }

  Table run(const Table& x) {
    Matrix in(x, backend_->dtype());
    Matrix out(x.rows, size_.hidden, DType::kF32);
    backend_->experts(experts_, in.data(), x.rows, out.poison().floats());
    return out.result();
  }

  /// The same, one row and one expert at a time.
  Table run_singly(const Table& x) {
    Table result(x.rows, size_.hidden);
    for (int32_t r = 0; r < x.rows; ++r) {
      Matrix in(x.take({r}), backend_->dtype());
      Matrix logits(1, experts_.router.n, DType::kF32);
      backend_->linear(experts_.router, in.data(), 1, logits.floats());
      const float* row = logits.floats();
      bool first = true;
      for (const ExpertChoice& choice : choose(experts_.routing, {row, row + experts_.router.n})) {
        const Linear& up = experts_.in[static_cast<size_t>(choice.expert)];
        Matrix inner(1, up.n, backend_->dtype());
        Matrix y(1, size_.hidden, DType::kF32);
        backend_->linear_act(up, in.data(), 1, inner.data());
        backend_->linear(experts_.out[static_cast<size_t>(choice.expert)], inner.data(), 1, y.floats());
        for (int32_t c = 0; c < size_.hidden; ++c) {
          const float part = choice.weight * y.floats()[c];
          result.at(r, c) = first ? part : result.at(r, c) + part;
        }
        first = false;
      }
    }
    return result;
  }

  const Sizes& size() const { return size_; }

 private:
  Table random(int32_t rows, int32_t columns) {
    Table table(rows, columns);
    for (float& value : table.values) value = static_cast<float>(random_() >> 8) * 0x1p-23f - 1.0f;
    return table;
  }

  Linear pack(const LinearShape& shape) {
    memory_.emplace_back(backend_->linear_bytes(shape));
    const Linear linear = {shape, memory_.back().data()};
    const std::vector<Rows> parts = shape.gated ? std::vector{Rows::kGate, Rows::kUp} : std::vector{Rows::kPlain};
    for (const Rows which : parts) {
      backend_->pack(linear, which, 0, view(random(shape.n, shape.k)));
      backend_->pack_bias(linear, which, 0, vector_view(random(1, shape.n)));
    }
    return linear;
  }

  void prepare() {
    AttentionShape shape;
    shape.kv = {.layers = 1, .kv_heads = 1, .head_dim = 8, .block_size = 16, .blocks = 1};
    shape.heads = 1;
    shape.layers.resize(1);
    memory_.emplace_back(backend_->kv_block_bytes(shape.kv));
    const StepLimits limits = {.max_rows = size_.max_rows,
                               .max_seqs = 1,
                               .max_context = 16,
                               .max_logit_rows = 1,
                               .vocab = 1,
                               .integer_depth = 45,
                               .experts = size_.experts + 1,
                               .experts_per_row = size_.top_k + 1,
                               .expert_hidden = size_.hidden,
                               .expert_intermediate = size_.shared};
    backend_->prepare(shape, limits, memory_.back().data());
  }

  Sizes size_;
  std::unique_ptr<Backend> backend_;
  std::mt19937 random_;
  std::vector<Bytes> memory_;
  Experts experts_;
};

class ExpertKernels : public testing::TestWithParam<Param> {};

TEST_P(ExpertKernels, AreBitForBitTheirLinearLayersInAnyCompany) {
  Draw draw;
  SCOPED_TRACE(testing::Message() << "seed " << Draw::seed());
  Mixture one(GetParam(), 1, Draw::seed());
  const Table x = draw.table(one.size().max_rows, one.size().hidden, 1.0f);
  const Table expected = one.run_singly(x);
  Mixture three(GetParam(), 3, Draw::seed());
  for (Mixture* mixture : {&one, &three}) {
    EXPECT_TRUE(mixture->run(x).same_bits(expected));
    const std::vector<int32_t> alike(100, 7);   // most experts have no row
    EXPECT_TRUE(mixture->run(x.take(alike)).same_bits(expected.take(alike)));
    for (const int32_t count : {1, 2, 5, 17}) {
      const std::vector<int32_t> rows = range(draw.below(100), 150);
      const std::vector<int32_t> few(rows.begin(), rows.begin() + count);
      EXPECT_TRUE(mixture->run(x.take(few)).same_bits(expected.take(few))) << count;
    }
  }
}

TEST_P(ExpertKernels, NotANumberStaysInItsRow) {
  Draw draw;
  SCOPED_TRACE(testing::Message() << "seed " << Draw::seed());
  Mixture mixture(GetParam(), 2, Draw::seed());
  Table x = draw.table(30, mixture.size().hidden, 1.0f);
  Table expected = mixture.run(x);
  const int32_t row = draw.below(30);
  x.at(row, draw.below(mixture.size().hidden)) = kNaN;
  const Table out = mixture.run(x);
  for (int32_t r = 0; r < 30; ++r) {
    if (r != row) EXPECT_TRUE(out.take({r}).same_bits(expected.take({r}))) << r;
  }
  for (int32_t c = 0; c < out.columns; ++c) EXPECT_TRUE(std::isnan(out.at(row, c)));
}

INSTANTIATE_TEST_SUITE_P(All, ExpertKernels,
                         testing::Combine(testing::ValuesIn(cpu_isas()), testing::Values(DType::kF32, DType::kBF16),
                                          testing::Values(WeightFormat::kDense, WeightFormat::kInt8,
                                                          WeightFormat::kInt4)),
                         param_name);

}  // namespace
}  // namespace splitfuse
