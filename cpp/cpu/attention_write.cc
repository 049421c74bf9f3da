// Rows of qkv on their way to attention: queries to q, keys and values to their blocks.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/check.h"
#include "cpu/attention.h"

namespace splitfuse {
namespace {

// Keys and values of one head at positions that lie in one column: [count][padded_dim], in the cache's format.
template <class Cell>
struct ColumnPart {
  const Cell* keys;
  const Cell* values;
  int64_t count;
};

// Writes them to a head's block, from its position `within` on.
template <class Cell>
void write_kv(const KvLayout& layout, std::byte* head, int64_t within, const ColumnPart<Cell>& part) {
  const int64_t stride = layout.padded_dim;
  auto* const values = reinterpret_cast<Cell*>(head + layout.value_offset);
  // In bfloat16 and int8 two dimensions of a key move as one.
  constexpr int64_t kTogether = sizeof(Cell) == 4 ? 1 : 2;
  for (int64_t d = 0; d < layout.head_dim; d += kTogether) {
    Cell* out = reinterpret_cast<Cell*>(head) + d * layout.block_size + within * kTogether;
    for (int64_t i = 0; i < part.count; ++i) {
      std::memcpy(out + i * kTogether, part.keys + i * stride + d, kTogether * sizeof(Cell));
    }
  }
  if constexpr (sizeof(Cell) == 4) {
    for (int64_t i = 0; i < part.count; ++i) {
      std::copy_n(part.values + i * stride, layout.head_dim, values + (within + i) * stride);
    }
  } else {
    for (int64_t i = 0; i < part.count; ++i) {
      const int64_t key = within + i;
      Cell* out = values + key / 2 * stride * 2;
      const Cell* in = part.values + i * stride;
      if (key % 2 == 0 && i + 1 < part.count) {
        for (int64_t d = 0; d < layout.head_dim; ++d) {
          out[2 * d] = in[d];
          out[2 * d + 1] = in[stride + d];
        }
        ++i;
      } else {
        for (int64_t d = 0; d < layout.head_dim; ++d) out[2 * d + key % 2] = in[d];
      }
    }
  }
}

}  // namespace

void PagedAttention::rope_write_kv(float* qkv, int32_t layer, void* q) {
  if (shape_.kv.dtype == KvDType::kInt8) return rope_write<int8_t>(qkv, layer, q);
  dtype_ == DType::kF32 ? rope_write<float>(qkv, layer, q) : rope_write<uint16_t>(qkv, layer, q);
}

// Norms `count` heads of a row, each or all together, and rotates them.
void PagedAttention::turn(float* heads, int32_t count, const float* weight, const AttentionLayer& layer,
                          int64_t row) const {
  const int32_t dim = layout_.head_dim;
  const int32_t span = layer.qk_norm == QkNorm::kRow ? count * dim : dim;
  const bool centered = shape_.qk_norm_kind == NormKind::kLayer;
  for (int32_t at = 0; layer.qk_norm != QkNorm::kNone && at < count * dim; at += span) {
    kernels_.norm(heads + at, weight + at, span, centered, shape_.qk_norm_eps);
  }
  if (layer.rope < 0) return;
  const auto rope = static_cast<size_t>(layer.rope);
  const auto pairs = static_cast<int32_t>(shape_.ropes[rope].inv_freq.size());
  const float* cos = angles_ + row * angle_columns_ + angle_at_[rope];
  for (int32_t head = 0; head < count; ++head) kernels_.rotate(heads + head * dim, cos, cos + pairs, pairs);
}

template <class Cell>
void PagedAttention::rope_write(float* qkv, int32_t layer, void* q) {
  pool_.run_parts(batch_.rows(), [&](int thread, int64_t first, int64_t past) {
    const AttentionLayer& how = shape_.layers[static_cast<size_t>(layer)];
    const int32_t dim = layout_.head_dim;
    const int64_t q_stride = row_stride(int64_t{shape_.heads} * dim);
    const int64_t in_stride = row_stride((int64_t{shape_.heads} + 2 * shape_.kv.kv_heads) * dim);
    for (int64_t row = first; row < past; ++row) {
      float* const queries = qkv + row * in_stride;
      turn(queries, shape_.heads, how.q_norm, how, row);
      turn(queries + int64_t{shape_.heads} * dim, shape_.kv.kv_heads, how.k_norm, how, row);
      kernels_.convert(queries, shape_.heads * dim, static_cast<std::byte*>(q) + row * q_stride * dtype_size(dtype_));
    }
    for (const RaggedSeq& seq : batch_.seqs) {
      int64_t row = std::max<int64_t>(first, seq.begin);
      const int64_t end = std::min<int64_t>(past, seq.begin + seq.length);
      while (row < end) {
        // As many rows as lie in one column of keys.
        const int64_t position = seq.computed + row - seq.begin;
        const int64_t count = std::min(end - row, kAttentionColumn - position % kAttentionColumn);
        rope_write_column<Cell>(qkv, layer, row, count, seq.block_table[position / layout_.block_size],
                                position % layout_.block_size, thread);
        row += count;
      }
    }
  });
}

template <class Cell>
void PagedAttention::rope_write_column(const float* qkv, int32_t layer, int64_t row, int64_t count, int32_t block,
                                       int64_t within, int thread) {
  const int64_t dim = layout_.head_dim;
  const int64_t heads = shape_.heads;
  const int64_t kv_heads = shape_.kv.kv_heads;
  const int64_t in_stride = row_stride((heads + 2 * kv_heads) * dim);
  auto* const keys = reinterpret_cast<Cell*>(scratch_ + thread_floats_ * thread);
  Cell* const values = keys + kAttentionColumn * layout_.padded_dim;
  std::byte* const at = kv_ + block * layout_.block_bytes + layer * layout_.layer_bytes;
  for (int64_t head = 0; head < kv_heads; ++head) {
    std::byte* const out = at + head * layout_.head_bytes;
    for (int64_t i = 0; i < count; ++i) {
      Cell* const key = keys + i * layout_.padded_dim;
      Cell* const value = values + i * layout_.padded_dim;
      const float* const key_in = qkv + (row + i) * in_stride + (heads + head) * dim;
      const float* const value_in = key_in + kv_heads * dim;
      if constexpr (sizeof(Cell) == 1) {
        float* const key_scale = reinterpret_cast<float*>(out + layout_.scale_offset) + within + i;
        float* const value_scale = key_scale + layout_.block_size;
        kernels_.quantize(key_in, layout_.head_dim, key, key_scale);
        kernels_.quantize(value_in, layout_.head_dim, value, value_scale);
        if (std::isnan(*key_scale + *value_scale)) *key_scale = *value_scale = std::numeric_limits<float>::quiet_NaN();
      } else {
        kernels_.convert(key_in, layout_.head_dim, key);
        kernels_.convert(value_in, layout_.head_dim, value);
      }
    }
    write_kv(layout_, out, within, ColumnPart<Cell>{keys, values, count});
  }
}

}  // namespace splitfuse
