// Writing a canonical checkpoint.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <set>
#include <span>
#include <system_error>

#include "base/check.h"
#include "base/integer_rows.h"
#include "base/json.h"
#include "base/numeric.h"
#include "base/thread_pool.h"
#include "model/checkpoint_layout.h"
#include "model/safetensors.h"
#include "splitfuse/splitfuse.h"

namespace splitfuse {
namespace {

// Data begins at a cache line, as the format's own limit of eight bytes would not give.
constexpr int64_t kAlignment = 64;
constexpr int64_t kChunkElements = int64_t{1} << 20;

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

std::string make_header(const ModelConfig& config, const std::vector<LaidOut>& layout, WeightFormat quantize) {
  using namespace checkpoint_keys;
  std::string json = cat("{\"__metadata__\":{\"", kFormat, "\":\"", kCheckpointFormat, "\",\"", kVersion,
                         "\":", json_quote(version()), ",\"", kConfig, "\":", json_quote(to_json(config)));
  if (quantize != WeightFormat::kDense) json += cat(",\"", kQuantize, "\":\"", weight_format_name(quantize), '"');
  json += '}';
  int64_t offset = 0;
  for (const LaidOut& tensor : layout) {
    for (const StoredPart& part : tensor.parts) {
      const int64_t end = offset + part.bytes;
      json += cat(",", json_quote(part.name), ":{\"dtype\":\"", part.dtype, "\",\"shape\":", shape_text(part.shape),
                  ",\"data_offsets\":[", offset, ',', end, "]}");
      offset = end;
    }
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
void check_names(const ModelConfig& config, const WeightSource& weights, const std::vector<LaidOut>& layout) {
  const std::vector<std::string> names = weights.names();
  std::set<std::string> given(names.begin(), names.end());
  for (const LaidOut& tensor : layout) {
    if (given.erase(tensor.name) > 0) continue;
    throw CheckpointError(cat("there is no tensor for ", tensor.name, ' ', shape_text(tensor.shape)));
  }
  if (config.tie_embeddings) given.erase("lm_head.weight");
  if (!given.empty()) throw CheckpointError(cat("the configuration has no use for tensor ", *given.begin()));
}

/// Writes tensors one after another. `wrote`: told of bytes as they are written.
class TensorWriter {
 public:
  TensorWriter(AtomicFile& out, WeightSource& weights, DType dtype, ThreadPool& pool,
               std::function<void(int64_t)> wrote)
      : out_(out), weights_(weights), dtype_(dtype), pool_(pool), wrote_(std::move(wrote)) {}

  void write(const LaidOut& wanted) {
    const TensorView tensor = weights_.read(wanted.name);
    if (tensor.shape != wanted.shape) {
      throw CheckpointError(cat("tensor ", wanted.name, " is of shape ", shape_text(tensor.shape),
                                "; the configuration asks for ", shape_text(wanted.shape)));
    }
    if (wanted.format != WeightFormat::kDense) {
      write_integers(wanted, tensor);
    } else if (tensor.format != WeightFormat::kDense) {
      write_dequantized(wanted.name, tensor);
    } else {
      write_floats(wanted.name, tensor);
    }
    weights_.release();
  }

 private:
  void put(const std::byte* data, int64_t bytes) {
    out_.write(data, bytes);
    wrote_(bytes);
  }
  void put(std::span<const std::byte> bytes) { put(bytes.data(), static_cast<int64_t>(bytes.size())); }

  void put_converted(const std::string& name, DType from, const std::byte* in, int64_t count) {
    buffer_.resize(static_cast<size_t>(count * dtype_size(dtype_)));
    convert(name, from, in, dtype_, buffer_);
    put(buffer_);
  }

  void write_floats(const std::string& name, const TensorView& tensor) {
    const auto* data = static_cast<const std::byte*>(tensor.data);
    const int64_t size = dtype_size(tensor.dtype);
    const int64_t count = element_count(tensor.shape);
    for (int64_t at = 0; at < count; at += kChunkElements) {
      const int64_t elements = std::min(kChunkElements, count - at);
      if (tensor.dtype == dtype_) {
        put(data + at * size, elements * size);
      } else {
        put_converted(name, tensor.dtype, data + at * size, elements);
      }
      weights_.consumed((at + elements) * size);
    }
  }

  void write_dequantized(const std::string& name, const TensorView& matrix) {
    const int64_t depth = matrix.shape[1];
    std::vector<float> row(static_cast<size_t>(depth));
    for (int64_t r = 0; r < matrix.shape[0]; ++r) {
      row_to_f32(matrix, r, row.data());
      put_converted(name, DType::kF32, std::as_bytes(std::span(row)).data(), depth);
      weights_.consumed((r + 1) * row_bytes(matrix.format, matrix.dtype, depth));
    }
  }

  /// Threads fit the rows of a chunk, which is then written.
  void write_integers(const LaidOut& wanted, const TensorView& matrix) {
    const int64_t rows = matrix.shape[0];
    const int64_t depth = matrix.shape[1];
    const int64_t code_bytes = row_bytes(wanted.format, dtype_, depth);
    const int64_t scale_bytes = row_scales(wanted.format, depth) * int64_t{sizeof(uint16_t)};
    const bool has_minima = wanted.format == WeightFormat::kInt4;
    std::vector<std::byte> scales(static_cast<size_t>(rows * scale_bytes));
    std::vector<std::byte> minima(has_minima ? scales.size() : 0);
    const int64_t at_once = std::max<int64_t>(kChunkElements * pool_.size() / std::max<int64_t>(code_bytes, 1), 1);
    std::atomic<bool> overflows = false;
    for (int64_t first = 0; first < rows; first += at_once) {
      const int64_t count = std::min(at_once, rows - first);
      buffer_.resize(static_cast<size_t>(count * code_bytes));
      pool_.run_parts(count, [&](int, int64_t begin, int64_t end) {
        IntegerRow row(wanted.format, depth);
        for (int64_t r = begin; r < end; ++r) {
          row.set(matrix, first + r);
          if (row.overflows()) overflows = true;
          std::ranges::copy(row.codes(), buffer_.begin() + r * code_bytes);
          std::ranges::copy(row.scales(), scales.begin() + (first + r) * scale_bytes);
          if (has_minima) std::ranges::copy(row.minima(), minima.begin() + (first + r) * scale_bytes);
        }
      });
      if (overflows) {
        throw CheckpointError(cat("tensor ", wanted.name, " holds weights beyond ", weight_format_name(wanted.format),
                                  ", whose scales are float16; convert to another format"));
      }
      put(buffer_);
      weights_.consumed((first + count) * row_bytes(matrix.format, matrix.dtype, depth));
    }
    put(scales);
    if (has_minima) put(minima);
  }

  AtomicFile& out_;
  WeightSource& weights_;
  DType dtype_;
  ThreadPool& pool_;
  std::function<void(int64_t)> wrote_;
  std::vector<std::byte> buffer_;
};

}  // namespace

void write_checkpoint(const ModelConfig& config, WeightSource& weights, DType dtype, const std::string& file,
                      const ProgressFn& progress, WeightFormat quantize) {
  const auto layout = checkpoint_layout(config, quantize, dtype);
  check_names(config, weights, layout);
  const std::string header = make_header(config, layout, quantize);
  int64_t total = static_cast<int64_t>(header.size());
  for (const LaidOut& tensor : layout) {
    for (const StoredPart& part : tensor.parts) total += part.bytes;
  }
  int64_t done = 0;
  const auto wrote = [&](int64_t bytes) {
    done += bytes;
    if (progress) progress(done, total);
  };

  AtomicFile out(file);
  out.write(header.data(), static_cast<int64_t>(header.size()));
  wrote(static_cast<int64_t>(header.size()));
  ThreadPool pool(quantize == WeightFormat::kDense ? 1 : 0);
  TensorWriter writer(out, weights, dtype, pool, wrote);
  for (const LaidOut& tensor : layout) writer.write(tensor);
  out.commit();
}

}  // namespace splitfuse
