#include "cpu/pack.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "backend/backend.h"
#include "base/check.h"
#include "base/integer_rows.h"
#include "base/numeric.h"
#include "cpu/pack_integer.h"
#include "cpu/pack_source.h"
#include "splitfuse/types.h"

namespace splitfuse {
namespace {

// How floats become elements of panels, and how many neighbours along k lie together there.
struct ToF32 {
  using Element = float;
  static constexpr int32_t kTogether = 1;
  static float element(float value) { return value; }
};
template <int32_t Together>
struct ToBf16 {
  using Element = uint16_t;
  static constexpr int32_t kTogether = Together;
  static uint16_t element(float value) { return float_to_bf16(value); }
};

/// Calls `function` with the one for dense weights of the layout.
template <class Function>
void with_target(DType dtype, const PackedLayout& layout, Function&& function) {
  if (dtype == DType::kF32) {
    function(ToF32{});
  } else if (layout.together() == 2) {
    function(ToBf16<2>{});
  } else {
    SPLITFUSE_ASSERT(layout.together() == 4);
    function(ToBf16<4>{});
  }
}

/// The part of one panel that `weight`'s rows [begin, end) fill; they become rows `row` + begin and on of the linear.
/// Row by row would touch a cache line for each element; so the panel is written once, from front to back.
template <class From, class To>
void pack_panel(const typename From::Element* weight, int32_t begin, int32_t end, int32_t row, int32_t k,
                const PackedLayout& layout, Rows which, typename To::Element* panel) {
  int32_t columns[kWidestPanel];
  for (int32_t r = begin; r < end; ++r) columns[r - begin] = layout.column(which, row + r) % layout.width();
  for (int32_t first = 0; first < k; first += To::kTogether) {
    const int32_t together = std::min(To::kTogether, k - first);
    auto* step = panel + int64_t{first} * layout.width();
    for (int32_t r = begin; r < end; ++r) {
      const auto* from = weight + int64_t{r} * k + first;
      for (int32_t i = 0; i < together; ++i) {
        step[columns[r - begin] * To::kTogether + i] = To::element(From::value(from[i]));
      }
    }
  }
}

/// Calls pack(panel, begin, end) for each panel that rows [begin, end) of `rows` rows fall into; threads share panels.
template <class Pack>
void for_each_panel(const Linear& linear, const PackedLayout& layout, int32_t row, int32_t rows, ThreadPool& pool,
                    const Pack& pack) {
  const int32_t per_panel = layout.rows_of_panel();
  const int32_t first = row / per_panel;
  const int32_t last = (row + rows - 1) / per_panel;
  pool.run([&](int thread) {
    for (int32_t p = first + thread; p <= last; p += pool.size()) {
      const int32_t begin = std::max(p * per_panel - row, 0);
      const int32_t end = std::min((p + 1) * per_panel - row, rows);
      pack(linear.data + p * layout.panel_bytes(), begin, end);
    }
  });
}

template <class From, class To>
void pack_panels(const Linear& linear, const PackedLayout& layout, Rows which, int32_t row, const TensorView& weight,
                 ThreadPool& pool) {
  const auto* data = static_cast<const typename From::Element*>(weight.data);
  const auto rows = static_cast<int32_t>(weight.shape[0]);
  for_each_panel(linear, layout, row, rows, pool, [&](std::byte* panel, int32_t begin, int32_t end) {
    pack_panel<From, To>(data, begin, end, row, linear.k, layout, which,
                         reinterpret_cast<typename To::Element*>(panel));
  });
}

/// The same for a matrix of integers.
template <class To>
void pack_floats_of(const Linear& linear, const PackedLayout& layout, Rows which, int32_t row, const TensorView& weight,
                    ThreadPool& pool) {
  const auto rows = static_cast<int32_t>(weight.shape[0]);
  for_each_panel(linear, layout, row, rows, pool, [&](std::byte* panel, int32_t begin, int32_t end) {
    std::vector<float> floats(static_cast<size_t>(end - begin) * static_cast<size_t>(linear.k));
    for (int32_t r = begin; r < end; ++r) row_to_f32(weight, r, floats.data() + int64_t{r - begin} * linear.k);
    pack_panel<FromF32, To>(floats.data(), 0, end - begin, row + begin, linear.k, layout, which,
                            reinterpret_cast<typename To::Element*>(panel));
  });
}

void pack_integers(const Linear& linear, const PackedLayout& layout, Rows which, int32_t row, const TensorView& weight,
                   ThreadPool& pool) {
  const auto rows = static_cast<int32_t>(weight.shape[0]);
  std::atomic<bool> overflows = false;
  for_each_panel(linear, layout, row, rows, pool, [&](std::byte* panel, int32_t begin, int32_t end) {
    IntegerRow integers(linear.format, linear.k);
    for (int32_t r = begin; r < end; ++r) {
      integers.set(weight, r);
      if (integers.overflows()) overflows = true;
      const int32_t column = layout.column(which, row + r) % layout.width();
      place_channel(integers, linear.format, linear.k, column, layout, panel);
    }
  });
  if (overflows) {
    throw CheckpointError(cat("weights beyond ", weight_format_name(linear.format),
                              ", whose scales are float16: hold the matrices in another format"));
  }
}

void check_rows(const Linear& linear, Rows which, int32_t row, const TensorView& tensor, size_t rank) {
  const bool fits = tensor.shape.size() == rank && (rank == 1 || tensor.shape[1] == linear.k) && row >= 0 &&
                    tensor.shape[0] >= 0 && row + tensor.shape[0] <= linear.n &&
                    linear.gated == (which != Rows::kPlain);
  if (fits) return;
  std::string shape;
  for (int64_t size : tensor.shape) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  throw InvalidArgument(cat("a tensor [", shape, "] does not fit at row ", row, " of a ",
                            linear.gated ? "gated linear [" : "linear [", linear.n, ", ", linear.k, "]"));
}

}  // namespace

PackedLayout::PackedLayout(const LinearShape& shape, DType dtype, const GemmKernel& kernel)
    : width_(kernel.width), together_(kernel.together), gated_(shape.gated) {
  const int32_t columns = shape.gated ? 2 * round_up(shape.n, kGateGroup) : shape.n;
  panels_ = ceil_div(columns, width_);
  panel_bytes_ = shape.format != WeightFormat::kDense
                     ? integer_panel_bytes(shape.format, shape.k, width_)
                     : round_up(shape.k, together_) * int64_t{width_} * dtype_size(dtype);
  const int64_t bias_bytes = shape.bias ? int64_t{panels_} * width_ * int64_t{sizeof(float)} : 0;
  bytes_ = round_up<int64_t>(bias_offset() + bias_bytes, 64);
}

void pack_weight(const Linear& linear, const PackedLayout& layout, DType dtype, Rows which, int32_t row,
                 const TensorView& weight, ThreadPool& pool) {
  check_rows(linear, which, row, weight, 2);
  if (weight.shape[0] == 0) return;
  if (linear.format != WeightFormat::kDense) return pack_integers(linear, layout, which, row, weight, pool);
  if (weight.format != WeightFormat::kDense) {
    with_target(dtype, layout,
                [&](auto to) { pack_floats_of<decltype(to)>(linear, layout, which, row, weight, pool); });
    return;
  }
  with_source(weight.dtype, [&](auto from) {
    with_target(dtype, layout,
                [&](auto to) { pack_panels<decltype(from), decltype(to)>(linear, layout, which, row, weight, pool); });
  });
}

void pack_bias(const Linear& linear, const PackedLayout& layout, Rows which, int32_t row, const TensorView& bias) {
  if (!linear.bias) throw InvalidArgument("a bias for a linear that has none");
  check_rows(linear, which, row, bias, 1);
  auto* packed = reinterpret_cast<float*>(linear.data + layout.bias_offset());
  with_source(bias.dtype, [&](auto from) {
    using From = decltype(from);
    const auto* data = static_cast<const typename From::Element*>(bias.data);
    for (int32_t r = 0; r < bias.shape[0]; ++r) packed[layout.column(which, row + r)] = From::value(data[r]);
  });
}

void to_f32(const TensorView& tensor, float* out) {
  int64_t count = 1;
  for (int64_t size : tensor.shape) count *= size;
  with_source(tensor.dtype, [&](auto from) {
    using From = decltype(from);
    const auto* data = static_cast<const typename From::Element*>(tensor.data);
    for (int64_t i = 0; i < count; ++i) out[i] = From::value(data[i]);
  });
}

void unpack_row(const Linear& linear, const PackedLayout& layout, DType dtype, int32_t row, int32_t first,
                int32_t count, float* out) {
  const std::byte* panel = linear.data + row / layout.width() * layout.panel_bytes();
  const int32_t column = row % layout.width();
  if (linear.format != WeightFormat::kDense) {
    return dequantize_channel(panel, linear.format, first, count, column, layout, out);
  }
  if (dtype == DType::kF32) {
    const auto* from = reinterpret_cast<const float*>(panel);
    for (int32_t k = first; k < first + count; ++k) out[k - first] = from[layout.place(k, column)];
    return;
  }
  const auto* from = reinterpret_cast<const uint16_t*>(panel);
  for (int32_t k = first; k < first + count; ++k) out[k - first] = bf16_to_float(from[layout.place(k, column)]);
}

}  // namespace splitfuse
