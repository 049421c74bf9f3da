#include "cuda/device/check.h"

#include <string>

#include "base/check.h"
#include "splitfuse/types.h"

namespace splitfuse::cuda {

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  // Also cleared, so that it is not taken for a fault of the next launch.
  (void)cudaGetLastError();
  const std::string text = call;
  const std::string message = cat("CUDA: ", text.substr(0, text.find('(')), " failed: ", cudaGetErrorString(status),
                                  " (", cudaGetErrorName(status), ")");
  if (status == cudaErrorMemoryAllocation) throw MemoryError(message);
  throw Error(message);
}

}  // namespace splitfuse::cuda
