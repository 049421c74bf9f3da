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

RopeConfig rope(std::vector<float> inv_freq, float magnitude = 1, int32_t long_from = 0,
                std::vector<float> long_inv_freq = {}, float long_magnitude = 1) {
  return {std::move(inv_freq), magnitude, long_from, std::move(long_inv_freq), long_magnitude};
}

/// Every field away from its default.
ModelConfig rich_model() {
  ModelConfig config = small_model();
  config.family = "rich";
  config.ropes = {rope(rope_frequencies(500000.0f, 8)), rope({0.5f, 0.25f}, 1.5f, 64, {0.125f, 0.0625f}, 1.25f)};
  config.layers = {{16, 1, true}, {0, -1, false}};
  config.embed_size = 32;
  config.embed_scale = 7.0f;
  config.embed_norm = config.norm_bias = true;
  config.learned_positions = 260;
  config.position_offset = 2;
  config.norm = NormKind::kLayer;
  config.norm_place = NormPlace::kBoth;
  config.final_norm = false;
  config.residual_scale = 0.5f;
  config.attention_scale = 0.25f;
  config.attention_softcap = 50.0f;
  config.alibi_slopes = {0.5f, 0.25f, 0.125f, 1.0f, 2.0f, 3.0f};
  config.attention_sinks = config.qkv_bias = config.o_bias = config.mlp_bias = config.lm_head_bias = true;
  config.qk_norm = QkNorm::kRow;
  config.activation = Activation::kGeluTanh;
  config.gated = false;
  config.moe = {8, 2, 24, Scoring::kSigmoid, true, 2.5f, 4, 2, true, true, true, 48, true};
  config.logit_scale = 0.125f;
  config.logit_softcap = 30.0f;
  return config;
}

struct Wrong {
  const char* name;
  std::function<void(ModelConfig&)> spoil;
};

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

std::string refusal(const std::string& json) {
  return testing::message_of<ConfigError>([&] { model_config_from_json(json); });
}

TEST(ConfigJson, RoundTrips) {
  for (const ModelConfig& config : {small_model(), rich_model()}) {
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
    config.ropes = {rope({value})};
    ASSERT_EQ(model_config_from_json(to_json(config)), config) << std::hexfloat << value;
  }
  for (const float value :
       {std::numeric_limits<float>::denorm_min(), std::numeric_limits<float>::max(), 1e-5f, 1e-6f}) {
    config.norm_eps = value;
    EXPECT_EQ(model_config_from_json(to_json(config)), config);
  }
}

TEST(ConfigJson, ToJsonRefusesWhatJsonCannotHold) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<Wrong> cases = {
      {": norm_eps is nan", [=](auto& c) { c.norm_eps = nan; }},
      {": moe.scale is nan", [=](auto& c) { c.moe.scale = nan; }},
      {": alibi_slopes[5] is nan", [=](auto& c) { c.alibi_slopes[5] = nan; }},
      {": ropes[1].long_inv_freq[0] is nan", [=](auto& c) { c.ropes[1].long_inv_freq[0] = nan; }},
  };
  for (const Wrong& wrong : cases) {
    ModelConfig config = rich_model();
    wrong.spoil(config);
    EXPECT_PRED_FORMAT2(IsSubstring, wrong.name, testing::message_of<ConfigError>([&] { to_json(config); }));
  }
}

