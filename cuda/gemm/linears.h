// The linear layers of the CUDA backend: how their weights get there and which kernel multiplies.
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "cuda/device/device.h"
#include "cuda/device/upload.h"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/layout.h"

namespace splitfuse::cuda {

class CudaLinears {
 public:
  /// `dtype`: of weights and activations, kBF16 or kF16. All work goes to `stream`. Throws ConfigError for any other.
  CudaLinears(DType dtype, const Device& device, cudaStream_t stream);

  /// Bytes of a Linear. Throws ConfigError for integer weights.
  int64_t bytes(const LinearShape& shape) const;
  /// As Backend's operations of these names. The tensor may go when they return.
  void pack(const Linear& linear, Rows which, int32_t row, const TensorView& weight);
  void pack_bias(const Linear& linear, Rows which, int32_t row, const TensorView& bias);
  /// `vector`, as float32, to device memory.
  void upload(const TensorView& vector, float* out);

  /// x [rows, k] f32 = scale * the rows of `table` that `tokens` [rows], device memory, name.
  void embed(const Linear& table, const int32_t* tokens, int32_t rows, float scale, float* x);
  /// x += the rows of `table` that offset + positions [rows], device memory, name.
  void embed_positions(const Linear& table, const int32_t* positions, int32_t rows, int32_t offset, float* x);
  /// out [rows, n] (epilogue) in [rows, k] W^T, on rows of row_stride(). kActivate: with `activation`.
  void multiply(const Linear& linear, const void* in, int32_t rows, GemmEpilogue epilogue, GemmActivation activation,
                void* out);

  /// For people: the instruction that multiplies.
  const char* kernel() const { return hopper_ ? "wgmma" : "mma.sync"; }

 private:
  EmbedTask embed_task(const Linear& table, const int32_t* indices, int32_t rows, float* x) const;
  template <class Fill>
  void send(const DenseLayout& layout, Rows which, int32_t row, int32_t count, int64_t bytes, std::byte* to,
            const Fill& fill);
  void send_floats(const DenseLayout& layout, Rows which, int32_t row, const TensorView& vector, std::byte* to);

  DType dtype_;
  bool hopper_;
  GemmPlace place_;
  Uploader uploader_;
};

}  // namespace splitfuse::cuda
