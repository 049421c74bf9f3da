// ModelConfig as JSON.
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

// The one list of fields of each: writing and reading both go through it.
template <class Config, class Of>
concept fields_of = std::same_as<std::remove_const_t<Config>, Of>;

template <fields_of<RopeConfig> Config, class Visit>
void visit_fields(Config& rope, Visit&& visit) {
  visit("inv_freq", rope.inv_freq);
  visit("magnitude", rope.magnitude);
  visit("long_from", rope.long_from);
  visit("long_inv_freq", rope.long_inv_freq);
  visit("long_magnitude", rope.long_magnitude);
}

template <fields_of<LayerConfig> Config, class Visit>
void visit_fields(Config& layer, Visit&& visit) {
  visit("window", layer.window);
  visit("rope", layer.rope);
  visit("moe", layer.moe);
}

template <fields_of<MoeConfig> Config, class Visit>
void visit_fields(Config& moe, Visit&& visit) {
  visit("experts", moe.experts);
  visit("top_k", moe.top_k);
  visit("intermediate_size", moe.intermediate_size);
  visit("scoring", moe.scoring);
  visit("normalize", moe.normalize);
  visit("scale", moe.scale);
  visit("groups", moe.groups);
  visit("top_groups", moe.top_groups);
  visit("correction", moe.correction);
  visit("router_bias", moe.router_bias);
  visit("expert_bias", moe.expert_bias);
  visit("shared_intermediate_size", moe.shared_intermediate_size);
  visit("shared_gate", moe.shared_gate);
}

template <fields_of<ModelConfig> Config, class Visit>
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
  visit("ropes", config.ropes);
  visit("layers", config.layers);
  visit("embed_size", config.embed_size);
  visit("embed_scale", config.embed_scale);
  visit("embed_norm", config.embed_norm);
  visit("learned_positions", config.learned_positions);
  visit("position_offset", config.position_offset);
  visit("norm", config.norm);
  visit("norm_place", config.norm_place);
  visit("norm_bias", config.norm_bias);
  visit("final_norm", config.final_norm);
  visit("norm_eps", config.norm_eps);
  visit("parallel", config.parallel);
  visit("residual_scale", config.residual_scale);
  visit("attention_scale", config.attention_scale);
  visit("attention_softcap", config.attention_softcap);
  visit("alibi_slopes", config.alibi_slopes);
  visit("attention_sinks", config.attention_sinks);
  visit("qk_norm", config.qk_norm);
  visit("qkv_bias", config.qkv_bias);
  visit("o_bias", config.o_bias);
  visit("activation", config.activation);
  visit("gated", config.gated);
  visit("mlp_bias", config.mlp_bias);
  visit("moe", config.moe);
  visit("tie_embeddings", config.tie_embeddings);
  visit("lm_head_bias", config.lm_head_bias);
  visit("logit_scale", config.logit_scale);
  visit("logit_softcap", config.logit_softcap);
  visit("eos_token_ids", config.eos_token_ids);
}

template <class Config>
concept Object = fields_of<Config, RopeConfig> || fields_of<Config, LayerConfig> || fields_of<Config, MoeConfig> ||
                 fields_of<Config, ModelConfig>;

template <class... Args>
[[noreturn]] void refuse(const Args&... args) {
  throw ConfigError(cat("model configuration: ", args...));
}

// The largest configuration that validate() passes is shorter. A list parsed takes 100 times its text.
constexpr size_t kMaxText = size_t{1} << 20;

// ---- Writing. `name` is the field's, for errors.

void write(const std::string&, const std::string& value, std::string& out) { out += json_quote(value); }
void write(const std::string&, bool value, std::string& out) { out += value ? "true" : "false"; }
void write(const std::string&, int32_t value, std::string& out) { out += std::to_string(value); }

// The digits are those of the double of the same value: readers go through double, and the shortest digits of a
// float may round to its neighbour on the way back.
void write(const std::string& name, float value, std::string& out) {
  if (!std::isfinite(value)) refuse(name, " is ", value, ", which JSON cannot hold; expected a finite number");
  char digits[32];
  const auto end = std::to_chars(digits, digits + sizeof(digits), static_cast<double>(value)).ptr;
  const std::string_view text(digits, end);
  out += text;
  if (text.find_first_of(".e") == text.npos) out += ".0";
}

