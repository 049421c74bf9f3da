#include "cuda/device/device.h"

#include <cuda_runtime_api.h>

#include "base/check.h"
#include "cuda/device/check.h"
#include "cuda/device/probe.h"
#include "splitfuse/types.h"

namespace splitfuse::cuda {
namespace {

std::string version(int number) { return cat(number / 1000, ".", number % 1000 / 10); }

ConfigError refused(const std::string& reason) {
  return ConfigError(cat("device \"cuda\": ", reason, "; or use device \"cpu\""));
}

}  // namespace

std::string refusal(const Machine& machine) {
  if (machine.driver == 0) return "no device: this machine has no NVIDIA driver; install one";
  if (machine.driver < machine.runtime && machine.devices == 0 && !machine.error.empty()) {
    return cat("the NVIDIA driver is for CUDA ", version(machine.driver), ", this build needs one for CUDA ",
               version(machine.runtime), " or later; update the driver");
  }
  if (machine.devices > 0) return {};
  return cat("no device", machine.error.empty() ? "" : cat(" (", machine.error, ")"),
             ": look at `nvidia-smi` and CUDA_VISIBLE_DEVICES");
}

std::string refusal(const Device& device) {
  if (device.major < 8) {
    return cat(device.name, " has compute capability ", device.major, ".", device.minor,
               ", the kernels need 8.0 or later (Ampere, Ada, Hopper)");
  }
  if (!device.runs_kernels) {
    return cat("this build has no kernels for ", device.name, ", whose compute capability is ", device.major, ".",
               device.minor, "; build splitfuse for it");
  }
  return {};
}

Machine find_machine() {
  Machine machine;
  SPLITFUSE_CUDA_CALL(cudaRuntimeGetVersion(&machine.runtime));
  SPLITFUSE_CUDA_CALL(cudaDriverGetVersion(&machine.driver));
  const cudaError_t status = cudaGetDeviceCount(&machine.devices);
  if (status != cudaSuccess) {
    (void)cudaGetLastError();
    machine.devices = 0;
    machine.error = cudaGetErrorString(status);
  }
  return machine;
}

Device choose_device() {
  const std::string missing = refusal(find_machine());
  if (!missing.empty()) throw refused(missing);
  SPLITFUSE_CUDA_CALL(cudaSetDevice(0));
  cudaDeviceProp properties{};
  SPLITFUSE_CUDA_CALL(cudaGetDeviceProperties(&properties, 0));
  Device device;
  device.name = properties.name;
  device.major = properties.major;
  device.minor = properties.minor;
  device.processors = properties.multiProcessorCount;
  device.memory = static_cast<int64_t>(properties.totalGlobalMem);
  device.shared_memory = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  device.runs_kernels = probe_loads();
  const std::string unfit = refusal(device);
  if (!unfit.empty()) throw refused(unfit);
  return device;
}

std::string describe(const Device& device) {
  constexpr int64_t kMiB = 1 << 20;
  return cat(device.name, ", ", device.processors, " SMs, ", device.memory / kMiB, " MiB, sm_", device.major,
             device.minor);
}

}  // namespace splitfuse::cuda
