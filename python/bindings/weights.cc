// Weight sources and canonical checkpoints.
#include <algorithm>

#include "bindings.h"

namespace py = pybind11;
using namespace splitfuse;

namespace {

/// Fails with `message` about tensor `name`.
[[noreturn]] void refuse(const std::string& name, const std::string& message) {
  throw CheckpointError("tensor " + name + ": " + message);
}

py::array contiguous(const std::string& name, const py::object& object) {
  auto array = py::array::ensure(object);
  if (!array || !(array.flags() & py::array::c_style)) refuse(name, "expected a C-contiguous array");
  if (array.dtype().byteorder() == '>') refuse(name, "big-endian, expected native order");
  return array;
}

bool is_of(const py::array& array, char kind, int bytes) {
  return array.dtype().kind() == kind && array.itemsize() == bytes;
}

std::vector<int64_t> shape_of(const py::array& array) { return {array.shape(), array.shape() + array.ndim()}; }

TensorView floats(const std::string& name, const py::array& array) {
  TensorView view;
  if (is_of(array, 'f', 4)) {
    view.dtype = DType::kF32;
  } else if (is_of(array, 'f', 2)) {
    view.dtype = DType::kF16;
  } else if (is_of(array, 'u', 2)) {
    view.dtype = DType::kBF16;
  } else {
    refuse(name, "an array of " + py::str(array.dtype()).cast<std::string>() +
                     ", expected float32, float16, or uint16 (the bits of bfloat16)");
  }
  view.shape = shape_of(array);
  view.data = array.data();
  return view;
}

/// (codes, scales) is kInt8, (codes, scales, minima) kInt4.
TensorView integers(const std::string& name, const std::vector<py::array>& parts) {
  const bool int4 = parts.size() == 3;
  if (!int4 && parts.size() != 2) refuse(name, "expected (codes, scales) or (codes, scales, minima)");
  TensorView view = floats(name, parts[1]);
  const std::vector<int64_t> shape = shape_of(parts[0]);
  const bool codes_fit = int4 ? shape.size() == 3 && shape[2] == kWeightGroup / 2 && is_of(parts[0], 'u', 1)
                              : shape.size() == 2 && is_of(parts[0], 'i', 1);
  if (!codes_fit) refuse(name, "expected codes of uint8 [n, groups, 16] (int4) or int8 [n, k] (int8)");
  const std::vector<int64_t> scales = {shape[0], int4 ? shape[1] : (shape[1] + kWeightGroup - 1) / kWeightGroup};
  bool scales_fit = view.shape == scales && view.dtype != DType::kBF16;
  if (int4) scales_fit = scales_fit && shape_of(parts[2]) == scales && parts[2].dtype().is(parts[1].dtype());
  if (!scales_fit) {
    refuse(name, "expected scales, and minima in int4, of float32 or float16, one for each 32 along k");
  }
  view.scales = view.data;
  view.data = parts[0].data();
  view.format = int4 ? WeightFormat::kInt4 : WeightFormat::kInt8;
  view.minima = int4 ? parts[2].data() : nullptr;
  view.shape = {shape[0], int4 ? shape[1] * kWeightGroup : shape[1]};
  return view;
}

/// Tensors that Python reads one at a time.
class CallbackSource : public WeightSource {
 public:
  CallbackSource(std::vector<std::string> names, py::function read, WeightFormat format)
      : names_(std::move(names)), read_(std::move(read)), format_(format) {}
  // The interpreter is alive: taking its lock does not throw.
  ~CallbackSource() override {  // NOLINT(bugprone-exception-escape)
    py::gil_scoped_acquire gil;
    current_.clear();
    read_ = py::function();
  }

  std::vector<std::string> names() const override { return names_; }
  WeightFormat format() const override { return format_; }

  TensorView read(const std::string& name) override {
    py::gil_scoped_acquire gil;
    current_.clear();
    if (std::find(names_.begin(), names_.end(), name) == names_.end()) {
      throw CheckpointError("the weight source has no tensor " + name);
    }
    return view_of(name, read_(name), current_);
  }

