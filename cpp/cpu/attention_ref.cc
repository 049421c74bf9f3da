// The readable one: every other instruction set is held to this, and this to double precision.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
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
          segment(item, r, s, row_at(item, partials_of(item, s), r));
        } else if (s == item.first_segment) {
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
      for (int s = item.first_segment + 1; s < item.last_segment; ++s) {
        join(item, r, s, total, row_at(item, partials_of(item, s), r));
      }
      finish(item, r, total);
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
  static float* partials_of(const AttentionItem& item, int segment) {
    return item.partials + (segment - item.first_segment) * item.state_floats;
  }
  static int position(const AttentionItem& item, int r) { return item.first + r / item.group; }
  static int first_key(const AttentionItem& item, int r) { return std::max(position(item, r) - item.window + 1, 0); }

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

  // A score in units of log2, softcapped and biased.
  static float bent(const AttentionItem& item, int r, int key, float score) {
    if (item.softcap > 0.0f) {
      const float cap = item.softcap * std::numbers::log2e_v<float>;
      score = cap * std::tanh(score / cap);
    }
    if (item.slopes != nullptr) {
      const auto distance = static_cast<float>(key - position(item, r));
      score += item.slopes[r % item.group] * std::numbers::log2e_v<float> * distance;
    }
    return score;
  }

  static void segment(const AttentionItem& item, int r, int index, Row row) {
    const int begin = std::max(index * kAttentionSegment, first_key(item, r));
    const int end = std::min((index + 1) * kAttentionSegment, position(item, r) + 1);
    const int dim = item.layout.head_dim;
    const Cell* q = static_cast<const Cell*>(item.q) + r / item.group * item.row_stride + r % item.group * dim;
    float scores[kAttentionSegment];
    row.m = -std::numeric_limits<float>::infinity();
    for (int key = begin; key < end; ++key) {
      float sum = 0.0f;
      for (int d = 0; d < dim; ++d) sum += to_float(q[d]) * key_at(item, key, d);
      const float score = bent(item, r, key, sum * item.scale);
      scores[key - begin] = score;
      row.m = std::max(row.m, score);
    }
    row.l = 0.0f;
    for (int d = 0; d < dim; ++d) row.o[d] = 0.0f;
    for (int key = begin; key < end; ++key) {
      const float weight = std::exp2(scores[key - begin] - row.m);
      row.l += weight;
      for (int d = 0; d < dim; ++d) row.o[d] += weight * value_at(item, key, d);
    }
  }

  // Adds segment `index` to the row, if it has keys in it; its first is taken as it is.
  static void join(const AttentionItem& item, int r, int index, Row total, Row part) {
    const int first = first_key(item, r) / kAttentionSegment;
    if (index < first || index > position(item, r) / kAttentionSegment) return;
    if (index == first) {
      total.m = part.m;
      total.l = part.l;
      std::copy_n(part.o, item.layout.head_dim, total.o);
      return;
    }
    const float m = std::max(total.m, part.m);
    const float old_scale = std::exp2(total.m - m);
    const float new_scale = std::exp2(part.m - m);
    total.m = m;
    total.l = total.l * old_scale + part.l * new_scale;
    for (int d = 0; d < item.layout.head_dim; ++d) total.o[d] = total.o[d] * old_scale + part.o[d] * new_scale;
  }

  static void finish(const AttentionItem& item, int r, Row total) {
    float scale = 1.0f;
    if (item.sinks != nullptr) {   // it joins the sum with nothing behind it
      const float sink = item.sinks[r % item.group] * std::numbers::log2e_v<float>;
      const float m = std::max(total.m, sink);
      scale = std::exp2(total.m - m);
      total.l = total.l * scale + std::exp2(sink - m);
    }
    const int dim = item.layout.head_dim;
    Cell* out = static_cast<Cell*>(item.out) + r / item.group * item.row_stride + r % item.group * dim;
    for (int d = 0; d < dim; ++d) assign(out[d], total.o[d] * scale / total.l);
  }
};

void norm(float* x, const float* weight, int32_t columns, bool centered, float eps) {
  double sum = 0.0;
  for (int i = 0; i < columns; ++i) sum += x[i];
  const double mean = centered ? sum / columns : 0.0;
  double squares = 0.0;
  for (int i = 0; i < columns; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const double scale = 1.0 / std::sqrt(squares / columns + eps);
  for (int i = 0; i < columns; ++i) x[i] = static_cast<float>((x[i] - mean) * scale * weight[i]);
}

void rotate(float* x, const float* cos, const float* sin, int32_t pairs) {
  for (int i = 0; i < pairs; ++i) {
    const float low = x[i];
    const float high = x[pairs + i];
    x[i] = low * cos[i] - high * sin[i];
    x[pairs + i] = high * cos[i] + low * sin[i];
  }
}

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
  kernels.norm = norm;
  kernels.rotate = rotate;
  kernels.convert = Reference<Cell>::convert;
  kernels.quantize = quantize;
  if (kv == KvDType::kInt8) kernels.attend = Reference<Cell, int8_t>::attend;
}

}  // namespace

void attention_kernels_ref(DType dtype, KvDType kv, AttentionKernels& kernels) {
  dtype == DType::kF32 ? fill<float>(kv, kernels) : fill<uint16_t>(kv, kernels);
}

}  // namespace splitfuse
