// The operations of a CPU backend on plain tables of floats, for tests that hold one instruction set to another.
// Outputs are full of NaN before; what lies beyond their columns must be untouched after.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "base/numeric.h"
#include "splitfuse/splitfuse.h"

namespace splitfuse {

/// Rows of floats, one after another.
struct Table {
  Table() = default;
  Table(int32_t row_count, int32_t column_count)
      : rows(row_count), columns(column_count), values(static_cast<size_t>(row_count) * column_count) {}

  float& at(int32_t r, int32_t c) { return values[static_cast<size_t>(r) * columns + c]; }
  float at(int32_t r, int32_t c) const { return values[static_cast<size_t>(r) * columns + c]; }
  /// Rows `chosen`, closed up.
  Table take(const std::vector<int32_t>& chosen) const {
    Table result(static_cast<int32_t>(chosen.size()), columns);
    for (int32_t r = 0; r < result.rows; ++r) {
      for (int32_t c = 0; c < columns; ++c) result.at(r, c) = at(chosen[r], c);
    }
    return result;
  }
  bool same_bits(const Table& other) const {
    return rows == other.rows && columns == other.columns &&
           std::memcmp(values.data(), other.values.data(), values.size() * sizeof(float)) == 0;
  }

  int32_t rows = 0;
  int32_t columns = 0;
  std::vector<float> values;
};

/// Rows [begin, end).
inline std::vector<int32_t> range(int32_t begin, int32_t end) {
  std::vector<int32_t> result(static_cast<size_t>(end - begin));
  std::iota(result.begin(), result.end(), begin);
  return result;
}

/// Fresh numbers in every run; --gtest_random_seed=N repeats the run that printed N.
class Draw {
 public:
  Draw() : random_(seed()) {}
  static uint32_t seed() {
    static const uint32_t value = [] {
      const auto asked = static_cast<uint32_t>(GTEST_FLAG_GET(random_seed));
      return asked != 0 ? asked : std::random_device()() % 99999 + 1;
    }();
    return value;
  }
  /// A whole number in [0, end).
  int32_t below(int32_t end) { return static_cast<int32_t>(random_() % static_cast<uint32_t>(end)); }
  /// Uniform in [-size, size).
  float number(float size = 2.0f) { return size * (static_cast<float>(random_() >> 8) * 0x1p-23f - 1.0f); }
  Table table(int32_t rows, int32_t columns, float size = 2.0f) {
    Table result(rows, columns);
    for (float& value : result.values) value = number(size);
    return result;
  }

 private:
  std::mt19937 random_;
};

/// Zeroed memory of its own, so that the address sanitizer sees who reads or writes beyond it.
class Bytes {
 public:
  Bytes() = default;
  explicit Bytes(int64_t size) : size_(size), data_(static_cast<std::byte*>(std::aligned_alloc(64, round(size)))) {
    std::memset(data_.get(), 0, round(size));
  }
  std::byte* data() const { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  static size_t round(int64_t size) { return static_cast<size_t>(size + 63) / 64 * 64; }
  struct Free {
    void operator()(std::byte* data) const { std::free(data); }
  };
  int64_t size_ = 0;
  std::unique_ptr<std::byte, Free> data_;
};

/// Rows of row_stride(columns) elements, zero at first.
class Matrix {
 public:
  Matrix(int32_t rows, int32_t columns, DType dtype)
      : rows_(rows), columns_(columns), dtype_(dtype), stride_(row_stride(columns) * dtype_size(dtype)),
        bytes_(rows * stride_) {}
  Matrix(const Table& table, DType dtype) : Matrix(table.rows, table.columns, dtype) { fill(table); }
  int32_t rows() const { return rows_; }
  void* data() { return bytes_.data(); }
  float* floats() { return reinterpret_cast<float*>(bytes_.data()); }

