// The canonical checkpoint: written, opened, refused.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "base/numeric.h"
#include "safetensors_bytes.h"
#include "splitfuse/splitfuse.h"

namespace splitfuse {
namespace {

using ::testing::IsSubstring;
using testing::message_of;
using testing::TempDir;

ModelConfig tiny_model() {
  ModelConfig config;
  config.vocab_size = 37;
  config.hidden_size = 10;
  config.num_layers = 2;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 8;
  config.intermediate_size = 22;
  config.max_position = 64;
  config.eos_token_ids = {1};
  return config;
}

/// Random weights in memory.
class MemorySource : public WeightSource {
 public:
  MemorySource(const ModelConfig& config, DType dtype) : dtype_(dtype) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    for (const auto& [name, shape] : weight_shapes(config)) {
      int64_t count = 1;
      for (const int64_t extent : shape) count *= extent;
      std::vector<float> values(count);
      for (float& value : values) value = rounded(normal(random));
      add(name, shape, values);
    }
  }

  void add(const std::string& name, const std::vector<int64_t>& shape, const std::vector<float>& values) {
    std::string bytes;
    for (const float value : values) {
      if (dtype_ == DType::kF32) bytes += testing::bytes_of<float>({value});
      if (dtype_ == DType::kBF16) bytes += testing::bytes_of<uint16_t>({float_to_bf16(value)});
      if (dtype_ == DType::kF16) bytes += testing::bytes_of<uint16_t>({float_to_f16(value)});
    }
    tensors[name] = {shape, values, bytes};
  }
  std::vector<std::string> names() const override {
    std::vector<std::string> names;
    for (const auto& [name, tensor] : tensors) names.push_back(name);
    return names;
  }
  TensorView read(const std::string& name) override {
    const Stored& tensor = tensors.at(name);
    return {dtype_, tensor.shape, tensor.bytes.data()};
  }

  struct Stored {
    std::vector<int64_t> shape;
    std::vector<float> values;
    std::string bytes;
  };
  std::map<std::string, Stored> tensors;

