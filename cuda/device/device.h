// Which device the backend runs on, and why not.
#pragma once

#include <cstdint>
#include <string>

namespace splitfuse::cuda {

/// What the runtime says of the machine: versions as 1000 * major + 10 * minor, 0 if there is no driver.
struct Machine {
  int driver = 0;
  int runtime = 0;
  int devices = 0;
  std::string error;   // of counting devices, empty if that worked
};

struct Device {
  std::string name;
  int major = 0;   // compute capability
  int minor = 0;
  int processors = 0;   // streaming multiprocessors
  int64_t memory = 0;
  int64_t shared_memory = 0;   // that one block may have
  bool runs_kernels = false;   // one of ours could be loaded

  /// Kernels for Hopper run on it: those of files named _sm90a.
  bool hopper() const { return major == 9 && minor == 0; }
};

/// Why nothing can run here; empty if something can.
std::string refusal(const Machine& machine);
/// Why the kernels cannot run on `device`; empty if they can.
std::string refusal(const Device& device);

Machine find_machine();
/// Takes the first device of those that CUDA_VISIBLE_DEVICES shows, for the calling thread as for every other. Throws
/// ConfigError saying what is missing.
Device choose_device();

/// For people: name, processors, memory, compute capability.
std::string describe(const Device& device);

}  // namespace splitfuse::cuda
