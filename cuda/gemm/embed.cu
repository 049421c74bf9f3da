// Rows of an embedding table. Bytes: 2 of the table and 4 (8 when added) of x for each element; nothing is computed.
#include <cuda_runtime.h>

#include "cuda/device/launch.cuh"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/number.cuh"

namespace splitfuse::cuda {
namespace {

constexpr int kThreads = 256;

template <class Element>
__global__ void embed_kernel(const EmbedTask task) {
  wait_for_inputs();
  let_next_begin();
  const int64_t row = blockIdx.x;
  const int64_t index = int64_t{task.indices[row]} + task.offset;
  const uint16_t* from = static_cast<const uint16_t*>(task.table) + index * task.table_stride;
  float* x = task.x + row * task.x_stride;
  for (int32_t k = static_cast<int32_t>(threadIdx.x); k < task.depth; k += kThreads) {
    const float value = widen<Element>(from[k]);
    x[k] = task.add ? x[k] + value : task.scale * value;
  }
}

}  // namespace

void embed_rows(const EmbedTask& task, const GemmPlace& place) {
  if (task.rows == 0) return;
  Launch how;
  how.grid = dim3(static_cast<unsigned>(task.rows));
  how.block = dim3(kThreads);
  how.stream = place.stream;
  how.overlap = place.overlap;
  launch("embed_rows", task.half ? embed_kernel<__half> : embed_kernel<__nv_bfloat16>, how, task);
}

}  // namespace splitfuse::cuda
