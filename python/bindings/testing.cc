// _core.testing: every operation of a backend on numpy arrays. Inputs are padded as the Backend contract has
// it; outputs are full of NaN before, and what lies beyond their columns must be untouched after.
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>

#include "backend/backend.h"
#include "bindings.h"
#include "testing_arrays.h"
#include "testing_attention.h"

namespace py = pybind11;
using namespace splitfuse;
using namespace splitfuse::testing;

namespace {

struct SeqChunk {
  int32_t computed;
  int32_t length;
  std::vector<int32_t> block_table;
};

class Ops {
 public:
  Ops(const std::string& dtype, const std::string& isa, int threads, const std::string& format,
      const std::string& device)
      : backend_(make_device(device, dtype, isa, threads)), format_(weight_format_from_name(format)) {
    shape_.kv = {.layers = 1, .kv_heads = 1, .head_dim = 8, .block_size = 16, .blocks = 1};
    shape_.heads = 1;
    shape_.ropes = {{std::vector<float>(4), 1.0f}};
    shape_.layers.resize(1);
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

  Floats linear_act(const py::object& w, const std::optional<py::array>& bias, const Floats& x,
                    const std::string& activation) {
    return act(Packed(*backend_, format_, w, bias, 1, config_enum<Activation>(activation)), x);
  }

  Floats linear_gated(const py::object& g, const py::object& u, const std::optional<py::array>& gb,
                      const std::optional<py::array>& ub, const Floats& x, const std::string& activation) {
    return act(Packed(*backend_, format_, g, u, gb, ub, config_enum<Activation>(activation)), x);
  }

  Floats embed(const py::object& table, const std::vector<Token>& ids, float scale) {
    Packed packed(*backend_, format_, table, std::nullopt, 1);
    begin_rows(ids.size());
    backend_->begin({ids, positions_, {}, {}});
    Matrix out = poisoned(static_cast<int32_t>(ids.size()), packed.linear.k, DType::kF32);
    backend_->embed(packed.linear, scale, out.floats());
    return out.result();
  }

  Floats embed_positions(const py::object& table, const std::vector<int32_t>& positions, int32_t offset,
                         const Floats& x) {
    Packed packed(*backend_, format_, table, std::nullopt, 1);
    begin_rows(positions.size());
    positions_ = positions;
    backend_->begin({tokens_, positions_, {}, {}});
    Matrix out = poisoned(rows_of(x), packed.linear.k, DType::kF32);
    out.fill(x);
    backend_->embed_positions(packed.linear, offset, out.floats());
    return out.result();
  }

  Floats norm(const Floats& x, const std::optional<Floats>& weight, float eps,
              const std::optional<std::vector<int32_t>>& rows, const std::optional<Floats>& bias,
              const std::string& kind) {
    Matrix in = floats(x);
    const NormOf norm(*backend_, in.columns, weight, bias, eps, kind);
    Matrix out = poisoned(rows ? static_cast<int32_t>(rows->size()) : in.rows, in.columns, backend_->dtype());
    std::span<const int32_t> chosen;
    if (rows) chosen = *rows;
    begin_rows(static_cast<size_t>(in.rows));
    backend_->norm(norm.norm, in.floats(), chosen, out.data());
    return out.result();
  }

  Floats norm_in_place(const Floats& x, const std::optional<Floats>& weight, float eps,
                       const std::optional<Floats>& bias, const std::string& kind) {
    const NormOf norm(*backend_, columns_of(x), weight, bias, eps, kind);
    Matrix out = poisoned(rows_of(x), columns_of(x), DType::kF32);
    out.fill(x);
    begin_rows(static_cast<size_t>(out.rows));
    backend_->norm_in_place(norm.norm, out.floats());
    return out.result();
  }

  Floats add(const Floats& x, const Floats& y, float scale, const std::optional<Floats>& weight, float eps,
             const std::optional<Floats>& bias, const std::string& kind) {
    Matrix in = floats(y);
    const NormOf norm(*backend_, in.columns, weight, bias, eps, kind);
    Matrix out = poisoned(in.rows, in.columns, DType::kF32);
    out.fill(x);
    begin_rows(static_cast<size_t>(in.rows));
    backend_->add(norm.norm, in.floats(), scale, out.floats());
    return out.result();
  }

  Floats scale_logits(const Floats& logits, float scale, float softcap) {
    prepare(rows_of(logits), columns_of(logits));
    Matrix out = poisoned(rows_of(logits), columns_of(logits), DType::kF32);
    out.fill(logits);
    backend_->scale_logits(out.floats(), out.rows, scale, softcap);
    return out.result();
  }

  Floats paged(int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t block_size, int32_t blocks,
               const std::vector<float>& inv_freq, const std::vector<SeqChunk>& chunks, const Floats& qkv,
               std::optional<float> scale, int32_t layers, int32_t layer, const std::string& kv_dtype,
               const py::kwargs& more) {
    const KvShape kv = {layers, kv_heads, head_dim, block_size, blocks, kv_dtype_from_name(kv_dtype)};
    const float factor = scale.value_or(1.0f / std::sqrt(static_cast<float>(head_dim)));
    use_cache(kv, attention_options(heads, factor, layers, inv_freq, more));
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
    backend_->read(cache_.data(),
                   std::as_writable_bytes(std::span(copy.mutable_data(), static_cast<size_t>(copy.size()))));
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
  /// A Norm and its memory.
  struct NormOf {
    NormOf(Backend& backend, int32_t columns, const std::optional<Floats>& w, const std::optional<Floats>& b, float eps,
           const std::string& kind)
        : weight(backend, w, columns), bias(backend, b, columns),
          norm{weight.data(), bias.data(), columns, eps, config_enum<NormKind>(kind)} {}
    Vector weight, bias;
    Norm norm;
  };

  Floats act(const Packed& packed, const Floats& x) {
    Matrix in = activations(x);
    Matrix out = poisoned(in.rows, packed.linear.n, backend_->dtype());
    backend_->linear_act(packed.linear, in.data(), in.rows, out.data());
    return out.result();
  }

  Matrix floats(const Floats& x) {
    need(x.ndim() == 2, "x must be [rows, columns]");
    Matrix matrix(*backend_, rows_of(x), columns_of(x), DType::kF32);
    matrix.fill(x);
    return matrix;
  }

  Matrix activations(const Floats& x) {
    need(x.ndim() == 2, "x must be [rows, columns]");
    Matrix matrix(*backend_, rows_of(x), columns_of(x), backend_->dtype());
    matrix.fill(x);
    return matrix;
  }

  Matrix poisoned(int32_t rows, int32_t columns, DType dtype) {
    Matrix matrix(*backend_, rows, columns, dtype);
    matrix.poison();
    return matrix;
  }

  /// Begins a step of `rows` rows that no attention follows.
  void begin_rows(size_t rows) {
    need(static_cast<int32_t>(rows) <= kMaxRows, "too many rows");
    tokens_.assign(rows, 0);
    positions_.assign(rows, 0);
    backend_->begin({tokens_, positions_, {}, {}});
  }

  /// Keeps the KV cache while its shape stays the same; another shape begins with an empty one.
  void use_cache(const KvShape& kv, const AttentionOptions& attention) {
    const bool same = shape_.kv == kv;
    if (same && attention_ == attention) return;
    attention_ = attention;
    shape_ = attention_.shape(kv);
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
  AttentionOptions attention_;
  AttentionShape shape_;   // points into attention_
  StepLimits limits_;
  DeviceBuffer cache_;
  std::vector<Token> tokens_;
  std::vector<int32_t> positions_;
};

}  // namespace

void register_testing(py::module_& module) {
  py::module_ testing = module.def_submodule("testing", "The native parts one by one, for tests.");
  const auto none = py::none();
  py::class_<Ops>(testing, "Ops",
                  "A backend whose operations take and give arrays of float32; isa and threads are the CPU's.")
      .def(py::init<const std::string&, const std::string&, int, const std::string&, const std::string&>(),
           py::arg("dtype"), py::arg("isa") = "auto", py::arg("threads") = 1, py::arg("format") = "dense",
           py::arg("device") = "cpu")
      .def("describe", &Ops::describe)
      .def("linear", &Ops::linear, py::arg("w"), py::arg("bias"), py::arg("x"), py::arg("parts") = 1,
           "x [rows, k] w^T + bias; w [n, k] is packed in `parts` runs of rows.")
      .def("linear_add", &Ops::linear_add, py::arg("w"), py::arg("bias"), py::arg("x"), py::arg("acc"),
           "acc [rows, n] + x w^T + bias")
      .def("linear_act", &Ops::linear_act, py::arg("w"), py::arg("bias"), py::arg("x"), py::arg("activation"),
           "act(x w^T + bias)")
      .def("linear_gated", &Ops::linear_gated, py::arg("g"), py::arg("u"), py::arg("gb"), py::arg("ub"), py::arg("x"),
           py::arg("activation") = "silu", "act(x g^T + gb) * (x u^T + ub)")
      .def("embed", &Ops::embed, py::arg("table"), py::arg("ids"), py::arg("scale") = 1.0f,
           "scale * rows `ids` of table [n, k].")
      .def("embed_positions", &Ops::embed_positions, py::arg("table"), py::arg("positions"), py::arg("offset"),
           py::arg("x"), "x + rows offset + positions of table [n, k].")
      .def("norm", &Ops::norm, py::arg("x"), py::arg("weight") = none, py::arg("eps") = 1e-5f, py::arg("rows") = none,
           py::kw_only(), py::arg("bias") = none, py::arg("kind") = "rms",
           "norm(x) of all rows, or of `rows` closed up, in the format of activations; without a weight x as it is.")
      .def("norm_in_place", &Ops::norm_in_place, py::arg("x"), py::arg("weight") = none, py::arg("eps") = 1e-5f,
           py::kw_only(), py::arg("bias") = none, py::arg("kind") = "rms", "norm(x)")
      .def("add", &Ops::add, py::arg("x"), py::arg("y"), py::arg("scale"), py::arg("weight") = none,
           py::arg("eps") = 1e-5f, py::kw_only(), py::arg("bias") = none, py::arg("kind") = "rms",
           "x + scale * norm(y)")
      .def("scale_logits", &Ops::scale_logits, py::arg("logits"), py::arg("scale"), py::arg("softcap"),
           "scale * logits, then softcap * tanh(it / softcap) if softcap is not 0.")
      .def(
          "paged",
          [](Ops& self, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t block_size, int32_t blocks,
             const std::vector<float>& inv_freq,
             const std::vector<std::tuple<int32_t, int32_t, std::vector<int32_t>>>& seqs, const Floats& qkv,
             std::optional<float> scale, int32_t layers, int32_t layer, const std::string& kv_dtype,
             const py::kwargs& more) {
            std::vector<SeqChunk> chunks;
            for (const auto& [computed, length, table] : seqs) chunks.push_back({computed, length, table});
            return self.paged(heads, kv_heads, head_dim, block_size, blocks, inv_freq, chunks, qkv, scale, layers,
                              layer, kv_dtype, more);
          },
          py::kw_only(), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("block_size"),
          py::arg("blocks"), py::arg("inv_freq"), py::arg("seqs"), py::arg("qkv"), py::arg("scale") = none,
          py::arg("layers") = 1, py::arg("layer") = 0, py::arg("kv_dtype") = "auto",
          "begin, rope_write_kv and attention of chunks (computed, length, block table) laid end to end: the result\n"
          "[rows, heads * head_dim]. The KV cache lives on until a call with another cache shape. More arguments are\n"
          "those of attention_options().")
      .def("kv_cache", &Ops::kv_cache, "The bytes of the KV cache [blocks, bytes of a block], as paged() left them.")
      .def(
          "sample", &Ops::sample, py::arg("logits"), py::arg("rows"),
          "[(token, logprob, [(token, logprob)])] for logits [rows, vocab] and a dict a row: params (SamplingParams),\n"
          "tokens, prompt, stop_ids, target, top; what is left out is as in the native SampleRow, prompt all tokens.");
}
