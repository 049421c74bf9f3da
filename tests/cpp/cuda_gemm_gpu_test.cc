// The CUDA linear layers on a real device: near the truth, and every row's bits its own. Needs a GPU.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "base/numeric.h"
#include "cuda/device/check.h"
#include "cuda/device/memory.h"
#include "cuda/device/stream.h"
#include "cuda/gemm/linears.h"

namespace splitfuse::cuda {
namespace {

struct Shape {
  int32_t n, k;
  bool gated, bias;
};

std::vector<float> random_floats(int64_t count, float scale) {
  static std::mt19937 random(static_cast<unsigned>(testing::UnitTest::GetInstance()->random_seed()));
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

float narrowed(float value, DType dtype) {
  return dtype == DType::kBF16 ? bf16_to_float(float_to_bf16(value)) : f16_to_float(float_to_f16(value));
}

template <class T>
void to_device(const std::vector<T>& from, const Memory& to) {
  SPLITFUSE_CUDA_CALL(cudaMemcpy(to.data(), from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
}
template <class T>
std::vector<T> from_device(const Memory& from, int64_t count) {
  std::vector<T> to(static_cast<size_t>(count));
  SPLITFUSE_CUDA_CALL(cudaMemcpy(to.data(), from.data(), to.size() * sizeof(T), cudaMemcpyDeviceToHost));
  return to;
}

/// A linear layer of random weights, and as many random rows as are asked for.
class Layer {
 public:
  Layer(const Shape& shape, DType dtype, int32_t rows)
      : device_(choose_device()), linears_(dtype, device_, stream_.get()), dtype_(dtype) {
    weights_ = random_floats(parts(shape) * shape.n * shape.k, 0.1f);
    biases_ = random_floats(parts(shape) * shape.n, 1.0f);
    in_ = random_floats(int64_t{rows} * shape.k, 1.0f);
    linear_.n = shape.n;
    linear_.k = shape.k;
    linear_.gated = shape.gated;
    linear_.bias = shape.bias;
    memory_ = Memory(linears_.bytes(linear_));
    linear_.data = memory_.data();
    for (int part = 0; part < parts(shape); ++part) fill(part);
    std::vector<uint16_t> bits(static_cast<size_t>(rows * row_stride(shape.k)));
    for (int32_t r = 0; r < rows; ++r) {
      for (int32_t k = 0; k < shape.k; ++k) {
        const float value = in_[at(r, shape.k, k)];
        bits[at(r, row_stride(shape.k), k)] = dtype == DType::kBF16 ? float_to_bf16(value) : float_to_f16(value);
      }
    }
    device_in_ = Memory(static_cast<int64_t>(bits.size()) * 2);
    to_device(bits, device_in_);
  }

  /// What the first `rows` rows give, columns and what lies behind them.
  template <class T>
  std::vector<T> run(int32_t rows, GemmEpilogue epilogue, GemmActivation activation) {
    const int64_t count = rows * row_stride(linear_.n);
    const Memory out(count * static_cast<int64_t>(sizeof(T)));
    linears_.multiply(linear_, device_in_.data(), rows, epilogue, activation, out.data());
    stream_.synchronize();
    return from_device<T>(out, count);
  }

  /// Fills a row of the input with NaN.
  void spoil(int32_t row) {
    const std::vector<uint16_t> nan(static_cast<size_t>(linear_.k), 0x7fff);
    const int64_t offset = row * row_stride(linear_.k) * 2;
    SPLITFUSE_CUDA_CALL(cudaMemcpy(device_in_.data() + offset, nan.data(), nan.size() * 2, cudaMemcpyHostToDevice));
  }

  /// The exact sum and bias of one output.
  double sum(int part, int32_t row, int32_t column) const {
    double total = linear_.bias ? biases_[at(part, linear_.n, column)] : 0.0;
    for (int32_t k = 0; k < linear_.k; ++k) {
      total += double{narrowed(weights_[at(part * linear_.n + column, linear_.k, k)], dtype_)} *
               narrowed(in_[at(row, linear_.k, k)], dtype_);
    }
    return total;
  }

 private:
  static int64_t parts(const Shape& shape) { return shape.gated ? 2 : 1; }
  static size_t at(int64_t row, int64_t stride, int64_t column) { return static_cast<size_t>(row * stride + column); }

  /// In two pieces that meet in the middle of a group.
  void fill(int part) {
    const Rows which = !linear_.gated ? Rows::kPlain : part == 0 ? Rows::kGate : Rows::kUp;
    const int32_t cut = linear_.n / 2 + 1;
    for (const auto& [first, past] : {std::pair{0, cut}, {cut, linear_.n}}) {
      const TensorView rows{
          DType::kF32, {past - first, linear_.k}, &weights_[at(part * linear_.n + first, linear_.k, 0)]};
      linears_.pack(linear_, which, first, rows);
      const TensorView bias{DType::kF32, {past - first}, &biases_[at(part, linear_.n, first)]};
      if (linear_.bias) linears_.pack_bias(linear_, which, first, bias);
    }
  }

  Device device_;
  Stream stream_;
  CudaLinears linears_;
  DType dtype_;
  std::vector<float> weights_, biases_, in_;
  Linear linear_;
  Memory memory_, device_in_;
};

constexpr Shape kShapes[] = {
    {5, 8, false, false},      {70, 100, false, true},  {33, 520, true, true},     {1024, 1024, false, true},
    {576, 1536, false, false}, {1536, 576, true, true}, {4096, 4096, false, true}, {14336, 256, true, false},
};

TEST(CudaGemm, IsNearTheTruth) {
  for (const Shape& shape : kShapes) {
    for (DType dtype : {DType::kBF16, DType::kF16}) {
      for (int32_t rows : {1, 7, 30, 64, 200, 700}) {
        Layer layer(shape, dtype, rows);
        const auto activation = shape.gated ? GemmActivation::kSilu : GemmActivation::kNone;
        const auto epilogue = shape.gated ? GemmEpilogue::kActivate : GemmEpilogue::kStore;
        std::vector<float> floats;
        std::vector<uint16_t> bits;
        shape.gated ? void(bits = layer.run<uint16_t>(rows, epilogue, activation))
                    : void(floats = layer.run<float>(rows, epilogue, activation));
        std::mt19937 random(1);
        for (int i = 0; i < 300; ++i) {
          const auto row = static_cast<int32_t>(random() % static_cast<unsigned>(rows));
          const auto column = static_cast<int32_t>(random() % static_cast<unsigned>(shape.n));
          const auto place = static_cast<size_t>(row * row_stride(shape.n) + column);
          const double sum = layer.sum(0, row, column);
          if (!shape.gated) {
            EXPECT_NEAR(floats[place], sum, 1e-3 * (1 + std::abs(sum)));
            continue;
          }
          const double want = sum / (1 + std::exp(-sum)) * layer.sum(1, row, column);
          const float got = dtype == DType::kBF16 ? bf16_to_float(bits[place]) : f16_to_float(bits[place]);
          EXPECT_NEAR(got, want, 1e-2 * (1 + std::abs(want)));
        }
      }
    }
  }
}

// The tile follows the number of rows. That instructions for more or fewer of them add up alike is an assumption about
// the hardware: it stands and falls with this test.
TEST(CudaGemm, ARowsBitsDoNotDependOnTheNumberOfRows) {
  for (const Shape& shape : kShapes) {
    for (DType dtype : {DType::kBF16, DType::kF16}) {
      constexpr int32_t kMost = 2100;
      Layer layer(shape, dtype, kMost);
      const auto run = [&](int32_t rows) {
        return shape.gated ? std::vector<float>{} : layer.run<float>(rows, GemmEpilogue::kStore, GemmActivation::kNone);
      };
      const auto run_gated = [&](int32_t rows) {
        return shape.gated ? layer.run<uint16_t>(rows, GemmEpilogue::kActivate, GemmActivation::kSilu)
                           : std::vector<uint16_t>{};
      };
      const std::vector<float> all = run(kMost);
      const std::vector<uint16_t> all_gated = run_gated(kMost);
      for (int32_t rows : {1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 300, 512, 1000, 2047}) {
        const std::vector<float> some = run(rows);
        EXPECT_TRUE(std::equal(some.begin(), some.end(), all.begin())) << shape.n << " x " << shape.k << ", " << rows;
        const std::vector<uint16_t> some_gated = run_gated(rows);
        EXPECT_TRUE(std::equal(some_gated.begin(), some_gated.end(), all_gated.begin()))
            << shape.n << " x " << shape.k << ", " << rows;
      }
    }
  }
}

TEST(CudaGemm, ARowOfNanHarmsNoOther) {
  constexpr int32_t kRows = 40;
  constexpr int32_t kSpoilt = 3;
  Layer layer({70, 100, false, true}, DType::kBF16, kRows);
  const int64_t stride = row_stride(70);
  const std::vector<float> before = layer.run<float>(kRows, GemmEpilogue::kStore, GemmActivation::kNone);
  layer.spoil(kSpoilt);
  const std::vector<float> after = layer.run<float>(kRows, GemmEpilogue::kStore, GemmActivation::kNone);
  for (int64_t i = 0; i < kRows * stride; ++i) {
    const auto place = static_cast<size_t>(i);
    if (i % stride >= 70) {
      EXPECT_EQ(after[place], 0.0f) << "behind the columns";
    } else if (i / stride == kSpoilt) {
      EXPECT_TRUE(std::isnan(after[place]));
    } else {
      EXPECT_EQ(after[place], before[place]);
    }
  }
}

TEST(CudaGemm, AddsToWhatIsThere) {
  Layer layer({1024, 1024, false, true}, DType::kBF16, 100);
  const std::vector<float> once = layer.run<float>(100, GemmEpilogue::kStore, GemmActivation::kNone);
  EXPECT_EQ(layer.run<float>(100, GemmEpilogue::kAdd, GemmActivation::kNone), once) << "added to zeros";
}

}  // namespace
}  // namespace splitfuse::cuda
