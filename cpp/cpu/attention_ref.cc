// The readable one: every other instruction set is held to this, and this to double precision.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "base/numeric.h"
#include "cpu/attention_kernels.h"

namespace splitfuse {
namespace {

float to_float(float x) { return x; }
float to_float(uint16_t x) { return bf16_to_float(x); }
float to_float(int8_t x) { return x; }
void assign(float& out, float x) { out = x; }
void assign(uint16_t& out, float x) { out = float_to_bf16(x); }

// The running softmax of one row.
struct Row {
  float& m;
  float& l;
  float* o;
};

// KvCell: an element of K and V, Cell or int8_t.
template <class Cell, class KvCell = Cell>
class Reference {
 public:
  static void attend(const AttentionItem& item) {
    for (int r = 0; r < item.positions * item.group; ++r) {
      const Row total = row_at(item, item.scratch, r);
      const Row part = row_at(item, item.scratch + item.state_floats, r);
      for (int s = item.first_segment; s < item.last_segment; ++s) {
        if (item.partials != nullptr) {
          segment(item, r, s, row_at(item, item.partials + s * item.state_floats, r));
        } else if (s == 0) {
          segment(item, r, s, total);
        } else {
          segment(item, r, s, part);
          join(item, r, s, total, part);
        }
      }
      if (item.partials == nullptr) finish(item, r, total);
    }
  }

  static void merge(const AttentionItem& item) {
    for (int r = 0; r < item.positions * item.group; ++r) {
      const Row total = row_at(item, item.partials, r);
      for (int s = 1; s < item.last_segment; ++s) {
        join(item, r, s, total, row_at(item, item.partials + s * item.state_floats, r));
      }
      finish(item, r, total);
    }
  }

  static void rotate(const float* in, const float* cos, const float* sin, int32_t head_dim, void* out) {
    const int half = head_dim / 2;
    auto* cells = static_cast<Cell*>(out);
    for (int i = 0; i < half; ++i) {
      assign(cells[i], in[i] * cos[i] - in[half + i] * sin[i]);
      assign(cells[half + i], in[half + i] * cos[i] + in[i] * sin[i]);
    }
  }

  static void convert(const float* in, int32_t count, void* out) {
    for (int i = 0; i < count; ++i) assign(static_cast<Cell*>(out)[i], in[i]);
  }

 private:
  static constexpr bool kPairs = sizeof(KvCell) < 4;

  static Row row_at(const AttentionItem& item, float* state, int r) {
    const int64_t padded = attention_padded_rows(item.positions * item.group);
    return {state[r], state[padded + r], state + 2 * padded + int64_t{r} * item.layout.padded_dim};
  }
  static int position(const AttentionItem& item, int r) { return item.first + r / item.group; }

  static const KvCell* block(const AttentionItem& item, int key) {
    return reinterpret_cast<const KvCell*>(item.kv +
                                           item.block_table[key / item.layout.block_size] * item.layout.block_bytes);
  }
  // Of a key; its value's lies block_size floats after it.
  static const float* scale_at(const AttentionItem& item, int key) {
    const auto* bytes = reinterpret_cast<const std::byte*>(block(item, key));
    return reinterpret_cast<const float*>(bytes + item.layout.scale_offset) + key % item.layout.block_size;
  }
  static float key_at(const AttentionItem& item, int key, int d) {
    const int64_t size = item.layout.block_size;
    const int64_t i = key % size;
    const float cell = to_float(block(item, key)[kPairs ? (d / 2 * size + i) * 2 + d % 2 : d * size + i]);
    return std::is_same_v<KvCell, int8_t> ? cell * *scale_at(item, key) : cell;
  }
  static float value_at(const AttentionItem& item, int key, int d) {
    const int64_t dim = item.layout.padded_dim;
    const int64_t i = key % item.layout.block_size;
    const KvCell* values = block(item, key) + item.layout.value_offset / static_cast<int64_t>(sizeof(KvCell));
    const float cell = to_float(values[kPairs ? (i / 2 * dim + d) * 2 + i % 2 : i * dim + d]);
    return std::is_same_v<KvCell, int8_t> ? cell * scale_at(item, key)[item.layout.block_size] : cell;
  }

