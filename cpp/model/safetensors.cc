#include "model/safetensors.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string_view>
#include <tuple>

#include "base/check.h"
#include "base/json.h"
#include "splitfuse/weights.h"

namespace splitfuse {
namespace {

constexpr int64_t kLengthBytes = 8;
// The format's own limit.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;

template <class... Args>
[[noreturn]] void refuse(const std::string& path, const Args&... args) {
  throw CheckpointError(cat(path, ": ", args...));
}

/// Bits of one element, or nothing for a word the format doesn't have.
std::optional<int64_t> dtype_bits(std::string_view dtype) {
  static const std::map<std::string_view, int64_t> kBits = {
      {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"BOOL", 8},        {"U8", 8},          {"I8", 8},
      {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"U16", 16},
      {"I16", 16},    {"F16", 16},    {"BF16", 16},   {"U32", 32},        {"I32", 32},        {"F32", 32},
      {"U64", 64},    {"I64", 64},    {"F64", 64},    {"C64", 64},
  };
  const auto found = kBits.find(dtype);
  return found == kBits.end() ? std::nullopt : std::optional(found->second);
}

std::optional<DType> weight_dtype(std::string_view dtype) {
  for (const DType known : {DType::kF32, DType::kBF16, DType::kF16}) {
    if (dtype == safetensors_dtype(known)) return known;
  }
  return std::nullopt;
}

/// Bits of a tensor, or nothing if they cannot be counted.
std::optional<int64_t> tensor_bits(const std::vector<int64_t>& shape, int64_t element_bits) {
  int64_t bits = element_bits;
  for (const int64_t extent : shape) {
    if (__builtin_mul_overflow(bits, extent, &bits)) return std::nullopt;
  }
  return bits;
}

/// Reads one header entry; throws Error without the file's name.
StoredTensor read_entry(const std::string& name, const Json& json, int64_t data_begin, int64_t data_size) {
  StoredTensor tensor;
  tensor.name = name;
  for (const auto& [key, value] : json.object()) {
    if (key != "dtype" && key != "shape" && key != "data_offsets") throw Error(cat("unknown field ", json_quote(key)));
  }
  const auto field = [&](const char* key) -> const Json& {
    const Json* found = json.find(key);
    if (found == nullptr) throw Error(cat("field \"", key, "\" is missing"));
    return *found;
  };
  tensor.dtype = field("dtype").string();
  for (const Json& extent : field("shape").array()) {
    tensor.shape.push_back(extent.integer());
    if (extent.integer() < 0) throw Error(cat("shape ", shape_text(tensor.shape), " is negative"));
  }
  const auto& offsets = field("data_offsets").array();
  if (offsets.size() != 2) throw Error(cat("data_offsets hold ", offsets.size(), " numbers; expected [begin, end]"));
  const int64_t begin = offsets[0].integer();
  const int64_t end = offsets[1].integer();
  if (begin < 0 || begin > end) throw Error(cat("data_offsets [", begin, ", ", end, "] are not [begin, end]"));
  if (end > data_size) {
    throw Error(cat("data ends at byte ", end, " of ", data_size, ": the file is truncated, or its header is wrong"));
  }
  tensor.begin = data_begin + begin;
  tensor.size = end - begin;
  const auto element_bits = dtype_bits(tensor.dtype);
  if (!element_bits) return tensor;
  const auto bits = tensor_bits(tensor.shape, *element_bits);
  if (!bits) throw Error(cat("shape ", shape_text(tensor.shape), " overflows"));
  if (*bits % 8 != 0 || *bits / 8 != tensor.size) {
    throw Error(cat("shape ", shape_text(tensor.shape), " of ", tensor.dtype, " takes ", ceil_div<int64_t>(*bits, 8),
                    " bytes, but data_offsets [", begin, ", ", end, "] hold ", tensor.size));
  }
  return tensor;
}

/// Tensors, sorted by place, must follow each other from `at` to `end`.
void check_layout(const std::string& path, const std::vector<StoredTensor>& tensors, int64_t at, int64_t end) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const StoredTensor& tensor = tensors[i];
    if (i > 0 && tensor.begin < at) {
      refuse(path, "tensor ", json_quote(tensor.name), " overlaps tensor ", json_quote(tensors[i - 1].name));
    }
    if (tensor.begin > at) {
      refuse(path, tensor.begin - at, " bytes before tensor ", json_quote(tensor.name), " belong to no tensor");
    }
    at = tensor.begin + tensor.size;
  }
  if (at != end) refuse(path, "the last ", end - at, " bytes belong to no tensor");
}

/// Tensors of mapped files, by canonical name.
class FileSource : public WeightSource {
 public:
  FileSource(const std::vector<std::string>& paths, const std::vector<std::pair<std::string, std::string>>& names) {
    std::map<std::string_view, Place> stored;
    for (const std::string& path : paths) {
      const auto& file = files_.emplace_back(std::make_unique<SafetensorsFile>(path));
      for (const StoredTensor& tensor : file->tensors()) {
        const auto [other, is_new] = stored.try_emplace(tensor.name, Place{&file->file(), &tensor});
        if (is_new) continue;
        refuse(path, "tensor ", json_quote(tensor.name), " is also in ", other->second.file->path());
      }
    }
    for (const auto& [name, stored_name] : names) {
      const auto found = stored.find(stored_name);
      if (found == stored.end()) {
        refuse(paths.empty() ? "no file" : paths.front(), "there is no tensor ", json_quote(stored_name),
               ", wanted as ", name,
               paths.size() > 1 ? cat(", in this or the other ", paths.size() - 1, " files") : "");
      }
      Place place = found->second;
      const auto dtype = weight_dtype(place.tensor->dtype);
      if (!dtype) {
        refuse(place.file->path(), "tensor ", json_quote(stored_name), " is of dtype ", json_quote(place.tensor->dtype),
               "; expected F32, BF16 or F16");
      }
      place.dtype = *dtype;
      if (!places_.emplace(name, place).second) refuse(place.file->path(), "two tensors are given for ", name);
      names_.push_back(name);
    }
  }