  void release() override {
    py::gil_scoped_acquire gil;
    current_.clear();
  }

 private:
  std::vector<std::string> names_;
  py::function read_;
  WeightFormat format_;
  std::vector<py::array> current_;   // keeps the last arrays alive
};

/// numpy knows half precision and can shift; no conversion of our own is needed.
py::object to_float32(const TensorView& view) {
  const std::vector<py::ssize_t> shape(view.shape.begin(), view.shape.end());
  if (view.format != WeightFormat::kDense) {
    py::array_t<float> out(shape);
    dequantize(view, out.mutable_data());
    return out;
  }
  if (view.dtype == DType::kF32) return py::array(py::dtype::of<float>(), shape, view.data);
  if (view.dtype == DType::kF16) return py::array(py::dtype("float16"), shape, view.data).attr("astype")("float32");
  const py::object wide = py::array(py::dtype::of<uint16_t>(), shape, view.data).attr("astype")("uint32");
  return wide.attr("__lshift__")(py::module_::import("numpy").attr("uint32")(16)).attr("view")("float32");
}

}  // namespace

TensorView view_of(const std::string& name, const py::object& given, std::vector<py::array>& keep) {
  if (!py::isinstance<py::tuple>(given)) {
    keep.push_back(contiguous(name, given));
    return floats(name, keep.back());
  }
  for (const auto& part : given.cast<py::tuple>()) {
    keep.push_back(contiguous(name, py::reinterpret_borrow<py::object>(part)));
  }
  return integers(name, keep);
}

void register_weights(py::module_& module) {
  py::class_<WeightSource>(module, "WeightSource")
      .def("names", &WeightSource::names)
      .def_property_readonly("format", [](const WeightSource& self) { return weight_format_name(self.format()); })
      .def(
          "read", [](WeightSource& self, const std::string& name) { return to_float32(self.read(name)); },
          py::arg("name"));

  module.def("open_safetensors", &open_safetensors, py::arg("files"), py::arg("names"),
             py::call_guard<py::gil_scoped_release>());
  module.def(
      "callback_source",
      [](std::vector<std::string> names, py::function read,
         const std::string& format) -> std::unique_ptr<WeightSource> {
        return std::make_unique<CallbackSource>(std::move(names), std::move(read), weight_format_from_name(format));
      },
      py::arg("names"), py::arg("read"), py::arg("format") = "dense");
  module.def(
      "read_safetensors_header",
      [](const std::string& file) {
        const SafetensorsHeader header = read_safetensors_header(file);
        py::list tensors;
        for (const auto& tensor : header.tensors)
          tensors.append(py::make_tuple(tensor.name, tensor.dtype, tensor.shape, tensor.begin));
        py::dict metadata;
        for (const auto& [key, value] : header.metadata) metadata[py::str(key)] = value;
        return py::make_tuple(tensors, metadata);
      },
      py::arg("file"));
  module.def(
      "open_checkpoint",
      [](const std::string& path) {
        Checkpoint checkpoint = open_checkpoint(path);
        return py::make_tuple(std::move(checkpoint.config), std::move(checkpoint.weights));
      },
      py::arg("path"));
  module.def(
      "write_checkpoint",
      [](const ModelConfig& config, WeightSource& weights, const std::string& dtype, const std::string& file,
         const py::object& progress, const std::string& quantize) {
        const ProgressFn callback = progress_from(progress);
        const DType number = dtype_from_name(dtype);
        const WeightFormat format = weight_format_from_name(quantize);
        py::gil_scoped_release release;
        write_checkpoint(config, weights, number, file, callback, format);
      },
      py::arg("config"), py::arg("weights"), py::arg("dtype"), py::arg("file"), py::arg("progress") = py::none(),
      py::arg("quantize") = "dense");
  module.def("canonical_names", &weight_shapes, py::arg("config"));
}
