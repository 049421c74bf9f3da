// One output channel of int8 or int4 weights, in and out of a panel (gemm.h has the layout).
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"

namespace splitfuse {

int64_t integer_panel_bytes(WeightFormat format, int32_t depth, int32_t width);

/// Quantizes `weights` [depth] into a column of the panel. int8: symmetric, by the largest magnitude of the channel.
/// int4: each 32 get the scale and minimum that fit them best (see fit_int4 in the source). A channel, or 32, that
/// holds a NaN or an infinity becomes NaN.
void quantize_channel(const float* weights, WeightFormat format, int32_t depth, int32_t column, int32_t width,
                      std::byte* panel);
/// What a column stands for, as f32 [depth].
void dequantize_channel(const std::byte* panel, WeightFormat format, int32_t depth, int32_t column, int32_t width,
                        float* out);

}  // namespace splitfuse
