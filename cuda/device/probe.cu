#include "cuda/device/check.h"
#include "cuda/device/probe.h"

namespace splitfuse::cuda {
namespace {

__global__ void probe_kernel() {}

}  // namespace

bool probe_loads() {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    (void)cudaGetLastError();
    return false;
  }
  check(status, "cudaFuncGetAttributes");
  return true;
}

}  // namespace splitfuse::cuda
