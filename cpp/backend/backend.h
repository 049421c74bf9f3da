// The contract between the model and a device: compute operations at the fusion grain, eight of which make the layer of
// most families, and the housekeeping around them. Pointers are to the device's memory. Operations run in call order.
//
// Promise of every operation: the value of an output row depends on that row's inputs (for attention: on
// its sequence's keys and values up to its position) and on nothing else: not on the other rows, their
// number, the place of KV blocks, or the thread count. Bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/batch.h"
#include "splitfuse/config.h"
#include "splitfuse/engine.h"
#include "splitfuse/types.h"
#include "splitfuse/weights.h"

namespace splitfuse {

/// Elements from one row to the next, for every activation and logits buffer of `columns` columns. What lies
/// between is zero and stays zero, so that kernels may read past an odd column.
constexpr int64_t row_stride(int64_t columns) { return (columns + 31) / 32 * 32; }

/// A matrix [n, k] of weights in the device's own packed form, with an optional bias [n].
struct LinearShape {
  int32_t n = 0;
  int32_t k = 0;
  bool bias = false;
  bool gated = false;  // holds two matrices [n, k], gate and up, which linear_act() combines
  WeightFormat format = WeightFormat::kDense;
  Activation activation = Activation::kNone;  // of linear_act()
};
struct Linear : LinearShape {
  std::byte* data = nullptr;  // linear_bytes(shape) bytes, 64-byte aligned
};

/// Which rows of a Linear a tensor fills.
enum class Rows : uint8_t { kPlain, kGate, kUp };

/// The KV cache: `blocks` blocks, each of `block_size` positions for all layers and KV heads.
struct KvShape {
  int32_t layers = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  int32_t block_size = 0;
  int32_t blocks = 0;
  KvDType dtype = KvDType::kAuto;

  bool operator==(const KvShape&) const = default;
};

/// What stays the same over all steps of an engine.
struct StepLimits {
  int32_t max_rows = 0;  // rows of a ragged batch
  int32_t max_seqs = 0;
  int32_t max_context = 0;  // positions of a sequence
  int32_t max_logit_rows = 0;  // rows of one sample() call
  int32_t vocab = 0;
  int32_t integer_depth = 0;  // the largest k of a linear that is not kDense; 0: there is none
  int32_t experts = 0;  // of the largest experts() call, the shared one counted; 0: there is none
  int32_t experts_per_row = 0;  // of them, that a row may have
  int32_t expert_hidden = 0;  // width of the rows that go in and come out
  int32_t expert_intermediate = 0;  // the widest
};

/// A norm over the columns of a row. No weight: x as it is.
struct Norm {
  const float* weight = nullptr;  // [columns]
  const float* bias = nullptr;  // [columns], or none
  int32_t columns = 0;
  float eps = 0.0f;
  NormKind kind = NormKind::kRms;
};

/// The attention of one layer.
struct AttentionLayer {
  int32_t window = 0;  // a row sees the last `window` positions up to its own; 0: all
  int32_t rope = -1;  // index into AttentionShape::ropes; -1: no rotation
  QkNorm qk_norm = QkNorm::kNone;
  const float* q_norm = nullptr;  // [heads * head_dim]
  const float* k_norm = nullptr;  // [kv_heads * head_dim]
  const float* sinks = nullptr;  // [heads], or none: scores that take part in the softmax with nothing behind them
};

struct AttentionShape {
  /// Half-split rotary embedding: dimension i pairs with i + inv_freq.size(); what lies behind them stays.
  struct Rope {
    std::vector<float> inv_freq;  // at most head_dim / 2
    float magnitude = 1.0f;  // of cosines and sines
  };