  Matrix& poison() {
    std::memset(bytes_.data(), 0xff, static_cast<size_t>(bytes_.size()));
    return *this;
  }
  Matrix& fill(const Table& table) {
    for (int32_t r = 0; r < rows_; ++r) {
      for (int32_t c = 0; c < columns_; ++c) {
        if (dtype_ == DType::kF32) {
          reinterpret_cast<float*>(row(r))[c] = table.at(r, c);
        } else {
          reinterpret_cast<uint16_t*>(row(r))[c] = float_to_bf16(table.at(r, c));
        }
      }
    }
    return *this;
  }
  /// The columns, once the poison beyond them was found whole.
  Table result() {
    Table table(rows_, columns_);
    for (int32_t r = 0; r < rows_; ++r) {
      for (int64_t i = columns_ * dtype_size(dtype_); i < stride_; ++i) {
        EXPECT_EQ(row(r)[i], std::byte{0xff}) << "written beyond column " << columns_ << " of row " << r;
      }
      for (int32_t c = 0; c < columns_; ++c) {
        table.at(r, c) = dtype_ == DType::kF32 ? reinterpret_cast<const float*>(row(r))[c]
                                               : bf16_to_float(reinterpret_cast<const uint16_t*>(row(r))[c]);
      }
    }
    return table;
  }

 private:
  std::byte* row(int32_t r) { return bytes_.data() + r * stride_; }

  int32_t rows_;
  int32_t columns_;
  DType dtype_;
  int64_t stride_;   // bytes
  Bytes bytes_;
};

inline TensorView view(const Table& table) { return {DType::kF32, {table.rows, table.columns}, table.values.data()}; }
/// A table of one row, as a vector.
inline TensorView vector_view(const Table& table) { return {DType::kF32, {table.columns}, table.values.data()}; }

/// Linear layers and norms of one instruction set.
class Ops {
 public:
  Ops(const std::string& isa, DType dtype, WeightFormat format = WeightFormat::kDense, int threads = 1)
      : backend_(make_cpu_backend(dtype, threads, isa)), format_(format) {
    shape_.kv = {.layers = 1, .kv_heads = 1, .head_dim = 8, .block_size = 16, .blocks = 1};
    shape_.heads = 1;
    shape_.ropes = {{std::vector<float>(4), 1.0f}};
    shape_.layers.resize(1);
    cache_ = Bytes(backend_->kv_block_bytes(shape_.kv));
    const StepLimits limits = {.max_rows = kMaxRows,
                               .max_seqs = 1,
                               .max_context = 16,
                               .max_logit_rows = 1,
                               .vocab = 1,
                               .integer_depth = kMaxDepth};
    backend_->prepare(shape_, limits, cache_.data());
  }

  /// x [rows, k] w^T + bias [1, n], w [n, k].
  Table linear(const Table& w, const Table& bias, const Table& x) {
    Matrix in(x, backend_->dtype());
    Packed packed(*backend_, format_, w, bias);
    Matrix out(x.rows, w.rows, DType::kF32);
    backend_->linear(packed.linear, in.data(), x.rows, out.poison().floats());
    return out.result();
  }
  Table linear_add(const Table& w, const Table& bias, const Table& x, const Table& to) {
    Matrix in(x, backend_->dtype());
    Packed packed(*backend_, format_, w, bias);
    Matrix out(x.rows, w.rows, DType::kF32);
    backend_->linear_add(packed.linear, in.data(), x.rows, out.poison().fill(to).floats());
    return out.result();
  }
  /// act(x w^T + bias)
  Table linear_act(const Table& w, const Table& bias, const Table& x, Activation activation) {
    return act(Packed(*backend_, format_, w, bias, activation), x);
  }
  /// act(x g^T + bias) * (x u^T + bias)
  Table linear_gated(const Table& g, const Table& u, const Table& bias, const Table& x,
                     Activation activation = Activation::kSilu) {
    return act(Packed(*backend_, format_, g, u, bias, activation), x);
  }
  /// scale * rows `ids` of w.
  Table embed(const Table& w, const std::vector<Token>& ids, float scale = 1.0f) {
    Packed packed(*backend_, format_, w, {});
    begin(ids);
    Matrix out(static_cast<int32_t>(ids.size()), w.columns, DType::kF32);
    backend_->embed(packed.linear, scale, out.poison().floats());
    return out.result();
  }
  /// x + rows offset + positions of w.
  Table embed_positions(const Table& w, const std::vector<int32_t>& positions, int32_t offset, const Table& x) {
    Packed packed(*backend_, format_, w, {});
    begin(std::vector<Token>(positions.size()), positions);
    Matrix out(x.rows, x.columns, DType::kF32);
    backend_->embed_positions(packed.linear, offset, out.poison().fill(x).floats());
    return out.result();
  }
  /// `weight` and `bias` [1, columns] or empty.
  Table norm(const Table& x, const Table& weight, const Table& bias = {}, NormKind kind = NormKind::kRms) {
    Matrix in(x, DType::kF32), w(weight, DType::kF32), b(bias, DType::kF32);
    begin(std::vector<Token>(static_cast<size_t>(x.rows)));
    Matrix out(x.rows, x.columns, backend_->dtype());
    backend_->norm(norm_of(x.columns, w, b, kind), in.floats(), {}, out.poison().data());
    return out.result();
  }
  Table norm_in_place(const Table& x, const Table& weight, const Table& bias, NormKind kind) {
    Matrix w(weight, DType::kF32), b(bias, DType::kF32);
    begin(std::vector<Token>(static_cast<size_t>(x.rows)));
    Matrix out(x.rows, x.columns, DType::kF32);
    backend_->norm_in_place(norm_of(x.columns, w, b, kind), out.poison().fill(x).floats());
    return out.result();
  }
  /// x + scale * norm(y)
  Table add(const Table& x, const Table& y, float scale, const Table& weight, const Table& bias, NormKind kind) {
    Matrix in(y, DType::kF32), w(weight, DType::kF32), b(bias, DType::kF32);
    begin(std::vector<Token>(static_cast<size_t>(x.rows)));
    Matrix out(x.rows, x.columns, DType::kF32);
    backend_->add(norm_of(x.columns, w, b, kind), in.floats(), scale, out.poison().fill(x).floats());
    return out.result();
  }

