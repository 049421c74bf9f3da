// What testing.cc makes of numpy arrays: inputs padded as the Backend contract has it, outputs full of NaN, weights
// packed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "base/check.h"
#include "base/integer_rows.h"
#include "base/numeric.h"
#include "bindings.h"

namespace splitfuse::testing {

namespace py = pybind11;

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
inline constexpr int kPoison = 0xff;   // NaN in every format, when all bytes are this

inline int32_t rows_of(const py::array& array) { return static_cast<int32_t>(array.shape(0)); }
inline int32_t columns_of(const py::array& array) { return static_cast<int32_t>(array.shape(1)); }

inline void need(bool holds, const char* what) {
  if (!holds) throw InvalidArgument(what);
}

/// The backend of device "cpu" or "cuda"; isa and threads are the CPU's.
inline std::unique_ptr<Backend> make_device(const std::string& device, const std::string& dtype, const std::string& isa,
                                            int threads) {
  need(device == "cpu" || device == "cuda", "device must be 'cpu' or 'cuda'");
  if (device == "cuda") return make_cuda_backend(dtype_from_name(dtype));
  return make_cpu_backend(dtype_from_name(dtype), threads, isa);
}

/// float32, float16, or uint16 for the bits of bfloat16.
inline TensorView tensor_of(const py::array& array) {
  need((array.flags() & py::array::c_style) != 0, "an array must be C-contiguous");
  TensorView view;
  if (array.dtype().is(py::dtype::of<float>())) {
    view.dtype = DType::kF32;
  } else if (array.dtype().is(py::dtype::of<uint16_t>())) {
    view.dtype = DType::kBF16;
  } else if (array.dtype().is(py::dtype("float16"))) {
    view.dtype = DType::kF16;
  } else {
    throw InvalidArgument("an array must be of float32, float16, or uint16 (the bits of bfloat16)");
  }
  view.shape.assign(array.shape(), array.shape() + array.ndim());
  view.data = array.data();
  return view;
}

/// A matrix of floats, or of integers as callback_source() takes them.
struct Given {
  explicit Given(const py::object& w) : view(view_of("w", w, keep)) {
    need(view.shape.size() == 2, "a weight must be [n, k]");
  }
  std::vector<py::array> keep;
  TensorView view;
};

/// Rows of row_stride(columns) elements on the device, zero at first, and a copy of them here.
struct Matrix {
  Matrix(Backend& device, int32_t row_count, int32_t column_count, DType format)
      : rows(row_count), columns(column_count), dtype(format), stride(row_stride(column_count) * dtype_size(format)),
        backend(device), copy(static_cast<size_t>(row_count * stride)),
        buffer(device.allocate(std::max<int64_t>(row_count * stride, 1))) {}

  /// The rows on the device: as they were filled, or as operations have left them since.
  void* data() {
    if (!sent) backend.write(copy, buffer.data());
    sent = true;
    return buffer.data();
  }
  float* floats() { return static_cast<float*>(data()); }

  void poison() {
    std::fill(copy.begin(), copy.end(), std::byte{kPoison});
    sent = false;
  }

  void fill(const Floats& values) {
    need(values.ndim() == 2 && rows_of(values) == rows && columns_of(values) == columns, "an array has a wrong shape");
    sent = false;
    for (int32_t r = 0; r < rows; ++r) {
      std::byte* row = copy.data() + r * stride;
      for (int32_t c = 0; c < columns; ++c) {
        if (dtype == DType::kF32) {
          reinterpret_cast<float*>(row)[c] = values.at(r, c);
        } else {
          reinterpret_cast<uint16_t*>(row)[c] = float_to_bf16(values.at(r, c));
        }
      }
    }
  }

  /// The columns as floats, once the poison beyond them was found whole.
  Floats result() {
    Floats values({rows, columns});
    backend.read(buffer.data(), copy);
    for (int32_t r = 0; r < rows; ++r) {
      const std::byte* row = copy.data() + r * stride;
      for (int64_t i = columns * dtype_size(dtype); i < stride; ++i) {
        if (row[i] != std::byte{kPoison})
          throw Error(cat("the operation wrote beyond column ", columns, " of row ", r));
      }
      for (int32_t c = 0; c < columns; ++c) {
        values.mutable_at(r, c) = dtype == DType::kF32 ? reinterpret_cast<const float*>(row)[c]
                                                       : bf16_to_float(reinterpret_cast<const uint16_t*>(row)[c]);
      }
    }
    return values;
  }

  int32_t rows;
  int32_t columns;
  DType dtype;
  int64_t stride;   // bytes
  Backend& backend;
  std::vector<std::byte> copy;
  DeviceBuffer buffer;
  bool sent = false;   // the copy is on the device
};

/// A Linear and its memory.
struct Packed {
  Packed(Backend& backend, WeightFormat format, const py::object& w, const std::optional<py::array>& bias,
         int32_t parts, Activation activation = Activation::kNone) {
    const Given given(w);
    make(backend, format, given.view, bias.has_value(), false, activation);
    fill(backend, Rows::kPlain, given.view, bias, parts);
  }
  Packed(Backend& backend, WeightFormat format, const py::object& g, const py::object& u,
         const std::optional<py::array>& gb, const std::optional<py::array>& ub, Activation activation) {
    need(gb.has_value() == ub.has_value(), "gate and up must both have a bias, or neither");
    const Given gate(g);
    make(backend, format, gate.view, gb.has_value(), true, activation);
    fill(backend, Rows::kGate, gate.view, gb, 1);
    fill(backend, Rows::kUp, Given(u).view, ub, 1);
  }

  void make(Backend& backend, WeightFormat format, const TensorView& w, bool bias, bool gated, Activation activation) {
    static_cast<LinearShape&>(linear) = {
        static_cast<int32_t>(w.shape[0]), static_cast<int32_t>(w.shape[1]), bias, gated, format, activation};
    buffer = backend.allocate(backend.linear_bytes(linear));
    linear.data = buffer.data();
  }
  /// In `parts` runs of rows, as q, k and v are packed into one linear.
  void fill(Backend& backend, Rows which, const TensorView& weights, const std::optional<py::array>& bias,
            int32_t parts) {
    for (int32_t i = 0; i < parts; ++i) {
      const auto begin = static_cast<int32_t>(weights.shape[0] * i / parts);
      const auto end = static_cast<int32_t>(weights.shape[0] * (i + 1) / parts);
      backend.pack(linear, which, begin, row_range(weights, begin, end - begin));
    }
    if (bias) backend.pack_bias(linear, which, 0, tensor_of(*bias));
  }

  Linear linear;
  DeviceBuffer buffer;
};

/// A vector as f32 on the device, zero up to its row_stride.
struct Vector {
  Vector(Backend& backend, const std::optional<Floats>& values, int32_t columns) {
    if (!values) return;
    need(values->size() == columns, "a vector must be [columns of x]");
    buffer = backend.allocate(row_stride(columns) * int64_t{sizeof(float)});
    backend.upload(tensor_of(*values), reinterpret_cast<float*>(buffer.data()));
  }
  const float* data() const { return reinterpret_cast<const float*>(buffer.data()); }

  DeviceBuffer buffer;
};

}  // namespace splitfuse::testing