  KvShape kv;
  int32_t heads = 0;  // a multiple of kv_heads
  float scale = 1.0f;  // of query-key products
  float softcap = 0.0f;  // scores s become softcap * tanh(s / softcap); 0: they don't
  std::vector<float> alibi_slopes;  // [heads] or none: slope * (position of key - of query) is added to scores
  std::vector<Rope> ropes;
  NormKind qk_norm_kind = NormKind::kRms;
  float qk_norm_eps = 0.0f;
  std::vector<AttentionLayer> layers;  // [kv.layers]
};

/// How a row's experts follow from its router logits; as MoeConfig has it.
struct Routing {
  int32_t experts = 0;  // without the shared one
  int32_t top_k = 0;
  Scoring scoring = Scoring::kSoftmax;
  bool normalize = false;
  float scale = 1.0f;
  int32_t groups = 1;
  int32_t top_groups = 1;
  const float* correction = nullptr;  // [experts], or none
  bool shared = false;  // expert number `experts` is every row's
  bool shared_gate = false;  // with the sigmoid of router logit `experts` as weight; else 1
};

/// A mixture of experts: a router [experts (+ 1), hidden] and an MLP for each expert, the shared one last.
struct Experts {
  Routing routing;
  Linear router;
  std::vector<Linear> in;  // [intermediate, hidden], with the activation
  std::vector<Linear> out;  // [hidden, intermediate]
};

/// One row of logits to choose from. Spans are host memory.
struct SampleRow {
  const SamplingParams* params = nullptr;
  std::span<const Token> tokens;  // prompt and output so far; their number is the position to be chosen
  int32_t prompt = 0;  // how many of them are prompt
  std::span<const Token> stop_ids;  // may not be chosen: output is shorter than min_tokens; empty otherwise
  Token target = -1;  // >= 0: choose nothing, report this token's log-probability
  int32_t top = -1;  // log-probabilities wanted: -1 none, 0 the token's, n the best n too
};

struct SampleResult {
  Token token = -1;  // the choice (or target); -1 if the logits hold NaN or no finite value
  float logprob = 0.0f;
  int32_t rank = 0;  // among the logits as they came: 1 is the best; 0 unless asked for
  int32_t top_count = 0;
  TokenLogprob top[kMaxLogprobs];  // best first, ties by lower id
};

/// Memory of the device, zeroed, owned.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(std::byte* data, int64_t size, std::function<void()> free)
      : data_(data), size_(size), free_(std::move(free)) {}
  ~DeviceBuffer() {
    if (free_) free_();
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept { swap(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  std::byte* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  void swap(DeviceBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    free_.swap(other.free_);
  }
  std::byte* data_ = nullptr;
  int64_t size_ = 0;
  std::function<void()> free_;
};

class Backend {
 public:
  virtual ~Backend() = default;

  // ---- Housekeeping
  /// One line for people: device, ISA, threads, number format.
  virtual std::string describe() const = 0;
  /// The kernels chosen for matrices in `weights`, an embedding table and head in `head`, and a KV cache of `kv`.
  virtual std::vector<KernelChoice> kernels(WeightFormat weights, WeightFormat head, KvDType kv) const = 0;
  /// Format of activations and weights; float32 or bfloat16.
  virtual DType dtype() const = 0;
  /// How often its threads have all waited for each other so far, modulo 2^32; 0 on other devices.
  virtual uint32_t barriers() const = 0;
  /// Bytes that could be taken now.
  virtual int64_t available() const = 0;
  virtual int64_t linear_bytes(const LinearShape& shape) const = 0;
  /// Bytes of one KV block over all layers.
  virtual int64_t kv_block_bytes(const KvShape& shape) const = 0;
  /// Bytes that prepare() will take for itself.
  virtual int64_t scratch_bytes(const AttentionShape& attention, const StepLimits& limits) const = 0;
  /// Throws MemoryError.
  virtual DeviceBuffer allocate(int64_t bytes) = 0;
  /// Takes every scratch byte; after it no operation allocates. `kv`: kv_block_bytes * blocks, zeroed.
  virtual void prepare(const AttentionShape& attention, const StepLimits& limits, std::byte* kv) = 0;
  /// Packs a host matrix [rows, k], of floats or integers, into rows [row, row + rows) of `linear`, in its format;
  /// integers of that format stay what they are.
  virtual void pack(const Linear& linear, Rows which, int32_t row, const TensorView& weight) = 0;
  /// The same for a bias [rows].
  virtual void pack_bias(const Linear& linear, Rows which, int32_t row, const TensorView& bias) = 0;
  /// Copies a host vector to `out`, as float32.
  virtual void upload(const TensorView& vector, float* out) = 0;
  /// Copies bytes as they are from device memory, after all operations so far, and to it. For tests: a step copies
  /// nothing that operations don't.
  virtual void read(const void* from, std::span<std::byte> out) = 0;
  virtual void write(std::span<const std::byte> bytes, void* to) = 0;

  // ---- One step
  /// Begins a step: takes the metadata, computes rotary angles of its positions, plans attention work.
  virtual void begin(const RaggedBatch& batch) = 0;
  /// x [rows, k] f32 = scale * the rows of `table` [n = vocab, k] that the batch's tokens name.
  virtual void embed(const Linear& table, float scale, float* x) = 0;
  /// x [rows, k] f32 += row `offset` + position of `table` [n, k], for each of the batch's positions.
  virtual void embed_positions(const Linear& table, int32_t offset, float* x) = 0;
  /// out [rows, columns], in the activations' format = norm(x) row by row; `rows` given: of these rows of x alone,
  /// closed up.
  virtual void norm(const Norm& norm, const float* x, std::span<const int32_t> rows, void* out) = 0;
  /// x [rows, columns] f32 = norm(x).
  virtual void norm_in_place(const Norm& norm, float* x) = 0;
  /// x [rows, columns] f32 += scale * norm(y).
  virtual void add(const Norm& norm, const float* y, float scale, float* x) = 0;
  /// out [rows, n] f32 = in [rows, k] W^T + bias.
  virtual void linear(const Linear& linear, const void* in, int32_t rows, float* out) = 0;
  /// x [rows, n] f32 += in [rows, k] W^T + bias.
  virtual void linear_add(const Linear& linear, const void* in, int32_t rows, float* x) = 0;
  /// out [rows, n], in the activations' format = act(in G^T + gate bias) * (in U^T + up bias) of a gated linear,
  /// act(in W^T + bias) of another.
  virtual void linear_act(const Linear& linear, const void* in, int32_t rows, void* out) = 0;
  /// qkv [rows, (heads + 2 kv_heads) * head_dim] f32, which it may overwrite: norms and rotates queries into
  /// q [rows, heads * head_dim] and keys, as `layer` has it, and writes keys and values to its KV cache.
  virtual void rope_write_kv(float* qkv, int32_t layer, void* q) = 0;
  /// out [rows, heads * head_dim] = causal attention of q over each row's sequence in the KV cache.
  virtual void attention(const void* q, int32_t layer, void* out) = 0;
  /// out [rows, hidden] f32 = the weighted sum of what each row's experts make of in [rows, hidden], added in ascending
  /// order of experts. A row's choice depends on its router logits alone.
  virtual void experts(const Experts& experts, const void* in, int32_t rows, float* out) = 0;
  /// logits [rows, vocab] f32 *= scale; then, if softcap is not 0, softcap * tanh(logits / softcap).
  virtual void scale_logits(float* logits, int32_t rows, float scale, float softcap) = 0;
  /// Chooses from logits [rows.size(), vocab] f32, which it may overwrite. Waits for the device.
  virtual void sample(float* logits, std::span<const SampleRow> rows, std::span<SampleResult> results) = 0;
};

/// Makes the CPU backend. Throws ConfigError for an unknown ISA, one this machine lacks, or a dtype other than
/// float32 and bfloat16. `threads` and `pin_threads` as in EngineConfig.
std::unique_ptr<Backend> make_cpu_backend(DType dtype, int threads, const std::string& isa, bool pin_threads = false);
/// Makes the CUDA backend, or throws ConfigError saying why there is none.
std::unique_ptr<Backend> make_cuda_backend(DType dtype);

}  // namespace splitfuse
