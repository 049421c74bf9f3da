// Inverse frequencies of rotary position embeddings.
#pragma once

#include <cstdint>
#include <vector>

#include "splitfuse/config.h"

namespace splitfuse {

/// inv_freq [head_dim / 2]: theta^(-2i / head_dim), rescaled as `rope.scaling` says: "linear" divides by the
/// factor; "llama3" keeps wavelengths below original_max_position / high_freq_factor, divides those above
/// original_max_position / low_freq_factor, and blends linearly in between (Llama 3.1).
std::vector<float> rope_inv_freq(const RopeConfig& rope, int32_t head_dim);

}  // namespace splitfuse