TEST(ConfigJson, NamesAMissingAndAnUnknownField) {
  const std::string whole = to_json(rich_model());
  const Json parsed = Json::parse(whole);
  struct Object {
    const char* begins;   // in the text
    const char* prefix;
    const Json& json;
    size_t fields;
  };
  const std::vector<Object> objects = {
      {"{\"family\"", "", parsed, 39},
      {"{\"inv_freq\": [0.5,", "ropes[1].", parsed.find("ropes")->array()[1], 5},
      {"{\"window\": 0", "layers[1].", parsed.find("layers")->array()[1], 3},
      {"{\"experts\"", "moe.", *parsed.find("moe"), 13},
  };
  for (const Object& object : objects) {
    EXPECT_EQ(object.json.object().size(), object.fields) << object.prefix;
    size_t at = whole.find(object.begins);
    for (const auto& [key, value] : object.json.object()) {
      at = whole.find(json_quote(key), at);
      ASSERT_NE(at, std::string::npos) << key;
      std::string changed = whole;
      EXPECT_PRED_FORMAT2(IsSubstring, "field " + (object.prefix + key) + " is missing",
                          refusal(changed.replace(at, key.size() + 2, "\"other\"")));
      changed = whole;
      EXPECT_PRED_FORMAT2(IsSubstring, "unknown field \"" + std::string(object.prefix) + "mscale\"",
                          refusal(changed.insert(at, "\"mscale\": 7, ")));
    }
  }
}

TEST(ConfigJson, NamesAFieldOfTheWrongKind) {
  const std::string whole = to_json(rich_model());
  struct Change {
    const char *from, *to, *message;
  };
  const std::vector<Change> changes = {
      {"\"num_layers\": 2", "\"num_layers\": 2.0", "field num_layers: expected an integer"},
      {"\"num_layers\": 2", "\"num_layers\": 4294967298", "field num_layers: 4294967298"},
      {"\"magnitude\": 1.0", "\"magnitude\": 1e39", "field ropes[0].magnitude: 1e+39"},
      {"[0.5, 0.25]", "[0.5, true]", "field ropes[1].inv_freq[1]: expected a number"},
      {"\"rich\"", "null", "field family: expected a string"},
      {"\"tie_embeddings\": false", "\"tie_embeddings\": 0", "field tie_embeddings: expected a boolean"},
      {"[2, 99]", "[2, \"99\"]", "field eos_token_ids[1]: expected an integer"},
      {"[2, 99]", "{}", "field eos_token_ids: expected an array"},
      {"\"ropes\": [", "\"ropes\": [1, ", "field ropes[0]: expected an object"},
      {"\"moe\": {", "\"moe\": [], \"x\": {", "field moe: expected an object"},
      {"\"qk_norm\": \"row\"", "\"qk_norm\": \"rms\"", "field qk_norm: \"rms\" is unknown"},
      {"\"scoring\": \"sigmoid\"", "\"scoring\": \"\"", "field moe.scoring: \"\" is unknown"},
      {"[2, 99]", "[2, 100]", "eos_token_ids is 100"},
  };
  for (const Change& change : changes) {
    EXPECT_PRED_FORMAT2(IsSubstring, std::string("model configuration: ") + change.message,
                        refusal(replaced(whole, change.from, change.to)));
  }
  EXPECT_PRED_FORMAT2(IsSubstring, "expected \"softmax\", \"top_softmax\" or \"sigmoid\"",
                      refusal(replaced(whole, "\"scoring\": \"sigmoid\"", "\"scoring\": \"relu\"")));
}

TEST(ConfigJson, RefusesAbsurdTextsBeforeReadingThem) {
  std::string lists = "[";
  while (lists.size() < (1 << 20)) lists += "0,";
  EXPECT_PRED_FORMAT2(IsSubstring, "bytes of JSON; expected at most 1048576",
                      refusal(replaced(to_json(small_model()), "[2, 99]", lists + "0]")));
  const std::string deep(65, '[');
  EXPECT_PRED_FORMAT2(IsSubstring, "nested deeper than 64", refusal(replaced(to_json(small_model()), "[2, 99]", deep)));
}