  std::vector<std::string> names() const override { return names_; }

  TensorView read(const std::string& name) override {
    release();
    const auto found = places_.find(name);
    if (found == places_.end()) throw CheckpointError(cat("the checkpoint has no tensor for ", name));
    current_ = &found->second;
    const auto& [file, tensor, dtype] = *current_;
    file->prefetch(tensor->begin, tensor->begin + tensor->size);
    return {dtype, tensor->shape, aligned(*file, *tensor, dtype)};
  }

  void consumed(int64_t bytes) override {
    if (current_ == nullptr) return;
    const auto& [file, tensor, dtype] = *current_;
    file->drop(tensor->begin, tensor->begin + std::clamp<int64_t>(bytes, 0, tensor->size));
  }

  void release() override {
    if (current_ == nullptr) return;
    consumed(current_->tensor->size);
    current_ = nullptr;
    copy_.reset();
  }

 private:
  struct Place {
    const MappedFile* file;
    const StoredTensor* tensor;
    DType dtype = DType::kF32;
  };

  // The format lets a tensor begin at any byte; one that its element type could not be read from is copied.
  const void* aligned(const MappedFile& file, const StoredTensor& tensor, DType dtype) {
    const std::byte* data = file.data() + tensor.begin;
    if (tensor.begin % dtype_size(dtype) == 0) return data;
    copy_ = std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(tensor.size));
    constexpr int64_t kPiece = 4 << 20;
    for (int64_t at = 0; at < tensor.size; at += kPiece) {
      const int64_t size = std::min(kPiece, tensor.size - at);
      std::memcpy(copy_.get() + at, data + at, static_cast<size_t>(size));
      consumed(at + size);
    }
    return copy_.get();
  }

  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::vector<std::string> names_;
  std::map<std::string, Place, std::less<>> places_;
  const Place* current_ = nullptr;
  std::unique_ptr<std::byte[]> copy_;
};

}  // namespace

const char* safetensors_dtype(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kBF16:
      return "BF16";
    case DType::kF16:
      return "F16";
  }
  SPLITFUSE_ASSERT(!"a DType outside the enumeration");
  return "";
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += cat(i == 0 ? "" : ", ", shape[i]);
  return text + "]";
}

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(path) {
  read_header();
  file_.drop(0, file_.size());
}

void SafetensorsFile::read_header() {
  const std::string& path = file_.path();
  if (file_.size() < kLengthBytes) refuse(path, "not a safetensors file: ", file_.size(), " bytes");
  uint64_t length = 0;
  for (int i = 0; i < kLengthBytes; ++i) length |= static_cast<uint64_t>(file_.data()[i]) << (8 * i);
  if (length > kMaxHeaderBytes) {
    refuse(path, "not a safetensors file: a header of ", length, " bytes; expected at most ", kMaxHeaderBytes);
  }
  const int64_t data_begin = kLengthBytes + static_cast<int64_t>(length);
  if (data_begin > file_.size()) {
    refuse(path, "truncated: the header takes ", length, " bytes, the file has ", file_.size());
  }
  const std::string_view text(reinterpret_cast<const char*>(file_.data()) + kLengthBytes, length);
  if (!text.starts_with('{')) refuse(path, "not a safetensors file: the header is no JSON object");
  Json header;
  try {
    header = Json::parse(text);
  } catch (const Error& error) {
    refuse(path, "the header is damaged: ", error.what());
  }
  for (const auto& [name, value] : header.object()) {
    try {
      if (name == "__metadata__") {
        for (const auto& [key, entry] : value.object()) metadata_.emplace_back(key, entry.string());
      } else {
        tensors_.push_back(read_entry(name, value, data_begin, file_.size() - data_begin));
      }
    } catch (const Error& error) {
      refuse(path, name == "__metadata__" ? "" : "tensor ", json_quote(name), ": ", error.what());
    }
  }
  std::sort(tensors_.begin(), tensors_.end(), [](const StoredTensor& a, const StoredTensor& b) {
    return std::tie(a.begin, a.size, a.name) < std::tie(b.begin, b.size, b.name);
  });
  check_layout(path, tensors_, data_begin, file_.size());
}

SafetensorsHeader read_safetensors_header(const std::string& file) {
  const SafetensorsFile opened(file);
  SafetensorsHeader header;
  for (const StoredTensor& tensor : opened.tensors())
    header.tensors.push_back({tensor.name, tensor.dtype, tensor.shape, tensor.begin});
  header.metadata = opened.metadata();
  return header;
}

std::unique_ptr<WeightSource> open_safetensors(const std::vector<std::string>& files,
                                               const std::vector<std::pair<std::string, std::string>>& names) {
  return std::make_unique<FileSource>(files, names);
}

}  // namespace splitfuse
