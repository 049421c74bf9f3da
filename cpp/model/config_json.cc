// ModelConfig as JSON, and what its fields may be.
#include <charconv>
#include <cmath>
#include <concepts>
#include <limits>
#include <string_view>

#include "base/check.h"
#include "base/json.h"
#include "splitfuse/config.h"

namespace splitfuse {
namespace {

// Bounds far above any model that exists, low enough that every size made of them fits: widths such as
// (heads + 2 kv_heads) * head_dim in int32, bytes over all layers in int64.
constexpr int64_t kMaxVocab = int64_t{1} << 24;
constexpr int64_t kMaxHidden = int64_t{1} << 18;
constexpr int64_t kMaxIntermediate = int64_t{1} << 22;
constexpr int64_t kMaxLayers = int64_t{1} << 12;
constexpr int64_t kMaxHeads = int64_t{1} << 16;
constexpr int64_t kMaxHeadDim = 1024;
// Rotary angles are products in float32, which is exact on integers up to here.
constexpr int64_t kMaxPosition = int64_t{1} << 24;
constexpr size_t kMaxEosIds = 1024;
constexpr size_t kMaxFamilyLength = 64;

// The one list of fields: writing and reading both go through it.
template <class Config, class Visit>
  requires std::same_as<std::remove_const_t<Config>, RopeConfig>
void visit_fields(Config& rope, Visit&& visit) {
  visit("scaling", rope.scaling);
  visit("theta", rope.theta);
  visit("factor", rope.factor);
  visit("low_freq_factor", rope.low_freq_factor);
  visit("high_freq_factor", rope.high_freq_factor);
  visit("original_max_position", rope.original_max_position);
}

template <class Config, class Visit>
  requires std::same_as<std::remove_const_t<Config>, ModelConfig>
void visit_fields(Config& config, Visit&& visit) {
  visit("family", config.family);
  visit("vocab_size", config.vocab_size);
  visit("hidden_size", config.hidden_size);
  visit("num_layers", config.num_layers);
  visit("num_heads", config.num_heads);
  visit("num_kv_heads", config.num_kv_heads);
  visit("head_dim", config.head_dim);
  visit("intermediate_size", config.intermediate_size);
  visit("max_position", config.max_position);
  visit("norm_eps", config.norm_eps);
  visit("tie_embeddings", config.tie_embeddings);
  visit("attention_bias", config.attention_bias);
  visit("mlp_bias", config.mlp_bias);
  visit("rope", config.rope);
  visit("eos_token_ids", config.eos_token_ids);
}

template <class... Args>
[[noreturn]] void refuse(const Args&... args) {
  throw ConfigError(cat("model configuration: ", args...));
}

// ---- Writing

void write(const std::string& value, std::string& out) { out += json_quote(value); }
void write(bool value, std::string& out) { out += value ? "true" : "false"; }
void write(int32_t value, std::string& out) { out += std::to_string(value); }

// The digits are those of the double of the same value: readers go through double, and the shortest digits of a
// float may round to its neighbour on the way back.
void write(float value, std::string& out) {
  char digits[32];
  const auto end = std::to_chars(digits, digits + sizeof(digits), static_cast<double>(value)).ptr;
  const std::string_view text(digits, end);
  out += text;
  if (text.find_first_of(".e") == text.npos) out += ".0";
}

void write(const std::vector<Token>& values, std::string& out) {
  out += '[';
  for (size_t i = 0; i < values.size(); ++i) out += cat(i == 0 ? "" : ", ", values[i]);
  out += ']';
}

template <class Config>
  requires std::same_as<Config, RopeConfig> || std::same_as<Config, ModelConfig>
void write(const Config& config, std::string& out) {
  const char* separator = "{";
  visit_fields(config, [&](const char* name, const auto& value) {
    if constexpr (std::same_as<decltype(value), const float&>) {
      if (!std::isfinite(value)) refuse(name, " is ", value, ", which JSON cannot hold; expected a finite number");
    }
    out += cat(separator, '"', name, "\": ");
    write(value, out);
    separator = ", ";
  });
  out += '}';
}

// ---- Reading

void read(const Json& json, std::string& value) { value = json.string(); }
void read(const Json& json, bool& value) { value = json.boolean(); }

void read(const Json& json, int32_t& value) {
  const int64_t integer = json.integer();
  value = static_cast<int32_t>(integer);
  if (value != integer) throw Error(cat(integer, " is beyond 32 bits"));
}

void read(const Json& json, float& value) {
  const double number = json.number();
  if (std::abs(number) > std::numeric_limits<float>::max()) throw Error(cat(number, " is beyond float32"));
  value = static_cast<float>(number);
}

void read(const Json& json, std::vector<Token>& values) {
  for (const Json& item : json.array()) read(item, values.emplace_back());
}

template <class Config>
  requires std::same_as<Config, RopeConfig> || std::same_as<Config, ModelConfig>
void read_object(const Json& json, const std::string& prefix, Config& config) {
  size_t known = 0;
  visit_fields(config, [&](const char* name, auto& value) {
    const Json* member = json.find(name);
    if (member == nullptr) refuse("field ", prefix, name, " is missing");
    ++known;
    try {
      if constexpr (std::same_as<decltype(value), RopeConfig&>) {
        member->object();
        read_object(*member, cat(prefix, name, '.'), value);
      } else {
        read(*member, value);
      }
    } catch (const ConfigError&) {
      throw;
    } catch (const Error& error) {
      refuse("field ", prefix, name, ": ", error.what());
    }
  });
  if (known == json.object().size()) return;
  for (const auto& [key, member] : json.object()) {
    bool expected = false;
    visit_fields(config, [&](std::string_view name, auto&) { expected |= name == key; });
    if (!expected) refuse("unknown field ", json_quote(prefix + key), "; a newer splitfuse may have written it");
  }
}

// ---- Validation

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) refuse(name, " is ", value, "; expected ", low, " to ", high);
}