template <class Enum>
  requires std::is_enum_v<Enum>
void write(const std::string&, Enum value, std::string& out) {
  out += json_quote(config_word(value));
}

template <Object Config>
void write(const std::string& name, const Config& config, std::string& out);

template <class Item>
void write(const std::string& name, const std::vector<Item>& values, std::string& out) {
  out += '[';
  for (size_t i = 0; i < values.size(); ++i) {
    if (i > 0) out += ", ";
    write(cat(name, '[', i, ']'), values[i], out);
  }
  out += ']';
}

std::string member(const std::string& object, const char* name) {
  return object.empty() ? name : cat(object, '.', name);
}

template <Object Config>
void write(const std::string& name, const Config& config, std::string& out) {
  const char* separator = "{";
  visit_fields(config, [&](const char* field, const auto& value) {
    out += cat(separator, '"', field, "\": ");
    write(member(name, field), value, out);
    separator = ", ";
  });
  out += '}';
}

// ---- Reading

void read_value(const Json& json, std::string& value) { value = json.string(); }
void read_value(const Json& json, bool& value) { value = json.boolean(); }

void read_value(const Json& json, int32_t& value) {
  const int64_t integer = json.integer();
  value = static_cast<int32_t>(integer);
  if (value != integer) throw Error(cat(integer, " is beyond 32 bits"));
}

void read_value(const Json& json, float& value) {
  const double number = json.number();
  if (std::abs(number) > std::numeric_limits<float>::max()) throw Error(cat(number, " is beyond float32"));
  value = static_cast<float>(number);
}

template <class Enum>
  requires std::is_enum_v<Enum>
void read_value(const Json& json, Enum& value) {
  value = config_enum<Enum>(json.string());
}

/// What `get` returns; its errors get the field's name.
template <class Get>
decltype(auto) named(const std::string& name, Get&& get) {
  try {
    return get();
  } catch (const Error& error) {
    refuse("field ", name, ": ", error.what());
  }
}

template <class Value>
void read(const Json& json, const std::string& name, Value& value) {
  named(name, [&] { read_value(json, value); });
}

template <Object Config>
void read(const Json& json, const std::string& name, Config& config);

template <class Item>
void read(const Json& json, const std::string& name, std::vector<Item>& values) {
  const auto& items = named(name, [&]() -> const auto& { return json.array(); });
  for (size_t i = 0; i < items.size(); ++i) read(items[i], cat(name, '[', i, ']'), values.emplace_back());
}

template <Object Config>
void read(const Json& json, const std::string& name, Config& config) {
  const auto& members = named(name, [&]() -> const auto& { return json.object(); });
  size_t known = 0;
  visit_fields(config, [&](const char* field, auto& value) {
    const Json* found = json.find(field);
    if (found == nullptr) refuse("field ", member(name, field), " is missing");
    ++known;
    read(*found, member(name, field), value);
  });
  if (known == members.size()) return;
  for (const auto& [key, value] : members) {
    bool expected = false;
    visit_fields(config, [&](std::string_view field, auto&) { expected |= field == key; });
    if (!expected) {
      refuse("unknown field ", json_quote(member(name, key.c_str())), "; a newer splitfuse may have written it");
    }
  }
}

}  // namespace

std::string to_json(const ModelConfig& config) {
  std::string out;
  write("", config, out);
  return out;
}

ModelConfig model_config_from_json(const std::string& text) {
  if (text.size() > kMaxText) refuse(text.size(), " bytes of JSON; expected at most ", kMaxText);
  ModelConfig config;
  const Json json = [&] {
    try {
      Json parsed = Json::parse(text);
      parsed.object();
      return parsed;
    } catch (const Error& error) {
      refuse(error.what());
    }
  }();
  read(json, "", config);
  validate(config);
  return config;
}

}  // namespace splitfuse
