// A strict JSON reader for headers and configurations that come from strangers.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace splitfuse {

/// A parsed JSON value. Objects keep their order; a key given twice is an error.
class Json {
 public:
  enum class Kind : uint8_t { kNull, kBool, kInteger, kNumber, kString, kArray, kObject };

  /// Throws Error with the byte offset on anything that is not exactly one JSON value (RFC 8259), on nesting
  /// deeper than 64, on invalid UTF-8, and on integers beyond int64 (other numbers are doubles).
  static Json parse(std::string_view text);

  Kind kind() const { return kind_; }
  /// Each throws Error, naming the kind found, if the value is of another kind. number() also takes integers.
  bool boolean() const;
  int64_t integer() const;
  double number() const;
  const std::string& string() const;
  const std::vector<Json>& array() const;
  const std::vector<std::pair<std::string, Json>>& object() const;
  /// The member of that name, or nullptr.
  const Json* find(std::string_view key) const;

 private:
  friend class JsonParser;
  Kind kind_ = Kind::kNull;
  bool boolean_ = false;
  int64_t integer_ = 0;
  double number_ = 0;
  std::string string_;
  std::vector<Json> array_;
  std::vector<std::pair<std::string, Json>> object_;
};

/// `text` as a JSON string, quotes included.
std::string json_quote(std::string_view text);

}  // namespace splitfuse