void check_positive(const char* name, float value) {
  if (!std::isfinite(value) || value <= 0) refuse(name, " is ", value, "; expected a finite number above 0");
}

void check_family(const std::string& family) {
  const auto fine = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' ||
           c == '.';
  };
  bool right = !family.empty() && family.size() <= kMaxFamilyLength;
  for (const char c : family) right = right && fine(c);
  if (!right) {
    refuse("family is ", json_quote(family), "; expected 1 to ", kMaxFamilyLength, " letters, digits, '_', '-' or '.'");
  }
}

void check_rope(const RopeConfig& rope) {
  check_positive("rope.theta", rope.theta);
  check_positive("rope.factor", rope.factor);
  if (rope.scaling == "none") {
    if (rope.factor != 1.0f) {
      refuse("rope.factor is ", rope.factor, " while rope.scaling is \"none\"; expected 1, or a scaling that uses it");
    }
  } else if (rope.scaling == "llama3") {
    check_positive("rope.low_freq_factor", rope.low_freq_factor);
    check_positive("rope.high_freq_factor", rope.high_freq_factor);
    if (rope.high_freq_factor <= rope.low_freq_factor) {
      refuse("rope.high_freq_factor is ", rope.high_freq_factor, "; expected more than rope.low_freq_factor, ",
             rope.low_freq_factor);
    }
    check_range("rope.original_max_position", rope.original_max_position, 1, kMaxPosition);
  } else if (rope.scaling != "linear") {
    refuse("rope.scaling is ", json_quote(rope.scaling), "; expected \"none\", \"linear\" or \"llama3\"");
  }
}

}  // namespace

void validate(const ModelConfig& config) {
  check_family(config.family);
  check_range("vocab_size", config.vocab_size, 1, kMaxVocab);
  check_range("hidden_size", config.hidden_size, 1, kMaxHidden);
  check_range("num_layers", config.num_layers, 1, kMaxLayers);
  check_range("num_heads", config.num_heads, 1, kMaxHeads);
  check_range("num_kv_heads", config.num_kv_heads, 1, kMaxHeads);
  if (config.num_heads % config.num_kv_heads != 0) {
    refuse("num_heads is ", config.num_heads, "; expected a multiple of num_kv_heads, ", config.num_kv_heads);
  }
  check_range("head_dim", config.head_dim, 8, kMaxHeadDim);
  if (config.head_dim % 8 != 0) refuse("head_dim is ", config.head_dim, "; expected a multiple of 8");
  check_range("intermediate_size", config.intermediate_size, 1, kMaxIntermediate);
  check_range("max_position", config.max_position, 1, kMaxPosition);
  check_positive("norm_eps", config.norm_eps);
  check_rope(config.rope);
  if (config.eos_token_ids.size() > kMaxEosIds) {
    refuse("eos_token_ids holds ", config.eos_token_ids.size(), " ids; expected at most ", kMaxEosIds);
  }
  for (const Token id : config.eos_token_ids) check_range("eos_token_ids", id, 0, config.vocab_size - 1);
}

std::string to_json(const ModelConfig& config) {
  std::string out;
  write(config, out);
  return out;
}

ModelConfig model_config_from_json(const std::string& text) {
  ModelConfig config;
  try {
    const Json json = Json::parse(text);
    json.object();
    read_object(json, "", config);
  } catch (const ConfigError&) {
    throw;
  } catch (const Error& error) {
    refuse(error.what());
  }
  validate(config);
  return config;
}

}  // namespace splitfuse
