// The CPU backend: the Backend contract on the kernels of one rung of the ISA ladder and one thread pool.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>

#include "backend/backend.h"
#include "base/thread_pool.h"
#include "cpu/attention.h"
#include "cpu/experts.h"
#include "cpu/isa.h"
#include "cpu/linear.h"
#include "cpu/rows.h"
#include "cpu/sampler.h"

namespace splitfuse {

class CpuBackend final : public Backend {
 public:
  CpuBackend(DType dtype, int threads, Isa isa, bool pin_threads);

  std::string describe() const override;
  std::vector<KernelChoice> kernels(WeightFormat weights, WeightFormat head, KvDType kv) const override;
  DType dtype() const override { return dtype_; }
  uint32_t barriers() const override { return pool_.barriers(); }
  int64_t available() const override;
  int64_t linear_bytes(const LinearShape& shape) const override { return linears_.bytes(shape); }
  int64_t kv_block_bytes(const KvShape& shape) const override { return PagedAttention::block_bytes(shape, dtype_); }
  int64_t scratch_bytes(const AttentionShape& attention, const StepLimits& limits) const override;
  DeviceBuffer allocate(int64_t bytes) override;
  void prepare(const AttentionShape& attention, const StepLimits& limits, std::byte* kv) override;
  void pack(const Linear& linear, Rows which, int32_t row, const TensorView& weight) override;
  void pack_bias(const Linear& linear, Rows which, int32_t row, const TensorView& bias) override;
  void upload(const TensorView& vector, float* out) override;
  void read(const void* from, std::span<std::byte> out) override { std::memcpy(out.data(), from, out.size()); }
  void write(std::span<const std::byte> bytes, void* to) override { std::memcpy(to, bytes.data(), bytes.size()); }

  void begin(const RaggedBatch& batch) override;
  void embed(const Linear& table, float scale, float* x) override;
  void embed_positions(const Linear& table, int32_t offset, float* x) override;
  void norm(const Norm& norm, const float* x, std::span<const int32_t> rows, void* out) override;
  void norm_in_place(const Norm& norm, float* x) override;
  void add(const Norm& norm, const float* y, float scale, float* x) override;
  void linear(const Linear& linear, const void* in, int32_t rows, float* out) override;
  void linear_add(const Linear& linear, const void* in, int32_t rows, float* x) override;
  void linear_act(const Linear& linear, const void* in, int32_t rows, void* out) override;
  void rope_write_kv(float* qkv, int32_t layer, void* q) override;
  void attention(const void* q, int32_t layer, void* out) override;
  void experts(const Experts& experts, const void* in, int32_t rows, float* out) override;
  void scale_logits(float* logits, int32_t rows, float scale, float softcap) override;
  void sample(float* logits, std::span<const SampleRow> rows, std::span<SampleResult> results) override;

  ThreadPool& pool() { return pool_; }

 private:
  DType dtype_;
  Isa isa_;
  ThreadPool pool_;
  LinearOps linears_;
  ExpertOps experts_;
  RowOps rows_;
  PagedAttention attention_;
  Sampler sampler_;
  RaggedBatch batch_;
  int32_t vocab_ = 0;
};

}  // namespace splitfuse