 private:
  float rounded(float value) const {
    if (dtype_ == DType::kBF16) return bf16_to_float(float_to_bf16(value));
    if (dtype_ == DType::kF16) return f16_to_float(float_to_f16(value));
    return value;
  }
  DType dtype_;
};

float element(const TensorView& tensor, size_t i) {
  const auto* data = static_cast<const char*>(tensor.data);
  if (tensor.dtype == DType::kF32) {
    float value;
    std::memcpy(&value, data + 4 * i, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, data + 2 * i, 2);
  return tensor.dtype == DType::kBF16 ? bf16_to_float(bits) : f16_to_float(bits);
}

std::string contents(const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// Of two floats of the format beside `value`, the nearer one; found by search, not by the conversion under test.
bool is_nearest(DType dtype, float value, float stored) {
  if (dtype == DType::kF32) return stored == value;
  double best = std::numeric_limits<double>::infinity();
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const double candidate = dtype == DType::kBF16 ? bf16_to_float(half) : f16_to_float(half);
    best = std::fmin(best, std::abs(candidate - static_cast<double>(value)));
  }
  return std::abs(static_cast<double>(stored) - static_cast<double>(value)) == best;
}

// Within half a step of the format, which is at most this part of the value.
bool is_near(DType dtype, float value, float stored) {
  if (dtype == DType::kF32) return stored == value;
  const float half_step = dtype == DType::kBF16 ? 0x1p-8f : 0x1p-11f;
  return std::abs(stored - value) <= std::abs(value) * half_step + 0x1p-25f;
}

TEST(Checkpoint, RoundTripsThroughEveryDtype) {
  const TempDir dir;
  ModelConfig config = tiny_model();
  config.qkv_bias = config.o_bias = config.mlp_bias = true;
  for (const DType from : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const DType to : {DType::kF32, DType::kBF16, DType::kF16}) {
      MemorySource source(config, from);
      const std::string file = dir.path("model.safetensors");
      std::vector<int64_t> progress;
      write_checkpoint(config, source, to, file, [&](int64_t done, int64_t total) {
        progress.push_back(done);
        EXPECT_LE(done, total);
        if (done == total) progress.push_back(-1);
      });
      EXPECT_EQ(progress.back(), -1);
      EXPECT_EQ(progress[progress.size() - 2], static_cast<int64_t>(contents(file).size()));
      EXPECT_EQ(dir.files(), std::vector<std::string>{"model.safetensors"});

      for (const std::string& path : {file, dir.path("")}) {
        const Checkpoint checkpoint = open_checkpoint(path);
        EXPECT_EQ(checkpoint.config, config);
        EXPECT_EQ(checkpoint.weights->names().size(), source.tensors.size());
        int checked = 0;
        for (const auto& [name, tensor] : source.tensors) {
          const TensorView view = checkpoint.weights->read(name);
          ASSERT_EQ(view.dtype, to);
          ASSERT_EQ(view.shape, tensor.shape);
          for (size_t i = 0; i < tensor.values.size(); ++i) {
            const bool right = i == 0 ? is_nearest(to, tensor.values[i], element(view, i))
                                      : is_near(to, tensor.values[i], element(view, i));
            ASSERT_TRUE(right) << name << ' ' << tensor.values[i] << ' ' << element(view, i);
            ++checked;
          }
        }
        EXPECT_GT(checked, 1000);
      }
    }
  }
}

TEST(Checkpoint, IsCanonicalSafetensors) {
  const TempDir dir;
  const ModelConfig config = tiny_model();
  MemorySource source(config, DType::kF32);
  const std::string file = dir.path("out");
  write_checkpoint(config, source, DType::kBF16, file);
  const SafetensorsHeader header = read_safetensors_header(file);
  const auto shapes = weight_shapes(config);
  ASSERT_EQ(header.tensors.size(), shapes.size());
  for (size_t i = 0; i < shapes.size(); ++i) {
    EXPECT_EQ(header.tensors[i].name, shapes[i].first);
    EXPECT_EQ(header.tensors[i].shape, shapes[i].second);
    EXPECT_EQ(header.tensors[i].dtype, "BF16");
  }
  using Metadata = std::vector<std::pair<std::string, std::string>>;
  EXPECT_EQ(
      header.metadata,
      (Metadata{{"format", "splitfuse"}, {"splitfuse.version", version()}, {"splitfuse.config", to_json(config)}}));
  uint64_t length = 0;
  std::memcpy(&length, contents(file).data(), 8);
  EXPECT_EQ((8 + length) % 64, 0u);
}

TEST(Checkpoint, IsTheSameWhenWrittenFromItself) {
  const TempDir dir;
  const ModelConfig config = tiny_model();
  MemorySource source(config, DType::kF16);
  const std::string file = dir.path("model.safetensors");
  write_checkpoint(config, source, DType::kF16, file);
  const std::string first = contents(file);
  const Checkpoint checkpoint = open_checkpoint(file);
  write_checkpoint(checkpoint.config, *checkpoint.weights, DType::kF16, file);
  EXPECT_EQ(contents(file), first);
}

TEST(Checkpoint, TiedModelsHaveNoHead) {
  const TempDir dir;
  ModelConfig config = tiny_model();
  MemorySource source(config, DType::kF32);
  config.tie_embeddings = true;
  write_checkpoint(config, source, DType::kF32, dir.path("model.safetensors"));
  for (const std::string& name : open_checkpoint(dir.path("")).weights->names()) EXPECT_NE(name, "lm_head.weight");
}

TEST(Checkpoint, SpecialValuesKeepTheirMeaning) {
  const TempDir dir;
  const ModelConfig config = tiny_model();
  MemorySource source(config, DType::kF32);
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> values = {inf, -inf, NAN, -0.0f, 1.00390625f, 1.01171875f, 65504, 6e-8f, 2e-8f, 1};
  source.add("final_norm.weight", {10}, values);
  const std::string file = dir.path("out");
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    write_checkpoint(config, source, dtype, file);
    const Checkpoint checkpoint = open_checkpoint(file);
    const TensorView view = checkpoint.weights->read("final_norm.weight");
    EXPECT_EQ(element(view, 0), inf);
    EXPECT_EQ(element(view, 1), -inf);
    EXPECT_TRUE(std::isnan(element(view, 2)));
    EXPECT_TRUE(std::signbit(element(view, 3)));
    if (dtype == DType::kBF16) {
      EXPECT_EQ(element(view, 4), 1.0f);         // ties go to the even one
      EXPECT_EQ(element(view, 5), 1.015625f);
    } else {
      EXPECT_EQ(element(view, 6), 65504.0f);
      EXPECT_EQ(element(view, 7), 0x1p-24f);     // the smallest
      EXPECT_EQ(element(view, 8), 0.0f);
    }
  }
}

