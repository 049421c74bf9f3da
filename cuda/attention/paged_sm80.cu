// Which kernel attends, and that for head_dim up to 64.
#include "cuda/attention/paged_sm80.cuh"

namespace splitfuse::cuda {

template void attend_tile<Tile64>(const PagedTask&, cudaStream_t, bool);
template void prepare_tile<Tile64>(bool);

void prepare_paged(int32_t head_dim, int32_t tile_rows, bool half) {
  switch (paged_dim(head_dim)) {
    case 64:
      return prepare_tile<Tile64>(half);
    case 128:
      return prepare_tile<Tile128>(half);
    default:
      return tile_rows == Tile256::kRows ? prepare_tile<Tile256>(half) : prepare_tile<Narrow256>(half);
  }
}

void attend_paged(const PagedTask& task, cudaStream_t stream, bool overlap) {
  if (task.item_count == 0) return;
  switch (paged_dim(task.head_dim)) {
    case 64:
      return attend_tile<Tile64>(task, stream, overlap);
    case 128:
      return attend_tile<Tile128>(task, stream, overlap);
    default:
      return task.tile_rows == Tile256::kRows ? attend_tile<Tile256>(task, stream, overlap)
                                              : attend_tile<Narrow256>(task, stream, overlap);
  }
}

}  // namespace splitfuse::cuda
