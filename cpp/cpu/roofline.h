// What this machine could do at best, measured: the roof that kernels are compared with.
#pragma once

#include "cpu/isa.h"
#include "splitfuse/types.h"

namespace splitfuse {

struct Roofline {
  double read_gbps = 0;     // 1e9 bytes a second read from memory
  double peak_gflops = 0;   // 1e9 operations a second of the weight format's multiply-add, on registers alone
};

/// Runs all `threads` (0: usable_cores()) for about `seconds` in all and takes the best short pass of each kind. Reads
/// walk round 512 MiB. Throws MemoryError if they cannot be had.
Roofline measure_roofline(DType dtype, WeightFormat format, int threads, Isa isa, double seconds);

}  // namespace splitfuse
