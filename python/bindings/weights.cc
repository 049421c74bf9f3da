// Weight sources and canonical checkpoints.
#include <algorithm>

#include "bindings.h"

namespace py = pybind11;
using namespace splitfuse;

namespace {

/// Tensors that Python reads one at a time.
class CallbackSource : public WeightSource {
 public:
  CallbackSource(std::vector<std::string> names, py::function read)
      : names_(std::move(names)), read_(std::move(read)) {}
  // The interpreter is alive: taking its lock does not throw.
  ~CallbackSource() override {  // NOLINT(bugprone-exception-escape)
    py::gil_scoped_acquire gil;
    current_ = py::object();
    read_ = py::function();
  }

  std::vector<std::string> names() const override { return names_; }

  TensorView read(const std::string& name) override {
    py::gil_scoped_acquire gil;
    current_ = py::object();
    if (std::find(names_.begin(), names_.end(), name) == names_.end()) {
      throw CheckpointError("the weight source has no tensor " + name);
    }
    const auto array = py::array::ensure(read_(name));
    if (!array || !(array.flags() & py::array::c_style)) {
      throw CheckpointError("tensor " + name + ": expected a C-contiguous array");
    }
    TensorView view;
    if (array.dtype().byteorder() == '>')
      throw CheckpointError("tensor " + name + " is big-endian, expected native order");
    const char kind = array.dtype().kind();
    if (kind == 'f' && array.itemsize() == 4) {
      view.dtype = DType::kF32;
    } else if (kind == 'f' && array.itemsize() == 2) {
      view.dtype = DType::kF16;
    } else if (kind == 'u' && array.itemsize() == 2) {
      view.dtype = DType::kBF16;
    } else {
      throw CheckpointError("tensor " + name + " is an array of " + py::str(array.dtype()).cast<std::string>() +
                            ", expected float32, float16, or uint16 (the bits of bfloat16)");
    }
    view.shape.assign(array.shape(), array.shape() + array.ndim());
    view.data = array.data();
    current_ = array;
    return view;
  }

  void release() override {
    py::gil_scoped_acquire gil;
    current_ = py::object();
  }

 private:
  std::vector<std::string> names_;
  py::function read_;
  py::object current_;   // keeps the last array alive
};

/// numpy knows half precision and can shift; no conversion of our own is needed.
py::object to_float32(const TensorView& view) {
  const std::vector<py::ssize_t> shape(view.shape.begin(), view.shape.end());
  if (view.dtype == DType::kF32) return py::array(py::dtype::of<float>(), shape, view.data);
  if (view.dtype == DType::kF16) return py::array(py::dtype("float16"), shape, view.data).attr("astype")("float32");
  const py::object wide = py::array(py::dtype::of<uint16_t>(), shape, view.data).attr("astype")("uint32");
  return wide.attr("__lshift__")(py::module_::import("numpy").attr("uint32")(16)).attr("view")("float32");
}

}  // namespace

void register_weights(py::module_& module) {
  py::class_<WeightSource>(module, "WeightSource")
      .def("names", &WeightSource::names)
      .def(
          "read", [](WeightSource& self, const std::string& name) { return to_float32(self.read(name)); },
          py::arg("name"));

  module.def("open_safetensors", &open_safetensors, py::arg("files"), py::arg("names"),
             py::call_guard<py::gil_scoped_release>());
  module.def(
      "callback_source",
      [](std::vector<std::string> names, py::function read) -> std::unique_ptr<WeightSource> {
        return std::make_unique<CallbackSource>(std::move(names), std::move(read));
      },
      py::arg("names"), py::arg("read"));
  module.def(
      "read_safetensors_header",
      [](const std::string& file) {
        const SafetensorsHeader header = read_safetensors_header(file);
        py::list tensors;
        for (const auto& tensor : header.tensors)
          tensors.append(py::make_tuple(tensor.name, tensor.dtype, tensor.shape));
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
         const py::object& progress) {
        const ProgressFn callback = progress_from(progress);
        const DType format = dtype_from_name(dtype);
        py::gil_scoped_release release;
        write_checkpoint(config, weights, format, file, callback);
      },
      py::arg("config"), py::arg("weights"), py::arg("dtype"), py::arg("file"), py::arg("progress") = py::none());
  module.def("canonical_names", &weight_shapes, py::arg("config"));
}