TEST(Checkpoint, AValueBeyondTheDtypeIsRefused) {
  const TempDir dir;
  const ModelConfig config = tiny_model();
  MemorySource source(config, DType::kF32);
  source.add("layers.1.mlp_norm.weight", {10}, std::vector<float>(10, 70000.0f));
  const std::string message =
      message_of<CheckpointError>([&] { write_checkpoint(config, source, DType::kF16, dir.path("out")); });
  EXPECT_PRED_FORMAT2(IsSubstring, "tensor layers.1.mlp_norm.weight holds 70000, which is beyond float16", message);
  EXPECT_TRUE(dir.files().empty());
  write_checkpoint(config, source, DType::kBF16, dir.path("out"));
}

TEST(Checkpoint, TensorsMustBeThoseOfTheConfiguration) {
  const TempDir dir;
  ModelConfig config = tiny_model();
  const auto write = [&](MemorySource& source) {
    return message_of<CheckpointError>([&] { write_checkpoint(config, source, DType::kF32, dir.path("out")); });
  };
  MemorySource missing(config, DType::kF32);
  missing.tensors.erase("layers.1.attn.k.weight");
  EXPECT_PRED_FORMAT2(IsSubstring, "no tensor for layers.1.attn.k.weight [16, 10]", write(missing));
  MemorySource misshapen(config, DType::kF32);
  misshapen.tensors["layers.0.mlp.up.weight"].shape = {10, 22};
  EXPECT_PRED_FORMAT2(IsSubstring, "layers.0.mlp.up.weight is of shape [10, 22]; the configuration asks for [22, 10]",
                      write(misshapen));
  MemorySource unused(config, DType::kF32);
  unused.add("layers.0.attn.q.bias", {32}, std::vector<float>(32));
  EXPECT_PRED_FORMAT2(IsSubstring, "no use for tensor layers.0.attn.q.bias", write(unused));
  MemorySource good(config, DType::kF32);
  config.head_dim = 9;
  EXPECT_PRED_FORMAT2(IsSubstring, "head_dim",
                      message_of<ConfigError>([&] { write_checkpoint(config, good, DType::kF32, "x"); }));
  EXPECT_TRUE(dir.files().empty());
}

TEST(Checkpoint, AFileAppearsWholeOrNotAtAll) {
  const TempDir dir;
  const ModelConfig config = tiny_model();
  MemorySource source(config, DType::kF32);
  const std::string file = dir.write("model.safetensors", "what was there");
  const auto write = [&](const std::string& to) {
    return message_of<CheckpointError>([&] { write_checkpoint(config, source, DType::kF32, to); });
  };
  // The system's limit on file sizes stands for a full disk.
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = signal(SIGXFSZ, SIG_IGN);
  const rlimit low{8192, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &low), 0);
  const std::string message = write(file);
  setrlimit(RLIMIT_FSIZE, &before);
  signal(SIGXFSZ, handler);
  EXPECT_PRED_FORMAT2(IsSubstring, file + ": cannot write: File too large", message);

  struct Cancelled {};
  EXPECT_THROW(write_checkpoint(config, source, DType::kF32, file, [](int64_t, int64_t) { throw Cancelled(); }),
               Cancelled);
  EXPECT_EQ(contents(file), "what was there");
  EXPECT_EQ(dir.files(), std::vector<std::string>{"model.safetensors"});

  EXPECT_PRED_FORMAT2(IsSubstring, "/none/out: cannot create the file: No such file", write(dir.path("none/out")));
  std::filesystem::create_directory(dir.path("taken"));
  EXPECT_PRED_FORMAT2(IsSubstring, "taken: cannot put the file in its place: Is a directory", write(dir.path("taken")));
  EXPECT_EQ(dir.files().size(), 2u);
}

