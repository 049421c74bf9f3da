// Paged attention on every instruction set that this processor has, held to the scalar reference on numbers drawn anew
// in each run, over KV blocks that hold NaN wherever nothing was written.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "kernel_ops.h"

namespace splitfuse {
namespace {

struct Shape {
  int32_t heads, kv_heads, head_dim, block_size;
  int32_t qkv() const { return (heads + 2 * kv_heads) * head_dim; }
  /// For so many positions.
  int32_t blocks(int32_t length) const { return (length + block_size - 1) / block_size; }
};

/// Rows of one sequence's qkv from position `computed` on.
struct Part {
  int32_t computed;
  Table rows;
  std::vector<int32_t> block_table;
};

/// What attention may have beside the plain.
struct Kind {
  int32_t window = 0;
  int32_t rope_dims = -1;   // -1: all
  float softcap = 0.0f;
  std::vector<float> slopes = {}, sinks = {};   // [heads] or none
  QkNorm qk_norm = QkNorm::kNone;
  NormKind norm = NormKind::kRms;
};

class Paged {
 public:
  Paged(const std::string& isa, DType dtype, KvDType kv, const Shape& shape, int32_t blocks, int threads = 1,
        const Kind& kind = {})
      : backend_(make_cpu_backend(dtype, threads, isa)), shape_(shape), blocks_(blocks), kind_(kind),
        weight_(static_cast<size_t>(shape.heads * shape.head_dim)) {
    for (size_t i = 0; i < weight_.size(); ++i) weight_[i] = 0.5f + static_cast<float>(i % 7) / 8;
    AttentionShape attention;
    attention.kv = {.layers = 1,
                    .kv_heads = shape.kv_heads,
                    .head_dim = shape.head_dim,
                    .block_size = shape.block_size,
                    .blocks = blocks,
                    .dtype = kv};
    attention.heads = shape.heads;
    attention.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
    attention.softcap = kind_.softcap;
    attention.alibi_slopes = kind_.slopes;
    attention.qk_norm_kind = kind_.norm;
    attention.qk_norm_eps = 1e-3f;
    const int32_t dims = kind_.rope_dims < 0 ? shape.head_dim : kind_.rope_dims;
    if (dims > 0) attention.ropes = {{rope_frequencies(1e4f, dims), 0.9f}};
    attention.layers = {{kind_.window, dims > 0 ? 0 : -1, kind_.qk_norm, weight_.data(), weight_.data(),
                         kind_.sinks.empty() ? nullptr : kind_.sinks.data()}};
    cache_ = Bytes(backend_->kv_block_bytes(attention.kv) * blocks);
    const StepLimits limits = {.max_rows = kMaxRows,
                               .max_seqs = kMaxRows,
                               .max_context = blocks * shape.block_size,
                               .max_logit_rows = 1,
                               .vocab = 1};
    backend_->prepare(attention, limits, cache_.data());
    spoil();
  }

  /// One step of these parts; their results, one after another.
  std::vector<Table> step(const std::vector<Part>& parts) {
    int32_t rows = 0;
    for (const Part& part : parts) rows += part.rows.rows;
    Table qkv(0, shape_.qkv());
    std::vector<RaggedSeq> seqs;
    std::vector<int32_t> positions;
    for (const Part& part : parts) {
      seqs.push_back({static_cast<int32_t>(positions.size()), part.rows.rows, part.computed, part.block_table.data()});
      for (int32_t i = 0; i < part.rows.rows; ++i) positions.push_back(part.computed + i);
      qkv.values.insert(qkv.values.end(), part.rows.values.begin(), part.rows.values.end());
    }
    qkv.rows = rows;
    const std::vector<Token> tokens(positions.size());
    Matrix in(qkv, DType::kF32);
    Matrix q(rows, shape_.heads * shape_.head_dim, backend_->dtype());
    Matrix out(rows, shape_.heads * shape_.head_dim, backend_->dtype());
    backend_->begin({tokens, positions, seqs, {}});
    backend_->rope_write_kv(in.floats(), 0, q.data());
    backend_->attention(q.data(), 0, out.poison().data());
    const Table result = out.result();
    std::vector<Table> split;
    for (const RaggedSeq& seq : seqs) split.push_back(result.take(range(seq.begin, seq.begin + seq.length)));
    return split;
  }

