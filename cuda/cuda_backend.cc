#include "cuda/cuda_backend.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "base/check.h"
#include "cuda/device/check.h"
#include "cuda/ops/activation.h"
#include "cuda/ops/rows.h"

namespace splitfuse::cuda {
namespace {

/// Bytes of tokens and positions.
int64_t index_bytes(int64_t rows) { return rows * int64_t{sizeof(Token) + sizeof(int32_t)}; }

NormTask norm_task(const Norm& norm, const float* x, void* out, int32_t rows, NormUse use) {
  NormTask task;
  task.norm = {norm.weight, norm.bias, norm.columns, norm.eps, norm.kind == NormKind::kLayer};
  task.x = x;
  task.out = out;
  task.stride = row_stride(norm.columns);
  task.rows = rows;
  task.use = use;
  return task;
}

}  // namespace

CudaBackend::CudaBackend(DType dtype)
    : dtype_(dtype), device_(choose_device()), place_{device_.processors, stream_.get(), device_.major >= 9},
      linears_(dtype, device_, stream_.get()), experts_(dtype, linears_, place_),
      attention_(dtype, device_, stream_.get()), sampler_(place_) {}

std::string CudaBackend::describe() const { return cat("cuda, ", cuda::describe(device_), ", ", dtype_name(dtype_)); }

std::vector<KernelChoice> CudaBackend::kernels(WeightFormat weights, WeightFormat head, KvDType kv) const {
  const auto gemm = [&](const char* operation, WeightFormat format) -> KernelChoice {
    LinearShape shape;
    shape.format = format;
    (void)linears_.bytes(shape);   // throws for a format there are no kernels for
    return {operation, device_.hopper() ? "sm_90a" : "sm_80", cat(dtype_name(dtype_), ", ", linears_.kernel())};
  };
  if (kv != KvDType::kAuto) {
    throw ConfigError(
        cat("kv_dtype: the CUDA backend keeps keys and values in the activations' format, not as ", kv_dtype_name(kv)));
  }
  return {gemm("linear", weights),
          gemm("head", head),
          {"attention", "sm_80", cat(dtype_name(dtype_), " keys and values")},
          {"norms", "sm_80", dtype_name(dtype_)},
          {"sampling", "sm_80", dtype_name(DType::kF32)}};
}

int64_t CudaBackend::scratch_bytes(const AttentionShape& attention, const StepLimits& limits) const {
  return index_bytes(limits.max_rows) + experts_.scratch_bytes(limits) + attention_.scratch_bytes(attention, limits) +
         CudaSampler::scratch_bytes(limits);
}

DeviceBuffer CudaBackend::allocate(int64_t bytes) {
  auto memory = std::make_shared<Memory>(bytes);   // shared: a std::function must be copyable
  return {memory->data(), bytes, [memory]() mutable { memory.reset(); }};
}

void CudaBackend::prepare(const AttentionShape& attention, const StepLimits& limits, std::byte* kv) {
  indices_ = Memory(index_bytes(limits.max_rows));
  staged_ = PinnedMemory(index_bytes(limits.max_rows));
  experts_.prepare(limits);
  attention_.prepare(attention, limits, kv);
  sampler_.prepare(limits);
  max_rows_ = limits.max_rows;
  vocab_ = limits.vocab;
}

void CudaBackend::pack(const Linear& linear, Rows which, int32_t row, const TensorView& weight) {
  linears_.pack(linear, which, row, weight);
}

void CudaBackend::pack_bias(const Linear& linear, Rows which, int32_t row, const TensorView& bias) {
  linears_.pack_bias(linear, which, row, bias);
}

void CudaBackend::upload(const TensorView& vector, float* out) { linears_.upload(vector, out); }

void CudaBackend::read(const void* from, std::span<std::byte> out) {
  stream_.synchronize();
  SPLITFUSE_CUDA_CALL(cudaMemcpy(out.data(), from, out.size(), cudaMemcpyDeviceToHost));
}

void CudaBackend::write(std::span<const std::byte> bytes, void* to) {
  stream_.synchronize();
  SPLITFUSE_CUDA_CALL(cudaMemcpy(to, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  SPLITFUSE_CUDA_CALL(cudaStreamSynchronize(nullptr));   // of pageable memory, the copy may still be under way
}

void CudaBackend::begin(const RaggedBatch& batch) {
  rows_ = batch.rows();
  SPLITFUSE_ASSERT(rows_ <= max_rows_);
  sent_.synchronize();   // what the last step sent is no longer being read
  auto* const staged = reinterpret_cast<int32_t*>(staged_.data());
  std::copy(batch.positions.begin(), batch.positions.end(),
            std::copy(batch.tokens.begin(), batch.tokens.end(), staged));
  SPLITFUSE_CUDA_CALL(cudaMemcpyAsync(indices_.data(), staged, static_cast<size_t>(index_bytes(rows_)),
                                      cudaMemcpyHostToDevice, place_.stream));
  sent_.record(place_.stream);
  attention_.begin(batch);
}

void CudaBackend::embed(const Linear& table, float scale, float* x) {
  linears_.embed(table, reinterpret_cast<const int32_t*>(indices_.data()), rows_, scale, x);
}

void CudaBackend::embed_positions(const Linear& table, int32_t offset, float* x) {
  linears_.embed_positions(table, reinterpret_cast<const int32_t*>(indices_.data()) + rows_, rows_, offset, x);
}

void CudaBackend::norm(const Norm& norm, const float* x, std::span<const int32_t> rows, void* out) {
  const NormUse use = dtype_ == DType::kF16 ? NormUse::kF16 : NormUse::kBF16;
  const int32_t count = rows.empty() ? rows_ : static_cast<int32_t>(rows.size());
  NormTask task = norm_task(norm, x, out, count, use);
  task.list = rows.empty() ? nullptr : rows.data();
  norm_rows(task, place_);
}

void CudaBackend::norm_in_place(const Norm& norm, float* x) {
  if (norm.weight != nullptr) norm_rows(norm_task(norm, x, x, rows_, NormUse::kStore), place_);
}

void CudaBackend::add(const Norm& norm, const float* y, float scale, float* x) {
  NormTask task = norm_task(norm, y, x, rows_, NormUse::kAdd);
  task.scale = scale;
  norm_rows(task, place_);
}

void CudaBackend::linear(const Linear& linear, const void* in, int32_t rows, float* out) {
  linears_.multiply(linear, in, rows, GemmEpilogue::kStore, GemmActivation::kNone, out);
}

void CudaBackend::linear_add(const Linear& linear, const void* in, int32_t rows, float* x) {
  linears_.multiply(linear, in, rows, GemmEpilogue::kAdd, GemmActivation::kNone, x);
}

void CudaBackend::linear_act(const Linear& linear, const void* in, int32_t rows, void* out) {
  linears_.multiply(linear, in, rows, GemmEpilogue::kActivate, gemm_activation(linear.activation), out);
}

void CudaBackend::rope_write_kv(float* qkv, int32_t layer, void* q) { attention_.rope_write_kv(qkv, layer, q); }

void CudaBackend::attention(const void* q, int32_t layer, void* out) { attention_.attention(q, layer, out); }

void CudaBackend::experts(const Experts& experts, const void* in, int32_t rows, float* out) {
  experts_.run(experts, in, rows, out);
}

void CudaBackend::scale_logits(float* logits, int32_t rows, float scale, float softcap) {
  ScaleTask task;
  task.logits = logits;
  task.stride = row_stride(vocab_);
  task.rows = rows;
  task.columns = vocab_;
  task.scale = scale;
  task.cap = softcap;
  scale_rows(task, place_);
}

void CudaBackend::sample(float* logits, std::span<const SampleRow> rows, std::span<SampleResult> results) {
  sampler_.sample(logits, rows, results);
}

}  // namespace splitfuse::cuda
