// Opening a canonical checkpoint.
#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/json.h"
#include "model/checkpoint_layout.h"
#include "model/safetensors.h"
#include "splitfuse/splitfuse.h"

namespace splitfuse {
namespace {

constexpr const char* kFileName = "model.safetensors";

// ---- Reading

std::string resolve(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_directory(path, error)) return path;
  const std::string file = std::filesystem::path(path) / kFileName;
  if (!std::filesystem::exists(file, error)) {
    throw CheckpointError(
        cat(path, ": the directory holds no ", kFileName, "; make a checkpoint with `splitfuse convert MODEL OUT`"));
  }
  return file;
}

using Metadata = std::map<std::string, std::string>;

ModelConfig read_config(const std::string& file, const Metadata& metadata) {
  const auto format = metadata.find(checkpoint_keys::kFormat);
  const auto config = metadata.find(checkpoint_keys::kConfig);
  if (format == metadata.end() || format->second != kCheckpointFormat || config == metadata.end()) {
    throw CheckpointError(cat(file, ": a safetensors file, but not a splitfuse checkpoint: its metadata hold no ",
                              checkpoint_keys::kConfig, "; make one with `splitfuse convert MODEL OUT`"));
  }
  try {
    return model_config_from_json(config->second);
  } catch (const ConfigError& error) {
    throw ConfigError(cat(file, ": ", error.what()));
  }
}

WeightFormat read_quantize(const std::string& file, const Metadata& metadata) {
  const auto found = metadata.find(checkpoint_keys::kQuantize);
  if (found == metadata.end()) return WeightFormat::kDense;
  try {
    return weight_format_from_name(found->second);
  } catch (const ConfigError& error) {
    throw CheckpointError(cat(file, ": ", checkpoint_keys::kQuantize, " in its metadata: ", error.what()));
  }
}

/// Matrices of integers from a file of their own, all else from another source.
class CheckpointSource : public WeightSource {
 public:
  /// Holds the tensors of the file to those its configuration needs.
  CheckpointSource(std::unique_ptr<SafetensorsFile> file, const ModelConfig& config, WeightFormat format)
      : file_(std::move(file)), format_(format) {
    std::map<std::string, const StoredTensor*> stored;
    for (const StoredTensor& tensor : file_->tensors()) stored.emplace(tensor.name, &tensor);
    std::vector<std::pair<std::string, std::string>> floats;
    for (LaidOut& tensor : checkpoint_layout(config, format, DType::kF32)) {
      Parts parts = {tensor.shape, tensor.format, {}};
      for (const StoredPart& part : tensor.parts) parts.stored.push_back(take(stored, part, tensor.format));
      names_.push_back(tensor.name);
      if (tensor.format == WeightFormat::kDense) {
        floats.emplace_back(tensor.name, tensor.name);
      } else {
        integers_.emplace(tensor.name, std::move(parts));
      }
    }
    if (!stored.empty()) {
      const std::string first = json_quote(stored.begin()->first);
      throw CheckpointError(cat(path(), ": the configuration has no use for tensor ", first));
    }
    floats_ = open_safetensors({path()}, floats);
  }

  std::vector<std::string> names() const override { return names_; }
  WeightFormat format() const override { return format_; }

  TensorView read(const std::string& name) override {
    release();
    const auto found = integers_.find(name);
    if (found == integers_.end()) return floats_->read(name);
    const auto& [shape, format, stored] = found->second;
    current_ = &found->second;
    file_->file().prefetch(stored.front()->begin, stored.back()->begin + stored.back()->size);
    const bool int4 = format == WeightFormat::kInt4;
    return {.dtype = DType::kF16,
            .shape = shape,
            .data = at(stored[0]),
            .format = format,
            .scales = at(stored[1]),
            .minima = int4 ? at(stored[2]) : nullptr};
  }

  void consumed(int64_t bytes) override {
    if (current_ == nullptr) return floats_->consumed(bytes);
    const StoredTensor& codes = *current_->stored[0];
    file_->file().drop(codes.begin, codes.begin + std::clamp<int64_t>(bytes, 0, codes.size));
  }

  void release() override {
    if (current_ == nullptr) return floats_ ? floats_->release() : void();
    for (const StoredTensor* part : current_->stored) file_->file().drop(part->begin, part->begin + part->size);
    current_ = nullptr;
  }

 private:
  struct Parts {
    std::vector<int64_t> shape;
    WeightFormat format;
    std::vector<const StoredTensor*> stored;
  };

  const std::string& path() const { return file_->file().path(); }
  const std::byte* at(const StoredTensor* tensor) const { return file_->file().data() + tensor->begin; }

  const StoredTensor* take(std::map<std::string, const StoredTensor*>& stored, const StoredPart& part,
                           WeightFormat format) const {
    const auto found = stored.find(part.name);
    if (found == stored.end()) throw CheckpointError(cat(path(), ": there is no tensor for ", part.name));
    const StoredTensor* tensor = found->second;
    if (tensor->shape != part.shape) {
      throw CheckpointError(cat(path(), ": tensor ", part.name, " is of shape ", shape_text(tensor->shape),
                                "; the configuration asks for ", shape_text(part.shape)));
    }
    if (format != WeightFormat::kDense && tensor->dtype != part.dtype) {
      throw CheckpointError(cat(path(), ": tensor ", part.name, " is of dtype ", json_quote(tensor->dtype),
                                "; expected ", part.dtype, " in a checkpoint of ", weight_format_name(format)));
    }
    stored.erase(found);
    return tensor;
  }

  std::unique_ptr<SafetensorsFile> file_;
  WeightFormat format_;
  std::vector<std::string> names_;
  std::map<std::string, Parts> integers_;
  const Parts* current_ = nullptr;
  std::unique_ptr<WeightSource> floats_;
};

}  // namespace

Checkpoint open_checkpoint(const std::string& path) {
  auto file = std::make_unique<SafetensorsFile>(resolve(path));
  const std::string& name = file->file().path();
  const Metadata metadata(file->metadata().begin(), file->metadata().end());
  Checkpoint checkpoint;
  checkpoint.config = read_config(name, metadata);
  const WeightFormat format = read_quantize(name, metadata);
  checkpoint.weights = std::make_unique<CheckpointSource>(std::move(file), checkpoint.config, format);
  return checkpoint;
}

}  // namespace splitfuse
