// Paged attention for head_dim up to 128.
#include "cuda/attention/paged_sm80.cuh"

namespace splitfuse::cuda {

template void attend_tile<Tile128>(const PagedTask&, cudaStream_t, bool);
template void prepare_tile<Tile128>(bool);

}  // namespace splitfuse::cuda
