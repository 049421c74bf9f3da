// The canonical checkpoint: one safetensors file, tensors under their canonical names in loading order, the
// configuration in its metadata.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <set>
#include <span>
#include <string_view>
#include <system_error>

#include "base/check.h"
#include "base/json.h"
#include "base/numeric.h"
#include "model/safetensors.h"
#include "splitfuse/splitfuse.h"

namespace splitfuse {
namespace {

constexpr const char* kFileName = "model.safetensors";
constexpr const char* kFormatKey = "format";
constexpr const char* kFormat = "splitfuse";
constexpr const char* kVersionKey = "splitfuse.version";
constexpr const char* kConfigKey = "splitfuse.config";
// Data begins at a cache line, as the format's own limit of eight bytes would not give.
constexpr int64_t kAlignment = 64;
constexpr int64_t kChunkElements = int64_t{1} << 20;

using NamedShape = std::pair<std::string, std::vector<int64_t>>;

std::string reason(int error) { return std::generic_category().message(error); }

int64_t element_count(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (const int64_t extent : shape) count *= extent;
  return count;
}

// ---- Conversion

float load(DType dtype, const std::byte* at) {
  if (dtype == DType::kF32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  return dtype == DType::kBF16 ? bf16_to_float(bits) : f16_to_float(bits);
}

void store(DType dtype, float value, std::byte* at) {
  if (dtype == DType::kF32) {
    std::memcpy(at, &value, sizeof(value));
    return;
  }
  const uint16_t bits = dtype == DType::kBF16 ? float_to_bf16(value) : float_to_f16(value);
  std::memcpy(at, &bits, sizeof(bits));
}

/// Rounds to nearest, ties to even. A finite value must not become infinite.
void convert(const std::string& name, DType from, const std::byte* in, DType to, std::span<std::byte> out) {
  const int64_t in_size = dtype_size(from);
  const int64_t out_size = dtype_size(to);
  for (size_t at = 0; at < out.size(); at += out_size, in += in_size) {
    const float value = load(from, in);
    store(to, value, &out[at]);
    if (std::isfinite(value) && !std::isfinite(load(to, &out[at]))) {
      throw CheckpointError(
          cat("tensor ", name, " holds ", value, ", which is beyond ", dtype_name(to), "; convert to another dtype"));
    }
  }
}

// ---- A file that appears whole or not at all

class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path) : path_(path) {
    for (int attempt = 0; fd_ < 0; ++attempt) {
      temporary_ = cat(path, ".tmp-", getpid(), '-', attempt);
      fd_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (fd_ < 0 && errno != EEXIST) fail("cannot create the file", errno);
    }
  }
  ~AtomicFile() {
    if (fd_ >= 0) close(fd_);
    if (!temporary_.empty()) unlink(temporary_.c_str());
  }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, int64_t size) {
    const char* at = static_cast<const char*>(data);
    while (size > 0) {
      const ssize_t written = ::write(fd_, at, static_cast<size_t>(size));
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) fail("cannot write", written < 0 ? errno : ENOSPC);
      at += written;
      size -= written;
    }
  }

  void commit() {
    if (fsync(fd_) != 0) fail("cannot write", errno);
    if (close(std::exchange(fd_, -1)) != 0) fail("cannot write", errno);
    if (rename(temporary_.c_str(), path_.c_str()) != 0) fail("cannot put the file in its place", errno);
    temporary_.clear();
    // The file is whole by now; this makes its name outlive a power cut, where the system can.
    const std::string parent = std::filesystem::path(path_).parent_path();
    const int directory = open(parent.empty() ? "." : parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0) return;
    fsync(directory);
    close(directory);
  }

 private:
  [[noreturn]] void fail(const char* what, int error) {
    // A constructor that throws runs no destructor; there is nothing to remove then.
    throw CheckpointError(cat(path_, ": ", what, ": ", reason(error)));
  }

  std::string path_;
  std::string temporary_;
  int fd_ = -1;
};

// ---- Writing

std::string make_header(const ModelConfig& config, const std::vector<NamedShape>& shapes, DType dtype) {
  std::string json = cat("{\"__metadata__\":{\"", kFormatKey, "\":\"", kFormat, "\",\"", kVersionKey,
                         "\":", json_quote(version()), ",\"", kConfigKey, "\":", json_quote(to_json(config)), '}');
  int64_t offset = 0;
  for (const auto& [name, shape] : shapes) {
    const int64_t end = offset + element_count(shape) * dtype_size(dtype);
    json += cat(",", json_quote(name), ":{\"dtype\":\"", safetensors_dtype(dtype), "\",\"shape\":", shape_text(shape),
                ",\"data_offsets\":[", offset, ',', end, "]}");
    offset = end;
  }
  json += '}';
  uint64_t length = 0;
  const auto unpadded = static_cast<int64_t>(sizeof(length) + json.size());
  json.append(static_cast<size_t>(round_up(unpadded, kAlignment) - unpadded), ' ');
  length = json.size();
  std::string header;
  for (size_t i = 0; i < sizeof(length); ++i) header += static_cast<char>((length >> (8 * i)) & 0xff);
  return header + json;
}

