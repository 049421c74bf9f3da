// Stands in for the CUDA backend in builds without it, so that callers need no conditional compilation.
#include <memory>

#include "backend/backend.h"

namespace splitfuse {

std::unique_ptr<Backend> make_cuda_backend(DType /*dtype*/) {
  throw ConfigError("device \"cuda\": this build of splitfuse has no CUDA backend; use device \"cpu\"");
}

}  // namespace splitfuse
