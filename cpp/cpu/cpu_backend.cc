#include "cpu/cpu_backend.h"

#include <memory>
#include <utility>

#include "base/check.h"
#include "base/memory.h"
#include "cpu/pack.h"
#include "splitfuse/config.h"

namespace splitfuse {

CpuBackend::CpuBackend(DType dtype, int threads, Isa isa, bool pin_threads)
    : dtype_(dtype), isa_(isa), pool_(threads, pin_threads), linears_(dtype, isa, pool_),
      experts_(dtype, linears_, pool_), rows_(dtype, isa, pool_), attention_(dtype, isa, pool_), sampler_(isa, pool_) {}

std::string CpuBackend::describe() const {
  return cat("cpu, ", isa_name(isa_), ", ", pool_.size(), pool_.pinned() ? " pinned" : "",
             pool_.size() == 1 ? " thread, " : " threads, ", dtype_name(dtype_));
}

std::vector<KernelChoice> CpuBackend::kernels(WeightFormat weights, WeightFormat head, KvDType kv) const {
  const auto gemm = [&](const char* operation, WeightFormat format) -> KernelChoice {
    const GemmKernel& kernel = linears_.kernel(format);
    const std::string name = format == WeightFormat::kDense ? dtype_name(dtype_) : weight_format_name(format);
    return {operation, isa_name(kernel.isa), cat(name, ", ", kernel.width, " columns x ", kernel.row_tile, " rows")};
  };
  const std::string cache = kv == KvDType::kAuto ? dtype_name(dtype_) : kv_dtype_name(kv);
  return {gemm("linear", weights),
          gemm("head", head),
          {"attention", isa_name(attention_.kernel_isa(kv)), cat(cache, " keys and values")},
          {"norms", isa_name(rows_.kernel_isa()), dtype_name(dtype_)},
          {"sampling", isa_name(sampler_.kernel_isa()), dtype_name(DType::kF32)}};
}

int64_t CpuBackend::available() const { return available_memory(); }

int64_t CpuBackend::scratch_bytes(const AttentionShape& attention, const StepLimits& limits) const {
  return linears_.scratch_bytes(limits) + experts_.scratch_bytes(limits) + attention_.scratch_bytes(attention, limits) +
         sampler_.scratch_bytes(limits);
}

DeviceBuffer CpuBackend::allocate(int64_t bytes) {
  auto memory = std::make_shared<Memory>(bytes, &pool_);   // shared: a std::function must be copyable
  return {memory->data(), bytes, [memory]() mutable { memory.reset(); }};
}

void CpuBackend::prepare(const AttentionShape& attention, const StepLimits& limits, std::byte* kv) {
  linears_.prepare(limits);
  experts_.prepare(limits);
  attention_.prepare(attention, limits, kv);
  sampler_.prepare(limits);
  vocab_ = limits.vocab;
}

void CpuBackend::pack(const Linear& linear, Rows which, int32_t row, const TensorView& weight) {
  linears_.pack(linear, which, row, weight);
}

void CpuBackend::pack_bias(const Linear& linear, Rows which, int32_t row, const TensorView& bias) {
  linears_.pack_bias(linear, which, row, bias);
}

void CpuBackend::upload(const TensorView& vector, float* out) { to_f32(vector, out); }

void CpuBackend::begin(const RaggedBatch& batch) {
  batch_ = batch;
  attention_.begin(batch);
}

void CpuBackend::embed(const Linear& table, float scale, float* x) { linears_.embed(table, batch_.tokens, scale, x); }

void CpuBackend::embed_positions(const Linear& table, int32_t offset, float* x) {
  linears_.embed_positions(table, batch_.positions, offset, x);
}

void CpuBackend::norm(const Norm& norm, const float* x, std::span<const int32_t> rows, void* out) {
  rows_.norm(norm, x, batch_.rows(), rows, out);
}

void CpuBackend::norm_in_place(const Norm& norm, float* x) { rows_.norm_in_place(norm, batch_.rows(), x); }

void CpuBackend::add(const Norm& norm, const float* y, float scale, float* x) {
  rows_.add(norm, y, scale, batch_.rows(), x);
}

void CpuBackend::scale_logits(float* logits, int32_t rows, float scale, float softcap) {
  rows_.scale_logits(logits, rows, vocab_, scale, softcap);
}

void CpuBackend::linear(const Linear& linear, const void* in, int32_t rows, float* out) {
  linears_.multiply(linear, in, rows, Epilogue::kStore, out);
}

void CpuBackend::linear_add(const Linear& linear, const void* in, int32_t rows, float* x) {
  linears_.multiply(linear, in, rows, Epilogue::kAdd, x);
}

void CpuBackend::linear_act(const Linear& linear, const void* in, int32_t rows, void* out) {
  linears_.multiply(linear, in, rows, Epilogue::kAct, out);
}

void CpuBackend::experts(const Experts& experts, const void* in, int32_t rows, float* out) {
  experts_.run(experts, in, rows, out);
}

void CpuBackend::rope_write_kv(float* qkv, int32_t layer, void* q) { attention_.rope_write_kv(qkv, layer, q); }

void CpuBackend::attention(const void* q, int32_t layer, void* out) { attention_.attention(q, layer, out); }

void CpuBackend::sample(float* logits, std::span<const SampleRow> rows, std::span<SampleResult> results) {
  sampler_.sample(logits, rows, results);
}

std::unique_ptr<Backend> make_cpu_backend(DType dtype, int threads, const std::string& isa, bool pin_threads) {
  if (dtype != DType::kF32 && dtype != DType::kBF16) {
    throw ConfigError(cat("dtype: the CPU backend computes in float32 or bfloat16, not ", dtype_name(dtype)));
  }
  if (threads < 0)
    throw ConfigError(cat("threads: ", threads, " is not a number of threads; 0 means all usable cores"));
  return std::make_unique<CpuBackend>(dtype, threads, isa_from_name(isa), pin_threads);
}

}  // namespace splitfuse
