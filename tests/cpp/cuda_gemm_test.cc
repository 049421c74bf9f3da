// What the CUDA matrix multiplication decides and prepares on the host. No GPU is needed.
#include <gtest/gtest.h>

#include <set>
#include <utility>
#include <vector>

#include "base/numeric.h"
#include "cuda/gemm/convert.h"
#include "cuda/gemm/layout.h"
#include "cuda/gemm/tile_rules.h"

namespace splitfuse::cuda {
namespace {

TEST(CudaTiles, EveryTileIsBegunOnce) {
  for (const auto& [weight_tiles, row_tiles] : {std::pair{1, 1}, {5, 3}, {3, 16}, {7, 17}, {2, 50}}) {
    const TileGrid grid{weight_tiles, row_tiles};
    std::set<std::pair<int32_t, int32_t>> seen;
    for (int32_t i = 0; i < grid.count(); ++i) {
      const TileGrid::Place place = grid.place(i);
      EXPECT_TRUE(0 <= place.weight_tile && place.weight_tile < weight_tiles);
      EXPECT_TRUE(0 <= place.row_tile && place.row_tile < row_tiles);
      seen.insert({place.weight_tile, place.row_tile});
    }
    EXPECT_EQ(static_cast<int32_t>(seen.size()), grid.count());
  }
}

TEST(CudaTiles, PartsOfDepthLieEndToEnd) {
  for (int32_t depth : {1, 64, 65, 576, 1536, 4096, 14336}) {
    for (int32_t weight_rows : {8, 576, 1024, 4096, 128256}) {
      const int32_t splits = depth_splits(weight_rows, depth);
      EXPECT_TRUE(splits == 1 || splits == 2 || splits == 4 || splits == 8);
      int32_t end = 0;
      for (int32_t split = 0; split < splits; ++split) {
        const DepthRange range = depth_range(depth, splits, split);
        EXPECT_EQ(range.begin, end);
        EXPECT_GE(range.end - range.begin, splits == 1 ? 1 : 4);
        end = range.end;
      }
      EXPECT_EQ(end, tiles_over(depth, kDepthStep));
    }
  }
  EXPECT_EQ(depth_splits(4096, 14336), 1);
  EXPECT_EQ(depth_splits(2048, 8192), 2);
  EXPECT_EQ(depth_splits(64, 14336), 8);
}

template <int kCount>
void expect_tiles_that_hold(const TileShape (&tiles)[kCount]) {
  for (int32_t rows = 1; rows <= 64; ++rows) {
    const int tile = choose_tile(tiles, 4096, rows, 1, 132);
    EXPECT_GE(tiles[tile].rows, rows);
    EXPECT_TRUE(tile == 0 || tiles[tile - 1].rows < rows) << rows << " rows fit a smaller tile";
  }
  EXPECT_EQ(choose_tile(tiles, 14336, 8192, 1, 132), kCount - 1) << "of much work the largest is best";
  EXPECT_LT(choose_tile(tiles, 1024, 128, 1, 132), kCount - 1) << "a few large tiles leave most of a device idle";
}

TEST(CudaTiles, FollowTheNumberOfRows) {
  expect_tiles_that_hold(kTilesSm80);
  expect_tiles_that_hold(kTilesSm90a);
}

TEST(CudaLayout, GateAndUpAlternateByEight) {
  LinearShape shape;
  shape.n = 20;
  shape.k = 13;
  shape.bias = true;
  const DenseLayout plain(shape);
  EXPECT_EQ(plain.rows(), 20);
  EXPECT_EQ(plain.stride(), 16);
  EXPECT_EQ(plain.place(Rows::kPlain, 19), 19);
  EXPECT_EQ(plain.run(3, 17), 17);
  EXPECT_EQ(plain.bias_offset(), 640);
  EXPECT_EQ(plain.bytes(), 768);

  shape.gated = true;
  const DenseLayout gated(shape);
  EXPECT_EQ(gated.rows(), 48);
  std::set<int32_t> places;
  for (int32_t row = 0; row < shape.n; ++row) {
    EXPECT_EQ(gated.place(Rows::kUp, row), gated.place(Rows::kGate, row) + 8);
    places.insert({gated.place(Rows::kGate, row), gated.place(Rows::kUp, row)});
  }
  EXPECT_EQ(places.size(), 40u);
  EXPECT_EQ(gated.place(Rows::kGate, 9), 17);
  EXPECT_EQ(gated.run(5, 15), 3);
  EXPECT_EQ(gated.run(8, 12), 8);
  EXPECT_EQ(gated.run(16, 4), 4);
}

std::vector<uint16_t> converted(const TensorView& matrix, int64_t first, int64_t count, DType to, int64_t stride) {
  std::vector<uint16_t> out(static_cast<size_t>(count * stride), 0xffff);
  convert_rows(matrix, first, count, to, stride, reinterpret_cast<std::byte*>(out.data()));
  return out;
}

TEST(CudaConvert, RowsBecomeSixteenBitsFollowedByZeros) {
  const std::vector<float> floats = {1.0f, -2.5f, 3.0f, 0.1f, 65504.0f, -0.0f};
  const TensorView matrix{DType::kF32, {2, 3}, floats.data()};
  const std::vector<uint16_t> bf16 = converted(matrix, 0, 2, DType::kBF16, 4);
  const std::vector<uint16_t> f16 = converted(matrix, 1, 1, DType::kF16, 4);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(bf16[i], float_to_bf16(floats[i]));
    EXPECT_EQ(bf16[4 + i], float_to_bf16(floats[3 + i]));
    EXPECT_EQ(f16[i], float_to_f16(floats[3 + i]));
  }
  EXPECT_EQ(bf16[3], 0);
  EXPECT_EQ(bf16[7], 0);
  EXPECT_EQ(f16[3], 0);

  const std::vector<uint16_t> bits = {1, 2, 3, 4, 5, 6};
  const TensorView same{DType::kBF16, {2, 3}, bits.data()};
  EXPECT_EQ(converted(same, 1, 1, DType::kBF16, 4), (std::vector<uint16_t>{4, 5, 6, 0}));
}

TEST(CudaConvert, WhatFloat16CannotHoldIsRefused) {
  const std::vector<float> floats = {1.0f, 70000.0f};
  const TensorView matrix{DType::kF32, {1, 2}, floats.data()};
  EXPECT_THROW(converted(matrix, 0, 1, DType::kF16, 8), CheckpointError);
  EXPECT_NO_THROW(converted(matrix, 0, 1, DType::kBF16, 8));
}

TEST(CudaConvert, VectorsBecomeFloats) {
  const std::vector<uint16_t> bits = {float_to_f16(0.5f), float_to_f16(-3.0f), float_to_f16(8.0f)};
  std::vector<float> out(2);
  convert_floats(TensorView{DType::kF16, {3}, bits.data()}, 1, out);
  EXPECT_EQ(out, (std::vector<float>{-3.0f, 8.0f}));
}

}  // namespace
}  // namespace splitfuse::cuda
