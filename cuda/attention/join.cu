// Joins the states of split rows, segment after segment. Bytes: 4 (head_dim + 2) for each segment of a row; a warp has
// a row, and the order is the one in which a block that sees all segments of a row joins them.
#include <cuda_runtime.h>

#include "cuda/attention/paged.h"
#include "cuda/attention/softmax.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/gemm/number.cuh"

namespace splitfuse::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kPairs = kMaxHeadDim / 64;   // of neighbouring dimensions, that a lane has at most

template <class Element>
__global__ __launch_bounds__(kWarps * 32) void join_kernel(const PagedTask task) {
  wait_for_inputs();
  const JoinItem join = task.joins[blockIdx.x];
  const int32_t kv_head = static_cast<int32_t>(blockIdx.y);
  const int32_t row = static_cast<int32_t>(blockIdx.z) * kWarps + static_cast<int32_t>(threadIdx.x) / 32;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  if (row >= join.rows) return;

  const int64_t first = kv_head * task.states + join.state + row;
  float top = no_score();
  float sum = 0.0f;
  float values[kPairs][2] = {};
#pragma unroll 4
  for (int32_t segment = 0; segment < join.segments; ++segment) {
    const int64_t state = first + int64_t{segment} * join.rows;
    const float2 sums = *reinterpret_cast<const float2*>(task.state_sums + state * 2);
    const Join joined(top, sums.x);
    top = joined.top;
    sum = joined(sum, sums.y);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int32_t dim = i * 64 + lane * 2;
      if (dim < task.head_dim) {
        const float2 more = *reinterpret_cast<const float2*>(task.state_values + state * task.head_dim + dim);
        values[i][0] = joined(values[i][0], more.x);
        values[i][1] = joined(values[i][1], more.y);
      }
    }
  }
  let_next_begin();

  const int32_t index = join.first_row + row;
  const int32_t head = kv_head * task.group + index % task.group;
  const float scale = result_scale(top, sum, task.sinks == nullptr ? nullptr : task.sinks + head);
  const int64_t at = (join.batch_row + int64_t{index / task.group}) * task.row_stride + int64_t{head} * task.head_dim;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int32_t dim = i * 64 + lane * 2;
    if (dim < task.head_dim) {
      *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(task.out) + at + dim) =
          pack_two<Element>(result_of(values[i][0], scale), result_of(values[i][1], scale));
    }
  }
}

}  // namespace

void join_states(const PagedTask& task, cudaStream_t stream, bool overlap) {
  if (task.join_count == 0) return;
  Launch how;
  how.grid = dim3(static_cast<unsigned>(task.join_count), static_cast<unsigned>(task.kv_heads),
                  static_cast<unsigned>((task.tile_rows + kWarps - 1) / kWarps));
  how.block = dim3(kWarps * 32);
  how.stream = stream;
  how.overlap = overlap;
  launch("join_states", task.half ? join_kernel<__half> : join_kernel<__nv_bfloat16>, how, task);
}

}  // namespace splitfuse::cuda
