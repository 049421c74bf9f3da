#include "model/weights.h"

#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include "base/check.h"
#include "base/integer_rows.h"
#include "model/safetensors.h"

namespace splitfuse {
namespace {

constexpr int64_t kSlabBytes = 8 << 20;
constexpr int64_t kSlabRows = 96;   // whole panels of 16, 32 or 48 rows

/// In slabs of rows, each given back once it is packed: an embedding table is never wholly in memory twice.
void pack(Backend& backend, WeightSource& source, const WeightPlace& place, const TensorView& tensor) {
  const int64_t bytes = row_bytes(tensor.format, tensor.dtype, tensor.shape[1]);
  const int64_t slab = round_up(ceil_div(kSlabBytes, bytes), kSlabRows);
  for (int64_t first = 0; first < tensor.shape[0]; first += slab) {
    const int64_t rows = std::min(slab, tensor.shape[0] - first);
    backend.pack(place.linear, place.rows, place.row + static_cast<int32_t>(first), row_range(tensor, first, rows));
    source.consumed((first + rows) * bytes);
  }
}

int64_t elements_of(const std::vector<int64_t>& shape) {
  int64_t elements = 1;
  for (const int64_t extent : shape) elements *= extent;
  return elements;
}

}  // namespace

void load_weights(const ModelConfig& config, Backend& backend, WeightSource& source, const WeightPlaces& places,
                  const ProgressFn& progress) {
  const auto wanted = weight_shapes(config);
  const auto names = source.names();
  const std::set<std::string> present(names.begin(), names.end());
  int64_t total = 0;
  for (const auto& [name, shape] : wanted) {
    if (!present.contains(name)) {
      throw CheckpointError(cat("the checkpoint has no tensor for ", name, " ", shape_text(shape)));
    }
    total += elements_of(shape);
  }
  int64_t done = 0;
  for (const auto& [name, shape] : wanted) {
    const TensorView tensor = source.read(name);
    if (tensor.shape != shape) {
      throw CheckpointError(cat("tensor ", name, " has shape ", shape_text(tensor.shape),
                                ", the configuration asks for ", shape_text(shape)));
    }
    const WeightPlace& place = places.at(name);
    if (place.vector) {
      backend.upload(tensor, place.vector);
    } else if (shape.size() == 1) {
      backend.pack_bias(place.linear, place.rows, place.row, tensor);
    } else {
      pack(backend, source, place, tensor);
    }
    source.release();
    done += elements_of(shape);
    if (progress) progress(done, total);
  }
}

}  // namespace splitfuse