 private:
  static constexpr int32_t kMaxRows = 1024;
  static constexpr int32_t kMaxDepth = 4096;

  /// A Linear and its memory. `bias` may be empty.
  struct Packed {
    Packed(Backend& backend, WeightFormat format, const Table& w, const Table& bias,
           Activation activation = Activation::kNone) {
      make(backend, {w.rows, w.columns, bias.columns > 0, false, format, activation});
      backend.pack(linear, Rows::kPlain, 0, view(w));
      if (linear.bias) backend.pack_bias(linear, Rows::kPlain, 0, vector_view(bias));
    }
    Packed(Backend& backend, WeightFormat format, const Table& g, const Table& u, const Table& bias,
           Activation activation) {
      make(backend, {g.rows, g.columns, bias.columns > 0, true, format, activation});
      backend.pack(linear, Rows::kGate, 0, view(g));
      backend.pack(linear, Rows::kUp, 0, view(u));
      for (const Rows which : {Rows::kGate, Rows::kUp}) {
        if (linear.bias) backend.pack_bias(linear, which, 0, vector_view(bias));
      }
    }
    void make(Backend& backend, const LinearShape& shape) {
      static_cast<LinearShape&>(linear) = shape;
      bytes = Bytes(backend.linear_bytes(linear));
      linear.data = bytes.data();
    }
    Linear linear;
    Bytes bytes;
  };

  Table act(const Packed& packed, const Table& x) {
    Matrix in(x, backend_->dtype());
    Matrix out(x.rows, packed.linear.n, backend_->dtype());
    backend_->linear_act(packed.linear, in.data(), x.rows, out.poison().data());
    return out.result();
  }

  static Norm norm_of(int32_t columns, Matrix& weight, Matrix& bias, NormKind kind) {
    return {weight.rows() > 0 ? weight.floats() : nullptr, bias.rows() > 0 ? bias.floats() : nullptr, columns, 1e-5f,
            kind};
  }

  /// A step of these tokens, which no attention follows.
  void begin(const std::vector<Token>& ids) { begin(ids, std::vector<int32_t>(ids.size())); }
  void begin(const std::vector<Token>& ids, const std::vector<int32_t>& positions) {
    ids_ = ids;
    positions_ = positions;
    backend_->begin({ids_, positions_, {}, {}});
  }

  std::unique_ptr<Backend> backend_;
  WeightFormat format_;
  AttentionShape shape_;
  Bytes cache_;
  std::vector<int32_t> positions_;
  std::vector<Token> ids_;
};

}  // namespace splitfuse
