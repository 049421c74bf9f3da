// The factory of a build with CUDA.
#include <memory>

#include "cuda/cuda_backend.h"

namespace splitfuse {

std::unique_ptr<Backend> make_cuda_backend(DType dtype) { return std::make_unique<cuda::CudaBackend>(dtype); }

}  // namespace splitfuse
