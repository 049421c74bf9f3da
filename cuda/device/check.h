// Every CUDA call is checked: what fails becomes one of the errors of splitfuse/types.h, with the call's name.
#pragma once

#include <cuda_runtime_api.h>

namespace splitfuse::cuda {

/// Throws MemoryError if the device is out of memory and Error for any other failure. `call`: as it stands in the
/// source; its name is what comes before the bracket.
void check(cudaError_t status, const char* call);

}  // namespace splitfuse::cuda

/// Calls a function of the CUDA runtime and throws if it fails.
#define SPLITFUSE_CUDA_CALL(call) ::splitfuse::cuda::check((call), #call)
