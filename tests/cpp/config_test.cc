#include "splitfuse/config.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "base/json.h"
#include "safetensors_bytes.h"
#include "splitfuse/weights.h"

namespace splitfuse {
namespace {

using ::testing::IsSubstring;

ModelConfig small_model() {
  ModelConfig config;
  config.vocab_size = 100;
  config.hidden_size = 48;
  config.num_layers = 2;
  config.num_heads = 6;
  config.num_kv_heads = 2;
  config.head_dim = 8;
  config.intermediate_size = 96;
  config.max_position = 256;
  config.eos_token_ids = {2, 99};
  return config;
}

ModelConfig llama3_model() {
  ModelConfig config = small_model();
  config.rope = {"llama3", 500000.0f, 8.0f, 1.0f, 4.0f, 8192};
  config.tie_embeddings = config.attention_bias = config.mlp_bias = true;
  return config;
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

std::string refusal(const std::string& json) {
  return testing::message_of<ConfigError>([&] { model_config_from_json(json); });
}

TEST(ConfigJson, RoundTrips) {
  for (const ModelConfig& config : {small_model(), llama3_model()}) {
    EXPECT_EQ(model_config_from_json(to_json(config)), config);
  }
  ModelConfig none = small_model();
  none.eos_token_ids.clear();
  EXPECT_EQ(model_config_from_json(to_json(none)), none);
}

TEST(ConfigJson, RoundTripsEveryFloatExactly) {
  std::mt19937 random(1);
  ModelConfig config = small_model();
  for (int i = 0; i < 20000; ++i) {
    const float value = std::bit_cast<float>(static_cast<uint32_t>(random() & 0x7fffffffu));
    if (!std::isfinite(value) || value == 0) continue;
    config.norm_eps = value;
    config.rope.theta = value;
    ASSERT_EQ(model_config_from_json(to_json(config)), config) << std::hexfloat << value;
  }
  for (const float value :
       {std::numeric_limits<float>::denorm_min(), std::numeric_limits<float>::max(), 1e-5f, 1e-6f}) {
    config.norm_eps = value;
    EXPECT_EQ(model_config_from_json(to_json(config)), config);
  }
}

TEST(ConfigJson, ToJsonRefusesWhatJsonCannotHold) {
  ModelConfig config = small_model();
  config.norm_eps = std::numeric_limits<float>::quiet_NaN();
  EXPECT_PRED_FORMAT2(IsSubstring, "norm_eps", testing::message_of<ConfigError>([&] { to_json(config); }));
}

TEST(ConfigJson, NamesAMissingField) {
  const std::string whole = to_json(llama3_model());
  const Json parsed = Json::parse(whole);
  ASSERT_EQ(parsed.object().size(), 15u);
  for (const auto& [key, value] : parsed.object()) {
    const std::string renamed = replaced(whole, json_quote(key), "\"other\"");
    EXPECT_PRED_FORMAT2(IsSubstring, "field " + key + " is missing", refusal(renamed));
  }
  for (const auto& [key, value] : parsed.find("rope")->object()) {
    EXPECT_PRED_FORMAT2(IsSubstring, "field rope." + key + " is missing",
                        refusal(replaced(whole, json_quote(key), "\"other\"")));
  }
}

TEST(ConfigJson, NamesAnUnknownField) {
  const std::string whole = to_json(small_model());
  EXPECT_PRED_FORMAT2(IsSubstring, "unknown field \"window\"",
                      refusal(replaced(whole, "\"rope\"", "\"window\": 7, \"rope\"")));
  EXPECT_PRED_FORMAT2(IsSubstring, "unknown field \"rope.mscale\"",
                      refusal(replaced(whole, "\"theta\"", "\"mscale\": 7, \"theta\"")));
}

TEST(ConfigJson, NamesAFieldOfTheWrongKind) {
  const std::string whole = to_json(small_model());
  EXPECT_PRED_FORMAT2(IsSubstring, "field num_layers: expected an integer",
                      refusal(replaced(whole, "\"num_layers\": 2", "\"num_layers\": 2.0")));
  EXPECT_PRED_FORMAT2(IsSubstring, "field num_layers: 4294967298",
                      refusal(replaced(whole, "\"num_layers\": 2", "\"num_layers\": 4294967298")));
  EXPECT_PRED_FORMAT2(IsSubstring, "field rope.theta: 1e+39",
                      refusal(replaced(whole, "\"theta\": 10000.0", "\"theta\": 1e39")));
  EXPECT_PRED_FORMAT2(IsSubstring, "field rope.theta: expected a number",
                      refusal(replaced(whole, "\"theta\": 10000.0", "\"theta\": true")));
  EXPECT_PRED_FORMAT2(IsSubstring, "field family: expected a string", refusal(replaced(whole, "\"llama\"", "null")));
  EXPECT_PRED_FORMAT2(IsSubstring, "field tie_embeddings: expected a boolean", refusal(replaced(whole, "false", "0")));
  EXPECT_PRED_FORMAT2(IsSubstring, "field eos_token_ids: expected an integer",
                      refusal(replaced(whole, "[2, 99]", "[2, \"99\"]")));
  EXPECT_PRED_FORMAT2(IsSubstring, "field rope: expected an object",
                      refusal(replaced(whole, "{\"scaling\"", "[], \"x\": {\"scaling\"")));
  EXPECT_PRED_FORMAT2(IsSubstring, "eos_token_ids is 100", refusal(replaced(whole, "[2, 99]", "[2, 100]")));
}

TEST(ConfigJson, RefusesMalformedJson) {
  for (const char* text : {"", "[]", "{", "{\"family\": \"a\", \"family\": \"b\"}"}) {
    EXPECT_PRED_FORMAT2(IsSubstring, "model configuration: ", refusal(text)) << text;
  }
}

struct Wrong {
  const char* name;
  std::function<void(ModelConfig&)> spoil;
};

TEST(ConfigValidate, NamesTheFieldThatIsOutOfRange) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<Wrong> cases = {
      {"family", [](auto& c) { c.family = ""; }},
      {"family", [](auto& c) { c.family = "a b"; }},
      {"family", [](auto& c) { c.family = std::string(65, 'a'); }},
      {"vocab_size", [](auto& c) { c.vocab_size = 0; }},
      {"vocab_size", [](auto& c) { c.vocab_size = 1 << 30; }},
      {"hidden_size", [](auto& c) { c.hidden_size = -1; }},
      {"hidden_size", [](auto& c) { c.hidden_size = 1 << 20; }},
      {"num_layers", [](auto& c) { c.num_layers = 0; }},
      {"num_layers", [](auto& c) { c.num_layers = 1 << 20; }},
      {"num_heads", [](auto& c) { c.num_heads = 0; }},
      {"num_heads", [](auto& c) { c.num_heads = 1 << 20; }},
      {"num_heads is 7; expected a multiple of num_kv_heads, 2", [](auto& c) { c.num_heads = 7; }},
      {"num_kv_heads", [](auto& c) { c.num_kv_heads = 0; }},
      {"num_kv_heads", [](auto& c) { c.num_kv_heads = 1 << 20; }},
      {"num_heads is 6; expected a multiple of num_kv_heads, 12", [](auto& c) { c.num_kv_heads = 12; }},
      {"head_dim", [](auto& c) { c.head_dim = 0; }},
      {"head_dim", [](auto& c) { c.head_dim = 12; }},
      {"head_dim", [](auto& c) { c.head_dim = 2048; }},
      {"intermediate_size", [](auto& c) { c.intermediate_size = 0; }},
      {"intermediate_size", [](auto& c) { c.intermediate_size = 1 << 30; }},
      {"max_position", [](auto& c) { c.max_position = 0; }},
      {"max_position", [](auto& c) { c.max_position = (1 << 24) + 1; }},
      {"norm_eps", [](auto& c) { c.norm_eps = 0; }},
      {"norm_eps", [=](auto& c) { c.norm_eps = nan; }},
      {"norm_eps", [=](auto& c) { c.norm_eps = inf; }},
      {"rope.scaling is \"yarn\"", [](auto& c) { c.rope.scaling = "yarn"; }},
      {"rope.theta", [](auto& c) { c.rope.theta = 0; }},
      {"rope.theta", [=](auto& c) { c.rope.theta = nan; }},
      {"rope.factor", [](auto& c) { c.rope.factor = -1; }},
      {"rope.factor is 8 while rope.scaling is \"none\"", [](auto& c) { c.rope.scaling = "none"; }},
      {"rope.low_freq_factor", [](auto& c) { c.rope.low_freq_factor = 0; }},
      {"rope.high_freq_factor", [](auto& c) { c.rope.high_freq_factor = 1; }},
      {"rope.high_freq_factor", [=](auto& c) { c.rope.high_freq_factor = inf; }},
      {"rope.original_max_position", [](auto& c) { c.rope.original_max_position = 0; }},
      {"eos_token_ids", [](auto& c) { c.eos_token_ids.push_back(-1); }},
      {"eos_token_ids", [](auto& c) { c.eos_token_ids.push_back(100); }},
      {"eos_token_ids", [](auto& c) { c.eos_token_ids.assign(1025, 1); }},
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    ModelConfig config = llama3_model();
    cases[i].spoil(config);
    EXPECT_PRED_FORMAT2(IsSubstring, std::string("model configuration: ") + cases[i].name,
                        testing::message_of<ConfigError>([&] { validate(config); }))
        << "case " << i;
  }
}

TEST(ConfigValidate, TakesWhatCanRun) {
  validate(small_model());
  ModelConfig config = llama3_model();
  validate(config);
  config.rope = {"linear", 10000.0f, 2.0f};
  validate(config);
  config.num_kv_heads = config.num_heads;
  config.hidden_size = 7;
  config.vocab_size = 1 << 24;
  config.eos_token_ids = {(1 << 24) - 1};
  validate(config);
}

TEST(WeightShapes, AreTheCanonicalNamesInLoadingOrder) {
  using Shapes = std::vector<std::pair<std::string, std::vector<int64_t>>>;
  ModelConfig config = small_model();
  config.num_layers = 1;
  config.head_dim = 16;
  EXPECT_EQ(weight_shapes(config), (Shapes{{"embed.weight", {100, 48}},
                                           {"layers.0.attn_norm.weight", {48}},
                                           {"layers.0.attn.q.weight", {96, 48}},
                                           {"layers.0.attn.k.weight", {32, 48}},
                                           {"layers.0.attn.v.weight", {32, 48}},
                                           {"layers.0.attn.o.weight", {48, 96}},
                                           {"layers.0.mlp_norm.weight", {48}},
                                           {"layers.0.mlp.gate.weight", {96, 48}},
                                           {"layers.0.mlp.up.weight", {96, 48}},
                                           {"layers.0.mlp.down.weight", {48, 96}},
                                           {"final_norm.weight", {48}},
                                           {"lm_head.weight", {100, 48}}}));
}

TEST(WeightShapes, BiasesAndTies) {
  const auto shapes = weight_shapes(llama3_model());
  std::set<std::string> biases;
  for (const auto& [name, shape] : shapes) {
    EXPECT_NE(name, "lm_head.weight");
    if (!name.ends_with(".bias")) continue;
    biases.insert(name);
    EXPECT_EQ(shape.size(), 1u);
  }
  EXPECT_EQ(biases.size(), 2u * 7);
  EXPECT_TRUE(biases.contains("layers.1.attn.o.bias"));
  EXPECT_TRUE(biases.contains("layers.0.mlp.down.bias"));
  EXPECT_EQ(shapes.size(), 1 + 2 * (2 + 7 + 7) + 1u);
}

TEST(DTypes, NamesAndSizes) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16})
    EXPECT_EQ(dtype_from_name(dtype_name(dtype)), dtype);
  EXPECT_EQ(dtype_size(DType::kF32), 4);
  EXPECT_EQ(dtype_size(DType::kBF16), 2);
  EXPECT_EQ(dtype_size(DType::kF16), 2);
  EXPECT_PRED_FORMAT2(IsSubstring, "\"fp8\"", testing::message_of<ConfigError>([] { dtype_from_name("fp8"); }));
}

}  // namespace
}  // namespace splitfuse
