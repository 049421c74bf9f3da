// Inputs for the fuzz driver: damaged safetensors files, made at random.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "model/safetensors.h"
#include "safetensors_bytes.h"

namespace splitfuse::testing {

using Random = std::mt19937_64;

inline size_t below(Random& random, size_t bound) { return bound == 0 ? 0 : random() % bound; }

/// A file of a few tensors, of which one may be described wrongly: such faults take several changes of a text at once.
inline std::string make_file(Random& random) {
  struct Described {
    const char* dtype;
    std::vector<int64_t> shape;
    int64_t begin, end;
  };
  const std::vector<std::pair<const char*, int64_t>> dtypes = {{"F32", 4}, {"BF16", 2}, {"F16", 2},
                                                               {"U8", 1},  {"I64", 8},  {"NEW", 3}};
  std::vector<Described> tensors(1 + below(random, 4));
  int64_t at = 0;
  for (Described& tensor : tensors) {
    const auto& [dtype, size] = dtypes[below(random, dtypes.size())];
    int64_t bytes = size;
    for (size_t rank = below(random, 4); rank > 0; --rank) bytes *= tensor.shape.emplace_back(below(random, 4));
    tensor = {dtype, tensor.shape, at, at + bytes};
    at += bytes;
  }
  const std::string data(static_cast<size_t>(at) + (below(random, 16) == 0 ? 1 : 0), 'd');
  Described& wrong = tensors[below(random, tensors.size())];
  const auto step = static_cast<int64_t>(below(random, 9)) - 4;
  switch (below(random, 8)) {
    case 0:
      wrong.begin += step;
      break;
    case 1:
      wrong.end += step;
      break;
    case 2:
      wrong.begin += step;
      wrong.end += step;
      break;
    case 3:
      for (int64_t& extent : wrong.shape) extent = -extent;
      break;
    case 4:
      for (int64_t& extent : wrong.shape) extent = int64_t{1} << below(random, 63);
      break;
    case 5:
      wrong.dtype = dtypes[below(random, dtypes.size())].first;
      break;
    default:
      break;
  }
  std::string json;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Described& tensor = tensors[i];
    json += (i == 0 ? "{" : ",") + entry("t" + std::to_string(i), tensor.dtype, shape_text(tensor.shape),
                                         static_cast<size_t>(tensor.begin), static_cast<size_t>(tensor.end));
  }
  return with_header(json + "}" + std::string(below(random, 8), ' '), data);
}

// Numbers at the edges of what the format and 64 bits hold.
inline const std::vector<std::string> kNumbers = {"-1",
                                                  "0",
                                                  "1",
                                                  "2",
                                                  "8",
                                                  "16",
                                                  "1.5",
                                                  "1e9",
                                                  "4294967296",
                                                  "9223372036854775807",
                                                  "9223372036854775808",
                                                  "-9223372036854775808",
                                                  "18446744073709551615"};
inline const std::vector<std::string> kSymbols = {"{",  "}", "[",       "]",       ":",    ",",    "\"",
                                                  "\\", " ", "\\u0000", "\\ud800", "\xff", "null", "true"};
inline const std::vector<std::string> kWords = {"\"F32\"",
                                                "\"BF16\"",
                                                "\"F4\"",
                                                "\"I64\"",
                                                "\"X\"",
                                                "\"dtype\":",
                                                "\"shape\":[",
                                                "\"data_offsets\":[0,",
                                                "\"w\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},",
                                                "\"__metadata__\":{\"a\":\"b\"},",
                                                "\"format\":\"splitfuse\",",
                                                "\"splitfuse.config\":\"{}\",",
                                                "\"splitfuse.quantize\":\"int8\",",
                                                "\"splitfuse.quantize\":\"int4\",",
                                                "\"U8\"",
                                                "\"I8\"",
                                                "\"F16\"",
                                                "\"embed.weight.scale\":{\"dtype\":",
                                                "\\\"num_layers\\\": ",
                                                "\\\"ropes\\\": [{"};

