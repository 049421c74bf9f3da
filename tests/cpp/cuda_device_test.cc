// What the CUDA backend says where it cannot run. No GPU is needed, and none is looked at: the test hides them.
#include "cuda/device/device.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "backend/backend.h"
#include "cuda/device/check.h"
#include "splitfuse/types.h"

namespace splitfuse {
namespace {

using cuda::Device;
using cuda::Machine;
using cuda::refusal;

bool says(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST(Cuda, NoDeviceIsAConfigErrorThatSaysSo) {
  setenv("CUDA_VISIBLE_DEVICES", "", 1);
  try {
    make_cuda_backend(DType::kBF16);
    FAIL() << "a backend without a device";
  } catch (const ConfigError& error) {
    EXPECT_PRED2(says, error.what(), "no device");
    EXPECT_PRED2(says, error.what(), "use device \"cpu\"");
  }
}

TEST(Cuda, AMachineIsRefusedForWhatItLacks) {
  EXPECT_PRED2(says, refusal(Machine{0, 13000, 0, "driver version is insufficient"}), "no NVIDIA driver");
  EXPECT_PRED2(says, refusal(Machine{12080, 13000, 0, "driver version is insufficient"}), "driver is for CUDA 12.8");
  EXPECT_PRED2(says, refusal(Machine{13000, 13000, 0, "no CUDA-capable device is detected"}), "CUDA_VISIBLE_DEVICES");
  EXPECT_EQ(refusal(Machine{13000, 13000, 1, ""}), "");
  EXPECT_EQ(refusal(Machine{13020, 13000, 8, ""}), "");
}

TEST(Cuda, ADeviceIsRefusedForWhatItLacks) {
  Device device{"Example", 7, 5, 40, int64_t{16} << 30, 64 << 10, true};
  EXPECT_PRED2(says, refusal(device), "Example has compute capability 7.5, the kernels need 8.0");
  device.major = 12;
  device.runs_kernels = false;
  EXPECT_PRED2(says, refusal(device), "no kernels for Example, whose compute capability is 12.5");
  device.major = 9;
  device.minor = 0;
  device.runs_kernels = true;
  EXPECT_EQ(refusal(device), "");
  EXPECT_EQ(cuda::describe(device), "Example, 40 SMs, 16384 MiB, sm_90");
}

TEST(Cuda, AFailedCallIsAnErrorWithItsName) {
  EXPECT_NO_THROW(cuda::check(cudaSuccess, "cudaFree(p)"));
  try {
    cuda::check(cudaErrorInvalidValue, "cudaMemcpyAsync(to, from, size(x))");
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_PRED2(says, error.what(), "cudaMemcpyAsync failed: ");
    EXPECT_PRED2(says, error.what(), "cudaErrorInvalidValue");
  }
  EXPECT_THROW(cuda::check(cudaErrorMemoryAllocation, "cudaMalloc(&p, 1)"), MemoryError);
}

}  // namespace
}  // namespace splitfuse