  /// Sequences side by side in random chunks of at most `largest` rows, over blocks in random order.
  std::vector<Table> run(const std::vector<Table>& sequences, int32_t largest, Draw& draw) {
    std::vector<int32_t> free = range(0, blocks_);
    for (int32_t i = blocks_ - 1; i > 0; --i) std::swap(free[i], free[draw.below(i + 1)]);
    std::vector<Part> parts;
    std::vector<Table> outs;
    for (const Table& rows : sequences) {
      const int32_t blocks = shape_.blocks(rows.rows);
      parts.push_back({0, {}, {free.end() - blocks, free.end()}});
      free.resize(free.size() - static_cast<size_t>(blocks));
      outs.emplace_back(0, shape_.heads * shape_.head_dim);
    }
    for (;;) {
      std::vector<Part> chunks;
      std::vector<size_t> whose;
      for (size_t i = 0; i < sequences.size(); ++i) {
        const int32_t left = sequences[i].rows - parts[i].computed;
        if (left == 0 || (draw.below(3) == 0 && !chunks.empty())) continue;
        const int32_t count = std::min(1 + draw.below(largest), left);
        forget(parts[i]);
        Part chunk = parts[i];
        chunk.rows = sequences[i].take(range(chunk.computed, chunk.computed + count));
        chunks.push_back(chunk);
        whose.push_back(i);
        parts[i].computed += count;
      }
      if (chunks.empty()) return outs;
      const std::vector<Table> results = step(chunks);
      for (size_t i = 0; i < results.size(); ++i) {
        Table& out = outs[whose[i]];
        out.values.insert(out.values.end(), results[i].values.begin(), results[i].values.end());
        out.rows += results[i].rows;
      }
    }
  }

  const Bytes& cache() const { return cache_; }

 private:
  static constexpr int32_t kMaxRows = 1536;

  /// Writes NaN to every position of every block.
  void spoil() {
    const int32_t all = blocks_ * shape_.block_size;
    for (int32_t begin = 0; begin < all; begin += kMaxRows) {
      Table rows(std::min(kMaxRows, all - begin), shape_.qkv());
      std::fill(rows.values.begin(), rows.values.end(), std::numeric_limits<float>::quiet_NaN());
      write({begin, rows, range(0, blocks_)});
    }
  }
  /// Spoils the blocks behind the part's window, and takes them from its table.
  void forget(Part& part) {
    if (kind_.window == 0) return;
    for (int32_t i = 0; i < (part.computed - kind_.window + 1) / shape_.block_size; ++i) {
      int32_t& block = part.block_table[static_cast<size_t>(i)];
      if (block < 0) continue;
      Table rows(shape_.block_size, shape_.qkv());
      std::fill(rows.values.begin(), rows.values.end(), std::numeric_limits<float>::quiet_NaN());
      write({0, rows, {block}});
      block = -1;
    }
  }
  void write(const Part& part) {
    const std::vector<RaggedSeq> seqs = {{0, part.rows.rows, part.computed, part.block_table.data()}};
    const std::vector<int32_t> positions = range(part.computed, part.computed + part.rows.rows);
    const std::vector<Token> tokens(positions.size());
    Matrix in(part.rows, DType::kF32);
    Matrix q(part.rows.rows, shape_.heads * shape_.head_dim, backend_->dtype());
    backend_->begin({tokens, positions, seqs, {}});
    backend_->rope_write_kv(in.floats(), 0, q.data());
  }

  std::unique_ptr<Backend> backend_;
  Shape shape_;
  int32_t blocks_;
  Kind kind_;
  std::vector<float> weight_;   // of norms
  Bytes cache_;
};

/// Every ratio of heads that a register tile meets differently, head sizes with and without a half-filled register,
/// block sizes that do and do not divide a tile.
const std::vector<Shape> kShapes = {{1, 1, 8, 16},  {2, 2, 24, 16}, {4, 1, 40, 48},  {5, 1, 56, 64},  {6, 1, 72, 16},
                                    {9, 3, 64, 32}, {14, 2, 8, 32}, {8, 1, 128, 16}, {16, 1, 16, 80}, {3, 3, 136, 16}};

using AttentionParam = std::tuple<std::string, DType, KvDType>;

std::string attention_name(const testing::TestParamInfo<AttentionParam>& test) {
  const auto& [isa, dtype, kv] = test.param;
  return isa + "_" + dtype_name(dtype) + "_" + kv_dtype_name(kv);
}

class AttentionKernelsOf : public testing::TestWithParam<AttentionParam> {
 protected:
  std::string isa() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
  KvDType kv() const { return std::get<2>(GetParam()); }
  Paged paged(const Shape& shape, int32_t blocks, int threads = 1, const Kind& kind = {}) const {
    return {isa(), dtype(), kv(), shape, blocks, threads, kind};
  }

