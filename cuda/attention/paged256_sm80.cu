// Paged attention for head_dim up to 256.
#include "cuda/attention/paged_sm80.cuh"

namespace splitfuse::cuda {

template void attend_tile<Tile256>(const PagedTask&, cudaStream_t, bool);
template void prepare_tile<Tile256>(bool);
template void attend_tile<Narrow256>(const PagedTask&, cudaStream_t, bool);
template void prepare_tile<Narrow256>(bool);

}  // namespace splitfuse::cuda
