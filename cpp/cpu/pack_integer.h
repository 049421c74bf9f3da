// One output channel of int8 or int4 weights, in and out of a panel (gemm.h has the layout).
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"
#include "base/integer_rows.h"
#include "cpu/pack.h"

namespace splitfuse {

int64_t integer_panel_bytes(WeightFormat format, int32_t depth, int32_t width);

/// Lays a row of `depth` weights, in `format`, into a column of the panel.
void place_channel(const IntegerRow& row, WeightFormat format, int32_t depth, int32_t column,
                   const PackedLayout& layout, std::byte* panel);
/// What weights [first, first + count) of a column stand for, as f32 [count].
void dequantize_channel(const std::byte* panel, WeightFormat format, int32_t first, int32_t count, int32_t column,
                        const PackedLayout& layout, float* out);

}  // namespace splitfuse