  static void segment(const AttentionItem& item, int r, int index, Row row) {
    const int begin = index * kAttentionSegment;
    const int end = std::min(begin + kAttentionSegment, position(item, r) + 1);
    const int dim = item.layout.head_dim;
    const Cell* q = static_cast<const Cell*>(item.q) + r / item.group * item.row_stride + r % item.group * dim;
    float scores[kAttentionSegment];
    row.m = -std::numeric_limits<float>::infinity();
    for (int key = begin; key < end; ++key) {
      float sum = 0.0f;
      for (int d = 0; d < dim; ++d) sum += to_float(q[d]) * key_at(item, key, d);
      scores[key - begin] = sum * item.scale;
      row.m = std::max(row.m, sum * item.scale);
    }
    row.l = 0.0f;
    for (int d = 0; d < dim; ++d) row.o[d] = 0.0f;
    for (int key = begin; key < end; ++key) {
      const float weight = std::exp2(scores[key - begin] - row.m);
      row.l += weight;
      for (int d = 0; d < dim; ++d) row.o[d] += weight * value_at(item, key, d);
    }
  }

  // Adds segment `index` to the row, if it has keys in it.
  static void join(const AttentionItem& item, int r, int index, Row total, Row part) {
    if (position(item, r) < index * kAttentionSegment) return;
    const float m = std::max(total.m, part.m);
    const float old_scale = std::exp2(total.m - m);
    const float new_scale = std::exp2(part.m - m);
    total.m = m;
    total.l = total.l * old_scale + part.l * new_scale;
    for (int d = 0; d < item.layout.head_dim; ++d) total.o[d] = total.o[d] * old_scale + part.o[d] * new_scale;
  }

  static void finish(const AttentionItem& item, int r, Row total) {
    const int dim = item.layout.head_dim;
    Cell* out = static_cast<Cell*>(item.out) + r / item.group * item.row_stride + r % item.group * dim;
    for (int d = 0; d < dim; ++d) assign(out[d], total.o[d] / total.l);
  }
};

void quantize(const float* in, int32_t count, int8_t* out, float* scale) {
  constexpr float kNothing = 1e-30f;   // what is smaller has no inverse, and counts as zero
  float largest = 0.0f;
  bool finite = true;
  for (int i = 0; i < count; ++i) {
    largest = std::max(largest, std::abs(in[i]));
    finite = finite && std::isfinite(in[i]);
  }
  const bool zero = !finite || largest < kNothing;
  const float inverse = zero ? 0.0f : kMostInt8 / largest;
  for (int i = 0; i < count; ++i) out[i] = zero ? int8_t{0} : static_cast<int8_t>(std::nearbyint(in[i] * inverse));
  *scale = !finite ? std::numeric_limits<float>::quiet_NaN() : zero ? 0.0f : largest / kMostInt8;
}

template <class Cell>
void fill(KvDType kv, AttentionKernels& kernels) {
  kernels.attend = Reference<Cell>::attend;
  kernels.merge = Reference<Cell>::merge;
  kernels.rotate = Reference<Cell>::rotate;
  kernels.convert = Reference<Cell>::convert;
  kernels.rotate_f32 = Reference<float>::rotate;
  kernels.quantize = quantize;
  if (kv == KvDType::kInt8) kernels.attend = Reference<Cell, int8_t>::attend;
}

}  // namespace

void attention_kernels_ref(DType dtype, KvDType kv, AttentionKernels& kernels) {
  dtype == DType::kF32 ? fill<float>(kv, kernels) : fill<uint16_t>(kv, kernels);
}

}  // namespace splitfuse
