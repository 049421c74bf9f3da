// _core.testing: every operation of the CPU backend on numpy arrays. Inputs are padded as the Backend contract has
// it; outputs are full of NaN before, and what lies beyond their columns must be untouched after.
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>

#include "backend/backend.h"
#include "base/check.h"
#include "base/integer_rows.h"
#include "base/numeric.h"
#include "bindings.h"

namespace py = pybind11;
using namespace splitfuse;

namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
constexpr int kPoison = 0xff;   // NaN in every format, when all bytes are this

int32_t rows_of(const py::array& array) { return static_cast<int32_t>(array.shape(0)); }
int32_t columns_of(const py::array& array) { return static_cast<int32_t>(array.shape(1)); }

void need(bool holds, const char* what) {
  if (!holds) throw InvalidArgument(what);
}

/// float32, float16, or uint16 for the bits of bfloat16.
TensorView tensor_of(const py::array& array) {
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

struct SeqChunk {
  int32_t computed;
  int32_t length;
  std::vector<int32_t> block_table;
};

class Ops {
 public:
  Ops(const std::string& dtype, const std::string& isa, int threads, const std::string& format)
      : backend_(make_cpu_backend(dtype_from_name(dtype), threads, isa)), format_(weight_format_from_name(format)) {
    shape_.kv = {.layers = 1, .kv_heads = 1, .head_dim = 8, .block_size = 16, .blocks = 1};
    shape_.heads = 1;
    shape_.inv_freq.assign(4, 1.0f);
    prepare(1, 1);
  }

  std::string describe() const { return backend_->describe(); }

  Floats linear(const py::object& w, const std::optional<py::array>& bias, const Floats& x, int32_t parts) {
    Packed packed(*backend_, format_, w, bias, parts);
    Matrix in = activations(x);
    Matrix out = poisoned(in.rows, packed.linear.n, DType::kF32);
    backend_->linear(packed.linear, in.data(), in.rows, out.floats());
    return out.result();
  }

  Floats linear_add(const py::object& w, const std::optional<py::array>& bias, const Floats& x, const Floats& acc) {
    Packed packed(*backend_, format_, w, bias, 1);
    Matrix in = activations(x);
    need(rows_of(acc) == in.rows && columns_of(acc) == packed.linear.n, "acc must be [rows of x, rows of w]");
    Matrix out = poisoned(in.rows, packed.linear.n, DType::kF32);
    out.fill(acc);
    backend_->linear_add(packed.linear, in.data(), in.rows, out.floats());
    return out.result();
  }

  Floats linear_gated(const py::object& g, const py::object& u, const std::optional<py::array>& gb,
                      const std::optional<py::array>& ub, const Floats& x) {
    Packed packed(*backend_, format_, g, u, gb, ub);
    Matrix in = activations(x);
    Matrix out = poisoned(in.rows, packed.linear.n, backend_->dtype());
    backend_->linear_gated(packed.linear, in.data(), in.rows, out.data());
    return out.result();
  }

  Floats embed(const py::object& table, const std::vector<Token>& ids) {
    Packed packed(*backend_, format_, table, std::nullopt, 1);
    begin_rows(ids);
    Matrix out = poisoned(static_cast<int32_t>(ids.size()), packed.linear.k, DType::kF32);
    backend_->embed(packed.linear, out.floats());
    return out.result();
  }

  Floats rms_norm(const Floats& x, const Floats& weight, float eps, const std::optional<std::vector<int32_t>>& rows) {
    Matrix in(*backend_, rows_of(x), columns_of(x), DType::kF32);
    in.fill(x);
    need(weight.size() == in.columns, "weight must be [columns of x]");
    begin_rows(std::vector<Token>(static_cast<size_t>(in.rows)));
    DeviceBuffer scale = backend_->allocate(row_stride(in.columns) * int64_t{sizeof(float)});
    backend_->upload(tensor_of(weight), reinterpret_cast<float*>(scale.data()));
    Matrix out = poisoned(rows ? static_cast<int32_t>(rows->size()) : in.rows, in.columns, backend_->dtype());
    std::span<const int32_t> chosen;
    if (rows) chosen = *rows;
    backend_->rms_norm(in.floats(), reinterpret_cast<const float*>(scale.data()), eps, in.columns, chosen, out.data());
    return out.result();
  }

  Floats paged(int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t block_size, int32_t blocks,
               const std::vector<float>& inv_freq, const std::vector<SeqChunk>& chunks, const Floats& qkv,
               std::optional<float> scale, int32_t layers, int32_t layer, const std::string& kv_dtype) {
    const KvShape kv = {layers, kv_heads, head_dim, block_size, blocks, kv_dtype_from_name(kv_dtype)};
    use_cache(kv, heads, inv_freq, scale.value_or(1.0f / std::sqrt(static_cast<float>(head_dim))));
    std::vector<RaggedSeq> seqs;
    std::vector<int32_t> positions;
    for (const SeqChunk& chunk : chunks) {
      need(static_cast<int64_t>(chunk.block_table.size()) * block_size >= chunk.computed + chunk.length,
           "a block table is too short");
      seqs.push_back({static_cast<int32_t>(positions.size()), chunk.length, chunk.computed, chunk.block_table.data()});
      for (int32_t i = 0; i < chunk.length; ++i) positions.push_back(chunk.computed + i);
    }
    const std::vector<Token> tokens(positions.size());
    need(rows_of(qkv) == static_cast<int32_t>(tokens.size()), "qkv must have as many rows as the chunks together");
    need(columns_of(qkv) == (heads + 2 * kv_heads) * head_dim, "qkv must be [rows, (heads + 2 kv_heads) * head_dim]");

    Matrix in(*backend_, rows_of(qkv), columns_of(qkv), DType::kF32);
    in.fill(qkv);
    Matrix q(*backend_, in.rows, heads * head_dim, backend_->dtype());
    Matrix out = poisoned(in.rows, heads * head_dim, backend_->dtype());
    backend_->begin({tokens, positions, seqs, {}});
    backend_->rope_write_kv(in.floats(), layer, q.data());
    backend_->attention(q.data(), layer, out.data());
    return out.result();
  }

  /// [blocks, bytes of a block], in the backend's own layout.
  py::array_t<uint8_t> kv_cache() const {
    const int64_t bytes = backend_->kv_block_bytes(shape_.kv);
    py::array_t<uint8_t> copy({int64_t{shape_.kv.blocks}, bytes});
    std::memcpy(copy.mutable_data(), cache_.data(), static_cast<size_t>(shape_.kv.blocks * bytes));
    return copy;
  }

  py::list sample(const Floats& logits, const py::list& rows) {
    need(rows_of(logits) == static_cast<int32_t>(rows.size()), "one row of logits for each entry of rows");
    prepare(rows_of(logits), columns_of(logits));
    Matrix in(*backend_, rows_of(logits), columns_of(logits), DType::kF32);
    in.fill(logits);
    struct Owned {
      SamplingParams params;
      std::vector<Token> tokens, stop_ids;
    };
    std::vector<Owned> owned(rows.size());
    std::vector<SampleRow> sample_rows(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto row = rows[i].cast<py::dict>();
      const auto get = [&row]<class T>(const char* key, const T& fallback) {
        return row.contains(key) ? row[key].cast<T>() : fallback;
      };
      owned[i] = {get("params", SamplingParams()), get("tokens", std::vector<Token>()),
                  get("stop_ids", std::vector<Token>())};
      sample_rows[i] = {.params = &owned[i].params,
                        .tokens = owned[i].tokens,
                        .prompt = get("prompt", static_cast<int32_t>(owned[i].tokens.size())),
                        .stop_ids = owned[i].stop_ids,
                        .target = get("target", Token{-1}),
                        .top = get("top", int32_t{-1})};
    }
    std::vector<SampleResult> results(rows.size());
    backend_->sample(in.floats(), sample_rows, results);
    py::list list;
    for (const SampleResult& result : results) {
      py::list top;
      for (int32_t i = 0; i < result.top_count; ++i) {
        top.append(py::make_tuple(result.top[i].token, result.top[i].logprob));
      }
      list.append(py::make_tuple(result.token, result.logprob, top, result.rank));
    }
    return list;
  }

 private:
  /// Rows of row_stride(columns) elements on the device, zero at first.
  struct Matrix {
    Matrix(Backend& backend, int32_t row_count, int32_t column_count, DType format)
        : rows(row_count), columns(column_count), dtype(format), stride(row_stride(column_count) * dtype_size(format)),
          buffer(backend.allocate(std::max<int64_t>(row_count * stride, 1))) {}

    void* data() { return buffer.data(); }
    float* floats() { return reinterpret_cast<float*>(buffer.data()); }

    void fill(const Floats& values) {
      need(values.ndim() == 2 && rows_of(values) == rows && columns_of(values) == columns,
           "an array has a wrong shape");
      for (int32_t r = 0; r < rows; ++r) {
        std::byte* row = buffer.data() + r * stride;
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
      for (int32_t r = 0; r < rows; ++r) {
        const std::byte* row = buffer.data() + r * stride;
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
    DeviceBuffer buffer;
  };

  /// A Linear and its memory.
  struct Packed {
    Packed(Backend& backend, WeightFormat format, const py::object& w, const std::optional<py::array>& bias,
           int32_t parts) {
      const Given given(w);
      make(backend, format, given.view, bias.has_value(), false);
      fill(backend, Rows::kPlain, given.view, bias, parts);
    }
    Packed(Backend& backend, WeightFormat format, const py::object& g, const py::object& u,
           const std::optional<py::array>& gb, const std::optional<py::array>& ub) {
      need(gb.has_value() == ub.has_value(), "gate and up must both have a bias, or neither");
      const Given gate(g);
      make(backend, format, gate.view, gb.has_value(), true);
      fill(backend, Rows::kGate, gate.view, gb, 1);
      fill(backend, Rows::kUp, Given(u).view, ub, 1);
    }

    void make(Backend& backend, WeightFormat format, const TensorView& w, bool bias, bool gated) {
      static_cast<LinearShape&>(linear) = {static_cast<int32_t>(w.shape[0]), static_cast<int32_t>(w.shape[1]), bias,
                                           gated, format};
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

  Matrix activations(const Floats& x) {
    need(x.ndim() == 2, "x must be [rows, columns]");
    Matrix matrix(*backend_, rows_of(x), columns_of(x), backend_->dtype());
    matrix.fill(x);
    return matrix;
  }

  Matrix poisoned(int32_t rows, int32_t columns, DType dtype) {
    Matrix matrix(*backend_, rows, columns, dtype);
    std::memset(matrix.data(), kPoison, static_cast<size_t>(rows * matrix.stride));
    return matrix;
  }

  /// Begins a step of `ids.size()` rows that no attention follows.
  void begin_rows(const std::vector<Token>& ids) {
    need(static_cast<int32_t>(ids.size()) <= kMaxRows, "too many rows");
    positions_.assign(ids.size(), 0);
    backend_->begin({ids, positions_, {}, {}});
  }

  /// Keeps the KV cache while its shape stays the same; another shape begins with an empty one.
  void use_cache(const KvShape& kv, int32_t heads, const std::vector<float>& inv_freq, float scale) {
    const bool same = shape_.kv == kv;
    if (same && shape_.heads == heads && shape_.inv_freq == inv_freq && shape_.scale == scale) return;
    shape_ = {kv, heads, scale, inv_freq};
    if (!same) cache_ = DeviceBuffer();
    prepare(limits_.max_logit_rows, limits_.vocab);
  }

  void prepare(int32_t logit_rows, int32_t vocab) {
    if (cache_.data() == nullptr) cache_ = backend_->allocate(backend_->kv_block_bytes(shape_.kv) * shape_.kv.blocks);
    limits_ = {.max_rows = kMaxRows,
               .max_seqs = kMaxRows,
               .max_context = shape_.kv.blocks * shape_.kv.block_size,
               .max_logit_rows = logit_rows,
               .vocab = vocab,
               .integer_depth = kMaxDepth};
    backend_->prepare(shape_, limits_, cache_.data());
  }

  static constexpr int32_t kMaxRows = 1024;
  static constexpr int32_t kMaxDepth = 8192;
  std::unique_ptr<Backend> backend_;
  WeightFormat format_;
  AttentionShape shape_;
  StepLimits limits_;
  DeviceBuffer cache_;
  std::vector<int32_t> positions_;
};

}  // namespace

void register_testing(py::module_& module) {
  py::module_ testing = module.def_submodule("testing", "The native parts one by one, for tests.");
  const auto none = py::none();
  py::class_<Ops>(testing, "Ops", "A CPU backend whose operations take and give arrays of float32.")
      .def(py::init<const std::string&, const std::string&, int, const std::string&>(), py::arg("dtype"),
           py::arg("isa"), py::arg("threads") = 1, py::arg("format") = "dense")
      .def("describe", &Ops::describe)
      .def("linear", &Ops::linear, py::arg("w"), py::arg("bias"), py::arg("x"), py::arg("parts") = 1,
           "x [rows, k] w^T + bias; w [n, k] is packed in `parts` runs of rows.")
      .def("linear_add", &Ops::linear_add, py::arg("w"), py::arg("bias"), py::arg("x"), py::arg("acc"),
           "acc [rows, n] + x w^T + bias")
      .def("linear_gated", &Ops::linear_gated, py::arg("g"), py::arg("u"), py::arg("gb"), py::arg("ub"), py::arg("x"),
           "silu(x g^T + gb) * (x u^T + ub)")
      .def("embed", &Ops::embed, py::arg("table"), py::arg("ids"), "Rows `ids` of table [n, k].")
      .def("rms_norm", &Ops::rms_norm, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("rows") = none,
           "x / rms(x) * weight of all rows, or of `rows` closed up.")
      .def(
          "paged",
          [](Ops& self, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t block_size, int32_t blocks,
             const std::vector<float>& inv_freq,
             const std::vector<std::tuple<int32_t, int32_t, std::vector<int32_t>>>& seqs, const Floats& qkv,
             std::optional<float> scale, int32_t layers, int32_t layer, const std::string& kv_dtype) {
            std::vector<SeqChunk> chunks;
            for (const auto& [computed, length, table] : seqs) chunks.push_back({computed, length, table});
            return self.paged(heads, kv_heads, head_dim, block_size, blocks, inv_freq, chunks, qkv, scale, layers,
                              layer, kv_dtype);
          },
          py::kw_only(), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("block_size"),
          py::arg("blocks"), py::arg("inv_freq"), py::arg("seqs"), py::arg("qkv"), py::arg("scale") = none,
          py::arg("layers") = 1, py::arg("layer") = 0, py::arg("kv_dtype") = "auto",
          "begin, rope_write_kv and attention of chunks (computed, length, block table) laid end to end: the result\n"
          "[rows, heads * head_dim]. The KV cache lives on until a call with another cache shape.")
      .def("kv_cache", &Ops::kv_cache, "The bytes of the KV cache [blocks, bytes of a block], as paged() left them.")
      .def(
          "sample", &Ops::sample, py::arg("logits"), py::arg("rows"),
          "[(token, logprob, [(token, logprob)])] for logits [rows, vocab] and a dict a row: params (SamplingParams),\n"
          "tokens, prompt, stop_ids, target, top; what is left out is as in the native SampleRow, prompt all tokens.");
}