TEST(Checkpoint, OnlyOurOwnFilesOpen) {
  const TempDir dir;
  const auto open = [&](const std::string& path) {
    return message_of<CheckpointError>([&] { open_checkpoint(path); });
  };
  EXPECT_PRED_FORMAT2(IsSubstring, dir.path("absent") + ": cannot open", open(dir.path("absent")));
  EXPECT_PRED_FORMAT2(IsSubstring, "no model.safetensors", open(dir.path("")));
  const std::string file = dir.path("model.safetensors");
  for (const std::string metadata : {"", "{}", "{\"format\": \"pt\"}", "{\"format\": \"splitfuse\"}",
                                     "{\"format\": \"pt\", \"splitfuse.config\": \"{}\"}"}) {
    dir.write("model.safetensors", testing::safetensors_bytes({}, metadata));
    const std::string message = open(file);
    EXPECT_PRED_FORMAT2(IsSubstring, file + ": ", message);
    EXPECT_PRED_FORMAT2(IsSubstring, "splitfuse convert", message);
  }
  dir.write("model.safetensors", "xx");
  EXPECT_PRED_FORMAT2(IsSubstring, "not a safetensors file", open(dir.path("")));
}

// What write_checkpoint wrote, with its text changed: the same length, so that the data stay where they are.
TEST(Checkpoint, TensorsOfTheFileAreHeldToItsConfiguration) {
  const TempDir dir;
  ModelConfig config = tiny_model();
  config.tie_embeddings = true;
  MemorySource source(config, DType::kF32);
  write_checkpoint(config, source, DType::kF32, dir.path("good"));
  const std::string good = contents(dir.path("good"));
  const auto changed = [&](const std::string& from, const std::string& to) {
    EXPECT_EQ(from.size(), to.size());
    std::string bytes = good;
    const size_t at = bytes.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return dir.write("bad", bytes.replace(at, from.size(), to));
  };
  const auto open = [&](const std::string& file) {
    return message_of<CheckpointError>([&] { open_checkpoint(file); });
  };
  EXPECT_PRED_FORMAT2(IsSubstring, "bad: there is no tensor for final_norm.weight",
                      open(changed("\"final_norm.", "\"final_n0rm.")));
  EXPECT_PRED_FORMAT2(IsSubstring, "bad: tensor embed.weight is of shape [10, 37]; the configuration asks for [37, 10]",
                      open(changed("[37, 10]", "[10, 37]")));
  EXPECT_PRED_FORMAT2(IsSubstring, "bad: the configuration has no use for tensor \"layers.1.",
                      open(changed("num_layers\\\": 2", "num_layers\\\": 1")));
  EXPECT_PRED_FORMAT2(IsSubstring, "bad: tensor \"embed.weight\" is of dtype \"I32\"",
                      open(changed("\"F32\"", "\"I32\"")));
  EXPECT_PRED_FORMAT2(IsSubstring, "bad: model configuration: num_layers is 0", message_of<ConfigError>([&] {
                        open_checkpoint(changed("num_layers\\\": 2", "num_layers\\\": 0"));
                      }));
}

// ---- Matrices as integers

constexpr WeightFormat kIntegers[] = {WeightFormat::kInt8, WeightFormat::kInt4};