/// Refuses a source that lacks a tensor, or has one that this model would leave unused.
void check_names(const ModelConfig& config, const WeightSource& weights, const std::vector<NamedShape>& shapes) {
  const std::vector<std::string> names = weights.names();
  std::set<std::string> given(names.begin(), names.end());
  for (const auto& [name, shape] : shapes) {
    if (given.erase(name) == 0) throw CheckpointError(cat("there is no tensor for ", name, ' ', shape_text(shape)));
  }
  if (config.tie_embeddings) given.erase("lm_head.weight");
  if (!given.empty()) throw CheckpointError(cat("the configuration has no use for tensor ", *given.begin()));
}

void write_tensor(AtomicFile& out, WeightSource& weights, const NamedShape& wanted, DType dtype,
                  std::vector<std::byte>& buffer, const std::function<void(int64_t)>& wrote) {
  const auto& [name, shape] = wanted;
  const TensorView tensor = weights.read(name);
  if (tensor.shape != shape) {
    throw CheckpointError(cat("tensor ", name, " is of shape ", shape_text(tensor.shape),
                              "; the configuration asks for ", shape_text(shape)));
  }
  const auto* data = static_cast<const std::byte*>(tensor.data);
  const int64_t in_size = dtype_size(tensor.dtype);
  const int64_t count = element_count(shape);
  for (int64_t at = 0; at < count; at += kChunkElements) {
    const int64_t elements = std::min(kChunkElements, count - at);
    const int64_t bytes = elements * dtype_size(dtype);
    if (tensor.dtype == dtype) {
      out.write(data + at * in_size, bytes);
    } else {
      buffer.resize(static_cast<size_t>(bytes));
      convert(name, tensor.dtype, data + at * in_size, dtype, buffer);
      out.write(buffer.data(), bytes);
    }
    weights.consumed((at + elements) * in_size);
    wrote(bytes);
  }
  weights.release();
}

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

ModelConfig read_config(const std::string& file, const SafetensorsHeader& header) {
  const std::map<std::string, std::string> metadata(header.metadata.begin(), header.metadata.end());
  const auto format = metadata.find(kFormatKey);
  const auto config = metadata.find(kConfigKey);
  if (format == metadata.end() || format->second != kFormat || config == metadata.end()) {
    throw CheckpointError(cat(file, ": a safetensors file, but not a splitfuse checkpoint: its metadata hold no ",
                              kConfigKey, "; make one with `splitfuse convert MODEL OUT`"));
  }
  try {
    return model_config_from_json(config->second);
  } catch (const ConfigError& error) {
    throw ConfigError(cat(file, ": ", error.what()));
  }
}

/// Holds the tensors of a file to those its configuration needs; returns their names.
std::vector<std::pair<std::string, std::string>> check_tensors(const std::string& file, const ModelConfig& config,
                                                               const SafetensorsHeader& header) {
  std::map<std::string, const SafetensorsHeader::Tensor*> stored;
  for (const auto& tensor : header.tensors) stored.emplace(tensor.name, &tensor);
  std::vector<std::pair<std::string, std::string>> names;
  for (const auto& [name, shape] : weight_shapes(config)) {
    const auto found = stored.find(name);
    if (found == stored.end()) throw CheckpointError(cat(file, ": there is no tensor for ", name));
    if (found->second->shape != shape) {
      throw CheckpointError(cat(file, ": tensor ", name, " is of shape ", shape_text(found->second->shape),
                                "; the configuration asks for ", shape_text(shape)));
    }
    names.emplace_back(name, name);
    stored.erase(found);
  }
  if (!stored.empty()) {
    throw CheckpointError(cat(file, ": the configuration has no use for tensor ", json_quote(stored.begin()->first)));
  }
  return names;
}

}  // namespace

void write_checkpoint(const ModelConfig& config, WeightSource& weights, DType dtype, const std::string& file,
                      const ProgressFn& progress) {
  const auto shapes = weight_shapes(config);
  check_names(config, weights, shapes);
  const std::string header = make_header(config, shapes, dtype);
  int64_t total = static_cast<int64_t>(header.size());
  for (const auto& [name, shape] : shapes) total += element_count(shape) * dtype_size(dtype);
  int64_t done = 0;
  const auto wrote = [&](int64_t bytes) {
    done += bytes;
    if (progress) progress(done, total);
  };

  AtomicFile out(file);
  out.write(header.data(), static_cast<int64_t>(header.size()));
  wrote(static_cast<int64_t>(header.size()));
  std::vector<std::byte> buffer;
  for (const auto& shape : shapes) write_tensor(out, weights, shape, dtype, buffer, wrote);
  out.commit();
}

Checkpoint open_checkpoint(const std::string& path) {
  const std::string file = resolve(path);
  const SafetensorsHeader header = read_safetensors_header(file);
  Checkpoint checkpoint;
  checkpoint.config = read_config(file, header);
  checkpoint.weights = open_safetensors({file}, check_tensors(file, checkpoint.config, header));
  return checkpoint;
}

}  // namespace splitfuse