  /// Values are below 2. Where pairs of bfloat16 are multiplied softmax weights are rounded too; over int8 queries and
  /// weights are rounded to 16 bits.
  float allowed(float truth) const {
    float error = 0x1p-16f * (std::fabs(truth) + 1);
    if (dtype() == DType::kBF16) error += 0x1p-7f * std::fabs(truth) + 0x1p-8f;
    if (kv() == KvDType::kInt8) error += 0x1p-11f * (std::fabs(truth) + 1);
    return error;
  }
};

TEST_P(AttentionKernelsOf, AreNearTheReference) {
  Draw draw;
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(testing::Message() << shape.heads << " " << shape.kv_heads << " " << shape.head_dim << " "
                                    << shape.block_size << ", seed " << Draw::seed());
    std::vector<Table> sequences;
    int32_t blocks = 1;
    for (const int32_t length : {1, 2 + draw.below(30), 100 + draw.below(60), shape.qkv() == 24 ? 530 : 33}) {
      sequences.push_back(draw.table(length, shape.qkv()));
      blocks += shape.blocks(length);
    }
    const std::vector<Table> outs = paged(shape, blocks).run(sequences, 90, draw);
    const std::vector<Table> refs = Paged("ref", dtype(), kv(), shape, blocks).run(sequences, 90, draw);
    for (size_t i = 0; i < outs.size(); ++i) {
      ASSERT_EQ(outs[i].values.size(), refs[i].values.size());
      for (size_t j = 0; j < refs[i].values.size(); ++j) {
        const float truth = refs[i].values[j];
        ASSERT_LE(std::fabs(outs[i].values[j] - truth), allowed(truth)) << truth << ", sequence " << i << " at " << j;
      }
    }
  }
}

TEST_P(AttentionKernelsOf, BitsDependOnTheSequenceAlone) {
  struct Case {
    Shape shape;
    std::vector<int32_t> lengths;
    std::vector<int32_t> chunks;   // of at most so many rows
  };
  Draw draw;
  SCOPED_TRACE(testing::Message() << "seed " << Draw::seed());
  // The second crosses a segment.
  for (const auto& [shape, lengths, chunks] :
       {Case{{9, 3, 16, 32}, {37, 150}, {1, 7, 64}}, Case{{2, 1, 24, 16}, {600}, {40, 333}}}) {
    std::vector<Table> sequences, expected;
    int32_t blocks = 1;
    for (const int32_t length : lengths) {
      sequences.push_back(draw.table(length, shape.qkv()));
      expected.push_back(paged(shape, shape.blocks(length)).run({sequences.back()}, 1 << 20, draw)[0]);
      blocks += shape.blocks(length);
    }
    std::vector<Table> company = sequences;
    company.push_back(draw.table(5, shape.qkv()));
    for (const int32_t largest : chunks) {
      const std::vector<Table> outs = paged(shape, blocks, largest > 7 ? 2 : 1).run(company, largest, draw);
      for (size_t i = 0; i < sequences.size(); ++i) {
        EXPECT_TRUE(outs[i].same_bits(expected[i])) << sequences[i].rows << " rows by " << largest;
      }
    }
  }
}

struct KindCase {
  Shape shape;
  Kind kind;
};

/// Each kind alone, and together.
std::vector<KindCase> kinds() {
  const std::vector<float> some = {0.3f, 0.02f, 0.1f, 0.5f, 0.004f, 0.07f};
  return {{{4, 2, 24, 16}, {.rope_dims = 12}},
          {{2, 1, 40, 32}, {.rope_dims = 20}},
          {{3, 1, 8, 16}, {.window = 1, .rope_dims = 2}},
          {{6, 2, 24, 16}, {.window = 7, .rope_dims = 0}},
          {{4, 4, 16, 32}, {.window = 100}},
          {{6, 1, 8, 16}, {.window = 301}},
          {{4, 2, 24, 16}, {.qk_norm = QkNorm::kHead}},
          {{6, 1, 40, 16}, {.qk_norm = QkNorm::kRow, .norm = NormKind::kLayer}},
          {{6, 2, 64, 16}, {.softcap = 0.7f}},
          {{6, 1, 24, 16}, {.slopes = some}},
          {{6, 3, 24, 16}, {.sinks = some}},
          {{6, 2, 80, 32}, {33, 24, 5.0f, some, some, QkNorm::kHead, NormKind::kLayer}}};
}

TEST_P(AttentionKernelsOf, OfEveryKindAreNearTheReference) {
  Draw draw;
  for (const auto& [shape, kind] : kinds()) {
    SCOPED_TRACE(testing::Message() << shape.head_dim << " " << kind.window << ", seed " << Draw::seed());
    const std::vector<Table> qkv = {draw.table(kind.window > 100 ? 700 : 150, shape.qkv())};
    const int32_t blocks = shape.blocks(qkv[0].rows) + 1;
    const Table out = paged(shape, blocks, 1, kind).run(qkv, 200, draw)[0];
    const Table ref = Paged("ref", dtype(), kv(), shape, blocks, 1, kind).run(qkv, 200, draw)[0];
    for (size_t i = 0; i < ref.values.size(); ++i) {
      ASSERT_LE(std::fabs(out.values[i] - ref.values[i]), 2 * allowed(ref.values[i])) << ref.values[i] << " at " << i;
    }
  }
}

TEST_P(AttentionKernelsOf, OfEveryKindDependOnTheSequenceAlone) {
  Draw draw;
  for (const auto& [shape, kind] : kinds()) {
    SCOPED_TRACE(testing::Message() << shape.head_dim << " " << kind.window << ", seed " << Draw::seed());
    const std::vector<Table> qkv = {draw.table(kind.window > 100 ? 700 : 150, shape.qkv())};
    const int32_t blocks = shape.blocks(qkv[0].rows);
    const Table want = paged(shape, blocks, 1, kind).run(qkv, 1 << 20, draw)[0];
    for (const int32_t largest : {3, 80}) {
      EXPECT_TRUE(paged(shape, blocks, 2, kind).run(qkv, largest, draw)[0].same_bits(want)) << largest;
    }
  }
}

TEST_P(AttentionKernelsOf, WhatIsBrokenReachesNothingBeforeIt) {
  Draw draw;
  SCOPED_TRACE(testing::Message() << "seed " << Draw::seed());
  constexpr int32_t kLength = 270;   // more than a tile
  const Shape shape = {3, 1, 24, 16};
  const int32_t blocks = shape.blocks(kLength);
  const Table qkv = draw.table(kLength, shape.qkv());
  const Table clean = paged(shape, blocks).run({qkv}, 1 << 20, draw)[0];
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float broken : {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity}) {
    const int32_t row = draw.below(kLength - 1);
    Table bad = qkv;
    for (int32_t c = 0; c < bad.columns; ++c) bad.at(row, c) = broken;
    const Table out = paged(shape, blocks).run({bad}, 1 << 20, draw)[0];
    EXPECT_TRUE(out.take(range(0, row)).same_bits(clean.take(range(0, row)))) << row;
    for (const float value : out.take(range(row, kLength)).values) ASSERT_TRUE(std::isnan(value)) << row;
  }
}

TEST_P(AttentionKernelsOf, KeysAndValuesAreThoseOfTheReference) {
  Draw draw;
  SCOPED_TRACE(testing::Message() << "seed " << Draw::seed());
  for (const Shape& shape : kShapes) {
    const int32_t blocks = 2;
    Paged run = paged(shape, blocks), ref("ref", dtype(), kv(), shape, blocks);
    const Part part = {0, draw.table(blocks * shape.block_size, shape.qkv(), std::exp2(draw.number(10.0f))),
                       range(0, blocks)};
    run.step({part});
    ref.step({part});
    EXPECT_EQ(std::memcmp(run.cache().data(), ref.cache().data(), static_cast<size_t>(run.cache().size())), 0)
        << shape.head_dim;
  }
}

INSTANTIATE_TEST_SUITE_P(All, AttentionKernelsOf,
                         testing::Combine(testing::ValuesIn(cpu_isas()), testing::Values(DType::kF32, DType::kBF16),
                                          testing::Values(KvDType::kAuto, KvDType::kInt8)),
                         attention_name);

}  // namespace
}  // namespace splitfuse
