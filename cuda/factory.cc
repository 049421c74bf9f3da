// The factory of a build with CUDA.
#include <memory>

#include "backend/backend.h"
#include "base/check.h"
#include "cuda/device/device.h"

namespace splitfuse {

std::unique_ptr<Backend> make_cuda_backend(DType /*dtype*/) {
  const cuda::Device device = cuda::choose_device();
  throw ConfigError(cat("device \"cuda\": this version has kernels for ", cuda::describe(device),
                        " but no backend made of them; use device \"cpu\""));
}

}  // namespace splitfuse