TEST(ConfigJson, TheLargestConfigurationFits) {
  const float long_number = std::bit_cast<float>(0x00ffffffu);
  ModelConfig config = rich_model();
  config.num_layers = 1 << 12;
  config.layers.assign(1 << 12, {1 << 24, 10, false});
  config.num_heads = config.num_kv_heads = 1 << 12;
  config.head_dim = 1024;
  config.alibi_slopes.assign(1 << 12, -long_number);
  const std::vector<float> frequencies(512, long_number);
  config.ropes.assign(16, rope(frequencies, long_number, 1 << 24, frequencies, long_number));
  config.vocab_size = 1 << 24;
  config.eos_token_ids.assign(1024, (1 << 24) - 1);
  EXPECT_EQ(model_config_from_json(to_json(config)), config);
}

TEST(ConfigJson, RefusesMalformedJson) {
  for (const char* text : {"", "[]", "{", "{\"family\": \"a\", \"family\": \"b\"}"}) {
    EXPECT_PRED_FORMAT2(IsSubstring, "model configuration: ", refusal(text)) << text;
  }
}

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
      {"ropes[2].inv_freq holds 0 frequencies", [](auto& c) { c.ropes.push_back({}); }},
      {"ropes[0].inv_freq holds 5 frequencies; expected 1 to 4", [](auto& c) { c.ropes = {rope({1, 1, 1, 1, 1})}; }},
      {"ropes[0].inv_freq holds nan", [=](auto& c) { c.ropes = {rope({nan})}; }},
      {"ropes[0].inv_freq holds -1", [](auto& c) { c.ropes = {rope({-1})}; }},
      {"ropes[0].magnitude", [](auto& c) { c.ropes = {rope({1}, 0)}; }},
      {"ropes[1].long_from", [](auto& c) { c.ropes = {rope({1}), rope({1}, 1, -1)}; }},
      {"ropes[0].long_from", [](auto& c) { c.ropes = {rope({1}, 1, (1 << 24) + 1, {1})}; }},
      {"ropes[0].long_inv_freq holds 0 frequencies; expected 1", [](auto& c) { c.ropes = {rope({1}, 1, 64)}; }},
      {"ropes[0].long_inv_freq holds 2 frequencies; expected 1", [](auto& c) { c.ropes = {rope({1}, 1, 64, {1, 1})}; }},
      {"ropes[0].long_inv_freq holds 1 frequencies; expected 0", [](auto& c) { c.ropes = {rope({1}, 1, 0, {1})}; }},
      {"ropes[0].long_inv_freq holds inf", [=](auto& c) { c.ropes = {rope({1}, 1, 64, {inf})}; }},
      {"ropes[0].long_magnitude", [](auto& c) { c.ropes = {rope({1}, 1, 64, {1}, 0)}; }},
      {"ropes holds 17 kinds", [](auto& c) { c.ropes.resize(17, rope({1})); }},
      {"layers holds 1 layers", [](auto& c) { c.layers.resize(1); }},
      {"layers[1].window is -1", [](auto& c) { c.layers[1].window = -1; }},
      {"layers[0].rope is 2; expected -1 to 1", [](auto& c) { c.layers[0].rope = 2; }},
      {"layers[0].rope", [](auto& c) { c.layers[0].rope = -2; }},
      {"layers[0].rope is 0; expected -1 to -1", [](auto& c) { c.ropes.clear(), c.layers[0].rope = 0; }},
      {"layers[0].moe is true", [](auto& c) { c.moe.experts = 0; }},
      {"moe.experts is 16384 in 9 layers; expected at most 131072",
       [](auto& c) { c.moe.experts = 1 << 14, c.num_layers = 9, c.layers.assign(9, {0, 0, true}); }},
      {"embed_size", [](auto& c) { c.embed_size = -1; }},
      {"embed_scale", [](auto& c) { c.embed_scale = 0; }},
      {"learned_positions", [](auto& c) { c.learned_positions = -1; }},
      {"max_position is 259; learned_positions and position_offset allow 258", [](auto& c) { c.max_position = 259; }},
      {"norm_bias", [](auto& c) { c.norm = NormKind::kRms; }},
      {"parallel is \"shared\"", [](auto& c) { c.parallel = Parallel::kShared; }},
      {"residual_scale", [](auto& c) { c.residual_scale = 0; }},
      {"attention_scale", [](auto& c) { c.attention_scale = -1; }},
      {"attention_softcap", [](auto& c) { c.attention_softcap = -1; }},
      {"alibi_slopes holds 2", [](auto& c) { c.alibi_slopes.resize(2); }},
      {"alibi_slopes", [=](auto& c) { c.alibi_slopes[0] = nan; }},
      {"activation is \"none\"", [](auto& c) { c.gated = true, c.activation = Activation::kNone; }},
      {"activation is \"swiglu_clamped\"", [](auto& c) { c.activation = Activation::kSwigluClamped; }},
      {"moe.experts", [](auto& c) { c.moe.experts = -1; }},
      {"moe: fields are set", [](auto& c) { c.moe.experts = 0, c.layers[0].moe = false; }},
      {"moe.top_k", [](auto& c) { c.moe.top_k = 0; }},
      {"moe.top_k is 6; expected 1 to 4", [](auto& c) { c.moe.top_k = 6; }},
      {"moe.experts is 8; expected a multiple of moe.groups, 3", [](auto& c) { c.moe.groups = 3; }},
      {"moe.top_groups", [](auto& c) { c.moe.top_groups = 5; }},
      {"moe.intermediate_size", [](auto& c) { c.moe.intermediate_size = 0; }},
      {"moe.scale", [](auto& c) { c.moe.scale = 0; }},
      {"moe.shared_gate", [](auto& c) { c.moe.shared_intermediate_size = 0; }},
      {"lm_head_bias", [](auto& c) { c.tie_embeddings = true; }},
      {"logit_scale", [=](auto& c) { c.logit_scale = inf; }},
      {"logit_softcap", [](auto& c) { c.logit_softcap = -1; }},
      {"eos_token_ids", [](auto& c) { c.eos_token_ids.push_back(-1); }},
      {"eos_token_ids", [](auto& c) { c.eos_token_ids.push_back(100); }},
      {"eos_token_ids", [](auto& c) { c.eos_token_ids.assign(1025, 1); }},
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    ModelConfig config = rich_model();
    cases[i].spoil(config);
    EXPECT_PRED_FORMAT2(IsSubstring, std::string("model configuration: ") + cases[i].name,
                        testing::message_of<ConfigError>([&] { validate(config); }))
        << "case " << i;
  }
}

