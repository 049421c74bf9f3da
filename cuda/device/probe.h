// A kernel that is compiled as all are, to find out whether a device takes them.
#pragma once

namespace splitfuse::cuda {

/// Whether the current device has code of ours. Throws Error if it cannot be asked.
bool probe_loads();

}  // namespace splitfuse::cuda