inline const std::string& any_of(Random& random, const std::vector<std::string>& list) {
  return list[below(random, list.size())];
}

inline void set_length(std::string& bytes, uint64_t length) {
  for (size_t i = 0; i < 8 && i < bytes.size(); ++i) bytes[i] = static_cast<char>((length >> (8 * i)) & 0xff);
}

inline uint64_t get_length(const std::string& bytes) {
  uint64_t length = 0;
  for (size_t i = 0; i < 8 && i < bytes.size(); ++i) {
    length |= static_cast<uint64_t>(static_cast<unsigned char>(bytes[i])) << (8 * i);
  }
  return length;
}

/// Replaces `erased` bytes at `at`; if they are the header's, its length follows, mostly.
inline void splice(Random& random, std::string& bytes, size_t at, size_t erased, const std::string& text) {
  const uint64_t length = get_length(bytes);
  const bool in_header = at >= 8 && at - 8 < length && erased <= length;
  bytes.replace(at, erased, text);
  if (in_header && below(random, 8) != 0) set_length(bytes, length + text.size() - erased);
}

/// A random stretch of digits, or nothing at `bytes`' end.
inline std::pair<size_t, size_t> find_number(Random& random, const std::string& bytes) {
  const size_t begin = bytes.find_first_of("0123456789", 8 + below(random, bytes.size()));
  if (begin == bytes.npos) return {bytes.size(), 0};
  const size_t end = bytes.find_first_not_of("0123456789", begin);
  return {begin, (end == bytes.npos ? bytes.size() : end) - begin};
}

/// One random step.
inline void mutate(Random& random, std::string& bytes, const std::vector<std::string>& corpus) {
  const size_t at = below(random, bytes.size() + 1);
  const size_t some = std::min(below(random, 16), bytes.size() - at);
  switch (below(random, 11)) {
    case 0:
      if (at < bytes.size()) bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(random, 8)));
      break;
    case 1:
      if (at < bytes.size()) bytes[at] = static_cast<char>(random());
      break;
    case 2:
      bytes.resize(at);
      break;
    case 3:
      bytes.append(below(random, 40), static_cast<char>(random()));
      break;
    case 4:
      set_length(bytes, get_length(bytes) + below(random, 17) - 8);
      break;
    case 5:
      set_length(bytes, below(random, 2) == 0 ? random() >> below(random, 64)
                                              : bytes.size() - std::min<size_t>(bytes.size(), 8));
      break;
    case 6:
      splice(random, bytes, at, 0, any_of(random, below(random, 2) == 0 ? kSymbols : kWords));
      break;
    case 7:
      splice(random, bytes, at, some, "");
      break;
    case 8:
      splice(random, bytes, at, 0, bytes.substr(below(random, bytes.size() + 1), below(random, 80)));
      break;
    case 9: {
      const auto [begin, size] = find_number(random, bytes);
      const bool edge = below(random, 2) == 0;
      splice(random, bytes, begin, size, edge ? any_of(random, kNumbers) : std::to_string(below(random, 40)));
      break;
    }
    default: {
      const std::string& other = any_of(random, corpus);
      bytes = bytes.substr(0, at) + other.substr(std::min(at, other.size()));
    }
  }
  constexpr size_t kMaxBytes = 64 << 10;
  if (bytes.size() > kMaxBytes) bytes.resize(kMaxBytes);
}

/// The next input: `corpus` holds all inputs worth changing, `accepted` those of them that can be read.
inline std::string next_case(Random& random, const std::vector<std::string>& corpus,
                             const std::vector<std::string>& accepted) {
  const size_t way = below(random, 4);
  if (way == 0) return make_file(random);
  // One small step from a file that can be read, or several from any.
  std::string bytes = any_of(random, way == 1 ? accepted : corpus);
  for (size_t n = way == 1 ? 1 : 1 + below(random, 4); n > 0; --n) mutate(random, bytes, corpus);
  return bytes;
}

}  // namespace splitfuse::testing