TEST(ConfigValidate, TakesWhatCanRun) {
  validate(small_model());
  ModelConfig config = rich_model();
  validate(config);
  config = small_model();
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
  ModelConfig config = small_model();
  config.tie_embeddings = config.qkv_bias = config.o_bias = config.mlp_bias = true;
  const auto shapes = weight_shapes(config);
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

TEST(RopeFrequencies, AreTheFormulaRoundedOnce) {
  const std::vector<float> frequencies = rope_frequencies(500000.0f, 128);
  ASSERT_EQ(frequencies.size(), 64u);
  for (size_t i = 0; i < 64; ++i) {
    const double exact = std::pow(500000.0, -static_cast<double>(i) / 64);
    EXPECT_NEAR(frequencies[i] / exact, 1.0, 0x1p-23) << i;
  }
  for (const float theta : {1.0f, -10000.0f, std::numeric_limits<float>::infinity()}) {
    EXPECT_PRED_FORMAT2(IsSubstring, "RoPE theta",
                        testing::message_of<ConfigError>([&] { rope_frequencies(theta, 8); }));
  }
  for (const int32_t dims : {0, -8, 1025, std::numeric_limits<int32_t>::max()}) {
    EXPECT_PRED_FORMAT2(IsSubstring, "dimensions",
                        testing::message_of<ConfigError>([&] { rope_frequencies(2, dims); }));
  }
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