TEST(IntegerCheckpoint, HoldsWhatItsLayoutSays) {
  const TempDir dir;
  const ModelConfig config = tiny_model();
  MemorySource source(config, DType::kF32);
  for (const WeightFormat format : kIntegers) {
    const std::string file = dir.path("model.safetensors");
    std::vector<int64_t> progress;
    write_checkpoint(
        config, source, DType::kBF16, file, [&](int64_t done, int64_t) { progress.push_back(done); }, format);
    EXPECT_EQ(progress.back(), static_cast<int64_t>(contents(file).size()));
    std::map<std::string, SafetensorsHeader::Tensor> stored;
    const SafetensorsHeader header = read_safetensors_header(file);
    for (const auto& tensor : header.tensors) stored[tensor.name] = tensor;
    EXPECT_EQ(header.metadata.back(),
              (std::pair<std::string, std::string>("splitfuse.quantize", weight_format_name(format))));
    using Shape = std::vector<int64_t>;
    EXPECT_EQ(stored["final_norm.weight"].dtype, "BF16");
    EXPECT_EQ(stored["embed.weight"].dtype, "I8");   // also in int4
    EXPECT_EQ(stored["embed.weight.scale"].shape, (Shape{37, 1}));
    if (format == WeightFormat::kInt8) {
      EXPECT_EQ(stored["layers.0.mlp.up.weight"].dtype, "I8");
      EXPECT_EQ(stored["layers.0.mlp.up.weight"].shape, (Shape{22, 10}));
      EXPECT_EQ(stored["layers.0.mlp.up.weight.scale"].dtype, "F16");
      EXPECT_EQ(stored.size(), 2u * 16 + 5);
    } else {
      EXPECT_EQ(stored["layers.0.mlp.up.weight"].dtype, "U8");
      EXPECT_EQ(stored["layers.0.mlp.up.weight"].shape, (Shape{22, 1, 16}));
      EXPECT_EQ(stored["layers.0.mlp.up.weight.scale"].dtype, "F16");
      EXPECT_EQ(stored["layers.0.mlp.up.weight.minimum"].shape, (Shape{22, 1}));
      EXPECT_EQ(stored.size(), 3u * 14 + 2u * 2 + 5);
    }
  }
}

TEST(IntegerCheckpoint, ComesBackAsNearAsItsFormatAllows) {
  const TempDir dir;
  const ModelConfig config = tiny_model();
  MemorySource source(config, DType::kF32);
  for (const WeightFormat format : kIntegers) {
    const std::string file = dir.path("model.safetensors");
    write_checkpoint(config, source, DType::kF32, file, {}, format);
    const Checkpoint checkpoint = open_checkpoint(dir.path(""));
    EXPECT_EQ(checkpoint.weights->format(), format);
    for (const auto& [name, tensor] : source.tensors) {
      const TensorView view = checkpoint.weights->read(name);
      ASSERT_EQ(view.shape, tensor.shape);
      ASSERT_EQ(view.format == WeightFormat::kDense, tensor.shape.size() == 1) << name;
      if (view.format == WeightFormat::kDense) continue;
      std::vector<float> found(tensor.values.size());
      dequantize(view, found.data());
      const float steps = view.format == WeightFormat::kInt8 ? 254.0f : 15.0f;
      for (size_t i = 0; i < found.size(); ++i) {
        const size_t row = i / tensor.shape[1] * tensor.shape[1];
        float largest = 0;
        for (int64_t k = 0; k < tensor.shape[1]; ++k) largest = std::max(largest, std::abs(tensor.values[row + k]));
        ASSERT_LE(std::abs(found[i] - tensor.values[i]), 2 * largest / steps) << name << ' ' << i;
      }
    }
    // From itself: integers are carried, not fitted again.
    const std::string first = contents(file);
    write_checkpoint(config, *checkpoint.weights, DType::kF32, dir.path("again"), {}, format);
    EXPECT_EQ(contents(dir.path("again")), first);
    // As floats again, it holds the same weights.
    write_checkpoint(config, *checkpoint.weights, DType::kF32, dir.path("floats"));
    const Checkpoint floats = open_checkpoint(dir.path("floats"));
    EXPECT_EQ(floats.weights->format(), WeightFormat::kDense);
    for (const auto& [name, tensor] : source.tensors) {
      if (tensor.shape.size() == 1) continue;
      std::vector<float> found(tensor.values.size());
      dequantize(checkpoint.weights->read(name), found.data());
      EXPECT_EQ(std::memcmp(floats.weights->read(name).data, found.data(), 4 * found.size()), 0) << name;
    }
  }
}

