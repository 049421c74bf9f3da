#include "cuda/gemm/linears.h"

#include <algorithm>
#include <string>

#include "base/check.h"
#include "cuda/gemm/convert.h"
#include "cuda/gemm/layout.h"

namespace splitfuse::cuda {
namespace {

void check_rows(const Linear& linear, Rows which, int32_t row, const TensorView& tensor, size_t rank) {
  const bool fits = tensor.shape.size() == rank && (rank == 1 || tensor.shape[1] == linear.k) && row >= 0 &&
                    tensor.shape[0] >= 0 && row + tensor.shape[0] <= linear.n &&
                    linear.gated == (which != Rows::kPlain);
  if (fits) return;
  std::string shape;
  for (int64_t size : tensor.shape) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  throw InvalidArgument(cat("a tensor [", shape, "] does not fit at row ", row, " of a ",
                            linear.gated ? "gated linear [" : "linear [", linear.n, ", ", linear.k, "]"));
}

}  // namespace

CudaLinears::CudaLinears(DType dtype, const Device& device, cudaStream_t stream)
    : dtype_(dtype), hopper_(device.hopper()), place_{device.processors, stream, device.major >= 9}, uploader_(stream) {
  if (dtype != DType::kBF16 && dtype != DType::kF16) {
    throw ConfigError(cat("dtype: the CUDA backend computes in bfloat16 or float16, not ", dtype_name(dtype)));
  }
  hopper_ ? prepare_gemm_sm90a() : prepare_gemm_sm80();
}

int64_t CudaLinears::bytes(const LinearShape& shape) const {
  if (shape.format != WeightFormat::kDense) {
    throw ConfigError(
        cat("quantize: the CUDA backend holds weights as they are, not as ", weight_format_name(shape.format)));
  }
  return DenseLayout(shape).bytes();
}

/// Sends rows [row, row + count) of `bytes` each to their places behind `to`. `fill(first, rows, slab)` puts some of
/// them, counted from `row`, into a slab.
template <class Fill>
void CudaLinears::send(const DenseLayout& layout, Rows which, int32_t row, int32_t count, int64_t bytes, std::byte* to,
                       const Fill& fill) {
  SPLITFUSE_ASSERT(bytes <= Uploader::kSlabBytes);
  const auto room = static_cast<int32_t>(Uploader::kSlabBytes / bytes);
  for (int32_t done = 0; done < count;) {
    const int32_t rows = std::min(room, count - done);
    std::byte* slab = uploader_.slab();
    fill(done, rows, slab);
    for (int32_t sent = 0; sent < rows;) {
      const int32_t at = row + done + sent;
      const int32_t run = layout.run(at, rows - sent);
      // Whole groups of a gated linear go at once.
      const int32_t runs = run == kGateGroup ? (rows - sent) / run : 1;
      uploader_.send(slab + sent * bytes, to + layout.place(which, at) * bytes, run * bytes, runs, 2 * run * bytes);
      sent += run * runs;
    }
    uploader_.turn();
    done += rows;
  }
}

void CudaLinears::pack(const Linear& linear, Rows which, int32_t row, const TensorView& weight) {
  check_rows(linear, which, row, weight, 2);
  const DenseLayout layout(linear);
  send(layout, which, row, static_cast<int32_t>(weight.shape[0]), layout.row_bytes(), linear.data,
       [&](int32_t first, int32_t rows, std::byte* slab) {
         convert_rows(weight, first, rows, dtype_, layout.stride(), slab);
       });
}

void CudaLinears::send_floats(const DenseLayout& layout, Rows which, int32_t row, const TensorView& vector,
                              std::byte* to) {
  send(layout, which, row, static_cast<int32_t>(vector.shape[0]), sizeof(float), to,
       [&](int32_t first, int32_t count, std::byte* slab) {
         convert_floats(vector, first, {reinterpret_cast<float*>(slab), static_cast<size_t>(count)});
       });
}

void CudaLinears::pack_bias(const Linear& linear, Rows which, int32_t row, const TensorView& bias) {
  if (!linear.bias) throw InvalidArgument("a bias for a linear that has none");
  check_rows(linear, which, row, bias, 1);
  const DenseLayout layout(linear);
  send_floats(layout, which, row, bias, linear.data + layout.bias_offset());
}

void CudaLinears::upload(const TensorView& vector, float* out) {
  send_floats(DenseLayout(LinearShape{}), Rows::kPlain, 0, vector, reinterpret_cast<std::byte*>(out));
}

EmbedTask CudaLinears::embed_task(const Linear& table, const int32_t* indices, int32_t rows, float* x) const {
  EmbedTask task;
  task.table = table.data;
  task.indices = indices;
  task.x = x;
  task.x_stride = row_stride(table.k);
  task.table_stride = DenseLayout(table).stride();
  task.rows = rows;
  task.depth = table.k;
  task.half = dtype_ == DType::kF16;
  return task;
}

void CudaLinears::embed(const Linear& table, const int32_t* tokens, int32_t rows, float scale, float* x) {
  EmbedTask task = embed_task(table, tokens, rows, x);
  task.scale = scale;
  embed_rows(task, place_);
}

void CudaLinears::embed_positions(const Linear& table, const int32_t* positions, int32_t rows, int32_t offset,
                                  float* x) {
  EmbedTask task = embed_task(table, positions, rows, x);
  task.offset = offset;
  task.add = true;
  embed_rows(task, place_);
}

void CudaLinears::multiply(const Linear& linear, const void* in, int32_t rows, GemmEpilogue epilogue,
                           GemmActivation activation, void* out) {
  SPLITFUSE_ASSERT(!linear.gated || epilogue == GemmEpilogue::kActivate);
  const DenseLayout layout(linear);
  GemmTask task;
  task.weights = linear.data;
  task.bias = linear.bias ? reinterpret_cast<const float*>(linear.data + layout.bias_offset()) : nullptr;
  task.in = in;
  task.out = out;
  task.in_stride = row_stride(linear.k);
  task.out_stride = row_stride(linear.n);
  task.weight_stride = layout.stride();
  task.rows = rows;
  task.columns = linear.n;
  task.weight_rows = layout.rows();
  task.depth = linear.k;
  task.epilogue = epilogue;
  task.activation = activation;
  task.gated = linear.gated;
  task.half = dtype_ == DType::kF16;
  hopper_ ? gemm_sm90a(task, place_) : gemm_sm80(task, place_);
}

}  // namespace splitfuse::cuda
