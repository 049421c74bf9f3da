// The CUDA backend: the Backend contract on the first device that CUDA_VISIBLE_DEVICES shows, in one stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "cuda/attention/attention.h"
#include "cuda/device/device.h"
#include "cuda/device/memory.h"
#include "cuda/device/stream.h"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/linears.h"
#include "cuda/ops/expert_ops.h"
#include "cuda/ops/sampler.h"

namespace splitfuse::cuda {

/// Operations return before the device is done with them, but for sample(); what went wrong on the device is thrown
/// by a later one.
class CudaBackend final : public Backend {
 public:
  /// Throws ConfigError if there is no device that can be used, or for a dtype other than bfloat16 and float16.
  explicit CudaBackend(DType dtype);

  std::string describe() const override;
  std::vector<KernelChoice> kernels(WeightFormat weights, WeightFormat head, KvDType kv) const override;
  DType dtype() const override { return dtype_; }
  uint32_t barriers() const override { return 0; }
  int64_t available() const override { return available_device_memory(); }
  int64_t linear_bytes(const LinearShape& shape) const override { return linears_.bytes(shape); }
  int64_t kv_block_bytes(const KvShape& shape) const override { return CudaAttention::block_bytes(shape, dtype_); }
  int64_t scratch_bytes(const AttentionShape& attention, const StepLimits& limits) const override;
  DeviceBuffer allocate(int64_t bytes) override;
  void prepare(const AttentionShape& attention, const StepLimits& limits, std::byte* kv) override;
  void pack(const Linear& linear, Rows which, int32_t row, const TensorView& weight) override;
  void pack_bias(const Linear& linear, Rows which, int32_t row, const TensorView& bias) override;
  void upload(const TensorView& vector, float* out) override;
  void read(const void* from, std::span<std::byte> out) override;
  void write(std::span<const std::byte> bytes, void* to) override;

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

 private:
  DType dtype_;
  Device device_;
  Stream stream_;
  GemmPlace place_;
  CudaLinears linears_;
  CudaExperts experts_;
  CudaAttention attention_;
  CudaSampler sampler_;
  Memory indices_;  // of a step: tokens [rows], positions [rows]
  PinnedMemory staged_;  // the same on their way
  Event sent_;  // they are
  int32_t rows_ = 0;
  int32_t max_rows_ = 0;
  int32_t vocab_ = 0;
};

}  // namespace splitfuse::cuda