TEST(IntegerCheckpoint, ScalesBeyondHalfPrecisionAreRefused) {
  const TempDir dir;
  const ModelConfig config = tiny_model();
  MemorySource source(config, DType::kF32);
  source.add("layers.1.mlp.up.weight", {22, 10}, std::vector<float>(220, -70000.0f));
  const auto write = [&](WeightFormat format) {
    write_checkpoint(config, source, DType::kF32, dir.path("out"), {}, format);
  };
  EXPECT_PRED_FORMAT2(IsSubstring, "tensor layers.1.mlp.up.weight holds weights beyond int4",
                      message_of<CheckpointError>([&] { write(WeightFormat::kInt4); }));
  EXPECT_TRUE(dir.files().empty());
  write(WeightFormat::kInt8);
  source.add("layers.1.mlp.up.weight", {22, 10}, std::vector<float>(220, 1e7f));
  EXPECT_PRED_FORMAT2(IsSubstring, "tensor layers.1.mlp.up.weight holds weights beyond int8",
                      message_of<CheckpointError>([&] { write(WeightFormat::kInt8); }));
}

TEST(IntegerCheckpoint, ItsPartsAreHeldToItsConfiguration) {
  const TempDir dir;
  ModelConfig config = tiny_model();
  config.tie_embeddings = true;
  MemorySource source(config, DType::kF32);
  write_checkpoint(config, source, DType::kF32, dir.path("int8"), {}, WeightFormat::kInt8);
  write_checkpoint(config, source, DType::kF32, dir.path("int4"), {}, WeightFormat::kInt4);
  // The text of the header changed, its length kept.
  const auto refused = [&](const std::string& good, const std::string& from, const std::string& to) {
    EXPECT_EQ(from.size(), to.size());
    std::string bytes = contents(dir.path(good));
    const size_t at = bytes.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    dir.write("bad", bytes.replace(at, from.size(), to));
    return message_of<CheckpointError>([&] { open_checkpoint(dir.path("bad")); });
  };
  EXPECT_PRED_FORMAT2(IsSubstring, "bad: splitfuse.quantize in its metadata: quantize is \"int5\"",
                      refused("int8", "quantize\":\"int8\"", "quantize\":\"int5\""));
  EXPECT_PRED_FORMAT2(IsSubstring, "bad: tensor embed.weight is of dtype \"U8\"; expected I8 in a checkpoint of int8",
                      refused("int8", "\"I8\"", "\"U8\""));
  EXPECT_PRED_FORMAT2(IsSubstring, "bad: there is no tensor for embed.weight.scale",
                      refused("int8", "\"embed.weight.scale\"", "\"embed.weight.scole\""));
  EXPECT_PRED_FORMAT2(IsSubstring, "bad: there is no tensor for layers.0.attn.q.weight.minimum",
                      refused("int4", "q.weight.minimum", "q.weight.m1nimum"));
  EXPECT_PRED_FORMAT2(
      IsSubstring, "bad: tensor layers.0.attn.q.weight is of shape [32, 2, 8]; the configuration asks for [32, 1, 16]",
      refused("int4", "\"shape\":[32, 1, 16]", "\"shape\":[32, 2, 8 ]"));
  EXPECT_PRED_FORMAT2(
      IsSubstring, "bad: tensor layers.0.attn.q.weight.scale is of shape [1, 32]; the configuration asks for [32, 1]",
      refused("int4", "\"shape\":[32, 1],", "\"shape\":[1, 32],"));
  // One format's file under the other's name, and without any.
  EXPECT_PRED_FORMAT2(IsSubstring, "bad: tensor layers.0.attn.q.weight is of shape [32, 1, 16]",
                      refused("int4", "quantize\":\"int4\"", "quantize\":\"int8\""));
  EXPECT_PRED_FORMAT2(IsSubstring, "bad: the configuration has no use for tensor \"embed.weight.scale\"",
                      refused("int8", "splitfuse.quantize", "splitfuse.quantise"));
}

}  // namespace
}  // namespace splitfuse
