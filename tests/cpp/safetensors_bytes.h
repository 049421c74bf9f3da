// Safetensors files made by hand, right and wrong ones, for tests and the fuzz driver.
#pragma once

#include <stdlib.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

namespace splitfuse::testing {

struct RawTensor {
  std::string name;
  std::string dtype;
  std::string shape;   // as JSON: "[2, 3]"
  std::string data;
};

/// Header length, header, data.
inline std::string with_header(const std::string& json, const std::string& data) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>((json.size() >> (8 * i)) & 0xff);
  return bytes + json + data;
}

/// One header entry.
inline std::string entry(const std::string& name, const std::string& dtype, const std::string& shape, size_t begin,
                         size_t end) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":[" +
         std::to_string(begin) + "," + std::to_string(end) + "]}";
}

/// A whole file: tensors one after the other; `metadata` is a JSON object, or empty for none. The data begin `shift`
/// bytes behind a multiple of 64.
inline std::string safetensors_bytes(const std::vector<RawTensor>& tensors, const std::string& metadata = "",
                                     size_t shift = 0) {
  std::string json = metadata.empty() ? "" : "\"__metadata__\":" + metadata;
  std::string data;
  for (const RawTensor& tensor : tensors) {
    if (!json.empty()) json += ",";
    json += entry(tensor.name, tensor.dtype, tensor.shape, data.size(), data.size() + tensor.data.size());
    data += tensor.data;
  }
  json = "{" + json + "}";
  json.append((64 - (8 + json.size()) % 64) % 64 + shift, ' ');
  return with_header(json, data);
}

/// The bytes of numbers as they lie in memory.
template <class T>
std::string bytes_of(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

/// A directory of its own, removed with everything in it.
class TempDir {
 public:
  TempDir() {
    std::string pattern = std::filesystem::temp_directory_path() / "splitfuse-XXXXXX";
    if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("cannot make " + pattern);
    path_ = pattern;
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  std::string path(const std::string& name) const { return path_ / name; }
  std::string write(const std::string& name, const std::string& bytes) const {
    std::ofstream out(path(name), std::ios::binary);
    out << bytes;
    if (!out.flush()) throw std::runtime_error("cannot write " + path(name));
    return path(name);
  }
  std::vector<std::string> files() const {
    std::vector<std::string> names;
    for (const auto& file : std::filesystem::directory_iterator(path_)) names.push_back(file.path().filename());
    return names;
  }

 private:
  std::filesystem::path path_;
};

/// The message of the Error that `action` throws, which must be exactly an `E`; "" if it throws nothing.
template <class E, class Action>
std::string message_of(Action&& action) {
  try {
    action();
  } catch (const std::exception& error) {
    return typeid(error) == typeid(E) ? error.what() : std::string("another error: ") + error.what();
  }
  return "";
}

}  // namespace splitfuse::testing
