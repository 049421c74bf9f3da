#include "model/safetensors.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <bit>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "safetensors_bytes.h"
#include "splitfuse/weights.h"

namespace splitfuse {
namespace {

using testing::bytes_of;
using testing::entry;
using ::testing::IsSubstring;
using testing::message_of;
using testing::RawTensor;
using testing::safetensors_bytes;
using testing::TempDir;
using testing::with_header;
using Names = std::vector<std::pair<std::string, std::string>>;

std::string copied(const TensorView& view) {
  int64_t size = dtype_size(view.dtype);
  for (const int64_t extent : view.shape) size *= extent;
  return {static_cast<const char*>(view.data), static_cast<size_t>(size)};
}

/// Resident bytes of mapped files, on disk or in memory.
int64_t mapped_resident() {
  std::ifstream status("/proc/self/status");
  int64_t kib = 0;
  for (std::string word; status >> word;) {
    int64_t value = 0;
    if ((word == "RssFile:" || word == "RssShmem:") && status >> value) kib += value;
  }
  return kib * 1024;
}

const RawTensor kA{"a", "F32", "[2, 3]", std::string(24, '\1')};
const RawTensor kB{"b", "BF16", "[5]", std::string(10, '\2')};

TEST(Safetensors, ReadsAFile) {
  const TempDir dir;
  const std::vector<float> f32 = {1.5f, -2, 3, 4, 5, 6};
  const std::vector<uint16_t> bf16 = {0x3f80, 0x4000};
  const std::vector<uint16_t> f16 = {0x3c00};
  const std::string file = dir.write("x", safetensors_bytes({{"m.f32", "F32", "[2, 3]", bytes_of(f32)},
                                                             {"ids", "I64", "[1]", std::string(8, '\7')},
                                                             {"m.bf16", "BF16", "[2]", bytes_of(bf16)},
                                                             {"m.f16", "F16", "[1, 1, 1]", bytes_of(f16)},
                                                             {"scalar", "F32", "[]", bytes_of<float>({9})},
                                                             {"none", "F16", "[0, 4]", ""}},
                                                            "{\"format\": \"pt\", \"x\": \"\\u00e9\"}"));
  const SafetensorsHeader header = read_safetensors_header(file);
  ASSERT_EQ(header.tensors.size(), 6u);
  EXPECT_EQ(header.tensors[1].name, "ids");
  EXPECT_EQ(header.tensors[1].dtype, "I64");
  EXPECT_EQ(header.tensors[3].shape, (std::vector<int64_t>{1, 1, 1}));
  EXPECT_EQ(header.metadata, (Names{{"format", "pt"}, {"x", "\xc3\xa9"}}));

  const auto source = open_safetensors(
      {file}, {{"A", "m.f32"}, {"B", "m.bf16"}, {"C", "m.f16"}, {"D", "scalar"}, {"E", "none"}, {"again", "m.f32"}});
  EXPECT_EQ(source->names(), (std::vector<std::string>{"A", "B", "C", "D", "E", "again"}));
  const TensorView a = source->read("A");
  EXPECT_EQ(a.dtype, DType::kF32);
  EXPECT_EQ(a.shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(copied(a), bytes_of(f32));
  EXPECT_EQ(source->read("B").dtype, DType::kBF16);
  EXPECT_EQ(copied(source->read("B")), bytes_of(bf16));
  EXPECT_EQ(source->read("C").dtype, DType::kF16);
  EXPECT_EQ(copied(source->read("C")), bytes_of(f16));
  EXPECT_EQ(copied(source->read("D")), bytes_of<float>({9}));
  EXPECT_EQ(copied(source->read("E")), "");
  EXPECT_EQ(copied(source->read("again")), bytes_of(f32));
  EXPECT_PRED_FORMAT2(IsSubstring, "no tensor for F", message_of<CheckpointError>([&] { source->read("F"); }));
}

TEST(Safetensors, OrdersTensorsByTheirData) {
  const TempDir dir;
  const std::string header = "{" + entry("late", "U8", "[2]", 1, 3) + "," + entry("early", "U8", "[1]", 0, 1) + "}";
  const auto tensors = read_safetensors_header(dir.write("x", with_header(header, "abc"))).tensors;
  ASSERT_EQ(tensors.size(), 2u);
  EXPECT_EQ(tensors[0].name, "early");
}

TEST(Safetensors, ReadsSeveralFiles) {
  const TempDir dir;
  const std::vector<std::string> files = {dir.write("1", safetensors_bytes({kA})),
                                          dir.write("2", safetensors_bytes({kB}))};
  const auto source = open_safetensors(files, {{"x", "b"}, {"y", "a"}});
  EXPECT_EQ(copied(source->read("x")), kB.data);
  EXPECT_EQ(copied(source->read("y")), kA.data);
}

TEST(Safetensors, DataAtAnyByteCanBeRead) {
  const TempDir dir;
  const std::vector<float> values = {1, 2, 3, 4, 5};
  for (size_t shift = 0; shift < 8; ++shift) {
    const std::string file = dir.write(
        "x", safetensors_bytes({{"odd", "U8", "[1]", "z"}, {"v", "F32", "[5]", bytes_of(values)}}, "", shift));
    const auto source = open_safetensors({file}, {{"v", "v"}});
    const TensorView view = source->read("v");
    ASSERT_EQ(reinterpret_cast<uintptr_t>(view.data) % alignof(float), 0u) << shift;
    EXPECT_EQ(copied(view), bytes_of(values)) << shift;
    source->consumed(8);
    EXPECT_EQ(copied(view), bytes_of(values)) << shift;
    source->release();
    source->release();
  }
}

TEST(Safetensors, RandomTensorsRoundTrip) {
  const TempDir dir;
  std::mt19937 random(3);
  for (int round = 0; round < 30; ++round) {
    std::vector<RawTensor> tensors;
    Names names;
    for (unsigned i = 0, count = random() % 20; i < count; ++i) {
      const char* dtypes[] = {"F32", "BF16", "F16"};
      const unsigned kind = random() % 3;
      const unsigned rows = random() % 5;
      const unsigned columns = random() % 3000;
      std::string data(rows * columns * (kind == 0 ? 4 : 2), '\0');
      for (char& c : data) c = static_cast<char>(random());
      tensors.push_back({"t" + std::to_string(i), dtypes[kind],
                         "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]", data});
      names.emplace_back("c" + std::to_string(i), tensors.back().name);
    }
    const auto source = open_safetensors({dir.write("x", safetensors_bytes(tensors, "", random() % 64))}, names);
    for (int repeat = 0; repeat < 40 && !tensors.empty(); ++repeat) {
      const size_t i = random() % tensors.size();
      const TensorView view = source->read(names[i].first);
      ASSERT_EQ(copied(view), tensors[i].data);
      source->consumed(static_cast<int64_t>(random() % (tensors[i].data.size() + 1)));
      ASSERT_EQ(copied(view), tensors[i].data);
    }
  }
}

TEST(Safetensors, PagesOfUsedTensorsAreDropped) {
  const TempDir dir;
  constexpr int64_t kSize = 16 << 20;
  constexpr int64_t kSlack = 4 << 20;   // a huge page at either end
  constexpr int kCount = 5;
  std::vector<RawTensor> tensors;
  Names names;
  for (int i = 0; i < kCount; ++i) {
    tensors.push_back({std::to_string(i), "F32", "[" + std::to_string(kSize / 4) + "]", std::string(kSize, 'x')});
    names.emplace_back(tensors.back().name, tensors.back().name);
  }
  const auto source = open_safetensors({dir.write("x", safetensors_bytes(tensors))}, names);
  int64_t sum = 0;
  const auto touch = [&](const TensorView& view, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += 512) sum += static_cast<const char*>(view.data)[at];
  };
  const int64_t before = mapped_resident();
  for (const auto& [name, stored] : names) {
    touch(source->read(name), 0, kSize);
    EXPECT_GE(mapped_resident(), before + kSize / 2);   // or this test could not fail
    EXPECT_LE(mapped_resident(), before + kSize + kSlack) << name;
  }
  source->release();
  EXPECT_LE(mapped_resident(), before + kSlack);
  const TensorView view = source->read("3");
  for (int64_t at = 0; at < kSize; at += kSize / 8) {
    touch(view, at, at + kSize / 8);
    EXPECT_LE(mapped_resident(), before + kSize / 8 + kSlack);
    source->consumed(at + kSize / 8);
  }
  EXPECT_EQ(sum, 'x' * (kCount + 1) * kSize / 512);
}

// ---- Refusals. Every message names the file; `says` is the rest.

struct Bad {
  const char* what;
  std::string bytes;
  std::string says;
};

std::string one(const std::string& body, const std::string& data) {
  return with_header("{\"w\":{" + body + "}}", data);
}

std::vector<Bad> bad_files() {
  const std::string good = safetensors_bytes({kA, kB});
  const std::string a8 = std::string(8, 'a');
  std::string huge = good;
  huge[7] = '\x7f';
  std::string long_header = good;
  long_header[2] = '\1';
  const auto pair = [&](size_t b0, size_t e0, size_t b1, size_t e1) {
    return with_header("{" + entry("v", "U8", "[" + std::to_string(e0 - b0) + "]", b0, e0) + "," +
                           entry("w", "U8", "[" + std::to_string(e1 - b1) + "]", b1, e1) + "}",
                       a8);
  };
  return {
      {"empty", "", "0 bytes"},
      {"shorter than the length", good.substr(0, 7), "7 bytes"},
      {"shorter than the header", good.substr(0, 20), "truncated: the header takes"},
      {"shorter than the data", good.substr(0, good.size() - 1),
       "tensor \"b\": data ends at byte 34 of 33: the file is truncated"},
      {"absurd length", huge, "expected at most 100000000"},
      {"length beyond the file", long_header, "truncated: the header takes"},
      {"length 0", std::string(8, '\0'), "no JSON object"},
      {"no JSON", with_header("hello", ""), "no JSON object"},
      {"an array", with_header("[]", ""), "no JSON object"},
      {"space first", with_header(" {}", ""), "no JSON object"},
      {"damaged JSON", with_header("{\"w\":", ""), "the header is damaged: JSON: expected a value at byte 5"},
      {"zero bytes behind", with_header(std::string("{}\0", 3), ""), "the header is damaged"},
      {"invalid UTF-8", with_header("{\"\xff\":{}}", ""), "invalid UTF-8"},
      {"key twice", with_header("{" + entry("w", "U8", "[8]", 0, 8) + "," + entry("w", "U8", "[8]", 0, 8) + "}", a8),
       "key \"w\" given twice"},
      {"metadata no object", with_header("{\"__metadata__\":[]}", ""), "\"__metadata__\": expected an object"},
      {"metadata no string", with_header("{\"__metadata__\":{\"a\":1}}", ""), "\"__metadata__\": expected a string"},
      {"entry no object", with_header("{\"w\":3}", ""), "tensor \"w\": expected an object"},
      {"unknown field", one("\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8],\"scale\":1", a8),
       "tensor \"w\": unknown field \"scale\""},
      {"no dtype", one("\"shape\":[8],\"data_offsets\":[0,8]", a8), "tensor \"w\": field \"dtype\" is missing"},
      {"no shape", one("\"dtype\":\"U8\",\"data_offsets\":[0,8]", a8), "tensor \"w\": field \"shape\" is missing"},
      {"no offsets", one("\"dtype\":\"U8\",\"shape\":[8]", a8), "tensor \"w\": field \"data_offsets\" is missing"},
      {"dtype a number", one("\"dtype\":8,\"shape\":[8],\"data_offsets\":[0,8]", a8),
       "tensor \"w\": expected a string"},
      {"fractional shape", one("\"dtype\":\"U8\",\"shape\":[8.0],\"data_offsets\":[0,8]", a8),
       "tensor \"w\": expected an integer"},
      {"negative shape", one("\"dtype\":\"U8\",\"shape\":[-2,-4],\"data_offsets\":[0,8]", a8),
       "tensor \"w\": shape [-2] is negative"},
      {"overflowing shape", one("\"dtype\":\"U8\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,8]", a8),
       "tensor \"w\": shape [4294967296, 4294967296] overflows"},
      {"three offsets", one("\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,4,8]", a8),
       "tensor \"w\": data_offsets hold 3 numbers"},
      {"begin after end", one("\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[8,0]", a8),
       "tensor \"w\": data_offsets [8, 0]"},
      {"negative begin", one("\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[-4,4]", a8),
       "tensor \"w\": data_offsets [-4, 4]"},
      {"beyond the data", one("\"dtype\":\"U8\",\"shape\":[9],\"data_offsets\":[0,9]", a8),
       "tensor \"w\": data ends at byte 9 of 8"},
      {"far beyond",
       one("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[9223372036854775803,9223372036854775807]", a8),
       "tensor \"w\": data ends at byte 9223372036854775807"},
      {"shape too small", one("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,8]", a8),
       "tensor \"w\": shape [1] of F32 takes 4 bytes"},
      {"shape too large", one("\"dtype\":\"F16\",\"shape\":[5],\"data_offsets\":[0,8]", a8),
       "tensor \"w\": shape [5] of F16 takes 10 bytes"},
      {"bits left over", one("\"dtype\":\"F4\",\"shape\":[17],\"data_offsets\":[0,8]", a8),
       "tensor \"w\": shape [17] of F4 takes 9 bytes"},
      {"overlap", pair(0, 5, 4, 8), "tensor \"w\" overlaps tensor \"v\""},
      {"same place", pair(0, 8, 0, 8), "tensor \"w\" overlaps tensor \"v\""},
      {"hole", pair(0, 4, 5, 8), "1 bytes before tensor \"w\" belong to no tensor"},
      {"hole at the front", pair(2, 4, 4, 8), "2 bytes before tensor \"v\" belong to no tensor"},
      {"hole at the end", pair(0, 4, 4, 7), "the last 1 bytes belong to no tensor"},
      {"data without tensors", with_header("{}", "x"), "the last 1 bytes belong to no tensor"},
  };
}

TEST(Safetensors, RefusesBadFiles) {
  const TempDir dir;
  for (const Bad& bad : bad_files()) {
    const std::string file = dir.write("bad.safetensors", bad.bytes);
    for (const auto& open : {std::function<void()>([&] { read_safetensors_header(file); }),
                             std::function<void()>([&] { open_safetensors({file}, {}); })}) {
      const std::string message = message_of<CheckpointError>(open);
      EXPECT_EQ(message.find(file + ": "), 0u) << bad.what << ": " << message;
      EXPECT_NE(message.find(bad.says), std::string::npos) << bad.what << ": " << message;
    }
  }
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const TempDir dir;
  const std::string good = safetensors_bytes({kA, kB}, "{\"format\": \"pt\"}");
  EXPECT_EQ(message_of<CheckpointError>([&] { read_safetensors_header(dir.write("x", good)); }), "");
  for (size_t size = 0; size < good.size(); ++size) {
    const std::string file = dir.write("x", good.substr(0, size));
    EXPECT_NE(message_of<CheckpointError>([&] { read_safetensors_header(file); }), "") << size;
  }
}

TEST(Safetensors, RefusesWhatIsNoRegularFile) {
  const TempDir dir;
  const std::string absent = dir.path("absent");
  const std::string pipe = dir.path("pipe");
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  for (const auto& [path, says] :
       {std::pair(absent, "No such file"), std::pair(pipe, "not a regular file"),
        std::pair(dir.path(""), "not a regular file"), std::pair(std::string("/dev/zero"), "not a regular file")}) {
    const std::string message = message_of<CheckpointError>([&] { open_safetensors({path}, {}); });
    EXPECT_PRED_FORMAT2(IsSubstring, path, message);
    EXPECT_PRED_FORMAT2(IsSubstring, says, message);
  }
}

TEST(Safetensors, ADtypeMattersOnlyWhereAWeightIsWanted) {
  const TempDir dir;
  const std::string file =
      dir.write("x", safetensors_bytes({kA, {"q", "F3_NEW", "[7]", "abc"}, {"ids", "I32", "[1]", "1234"}}));
  EXPECT_EQ(read_safetensors_header(file).tensors[1].dtype, "F3_NEW");
  EXPECT_EQ(copied(open_safetensors({file}, {{"A", "a"}})->read("A")), kA.data);
  for (const auto& [name, dtype] : {std::pair("q", "F3_NEW"), std::pair("ids", "I32")}) {
    const std::string message =
        message_of<CheckpointError>([&, stored = name] { open_safetensors({file}, {{"Q", stored}}); });
    EXPECT_PRED_FORMAT2(IsSubstring, file + ": tensor \"" + name + "\" is of dtype \"" + dtype + "\"", message);
  }
}

TEST(Safetensors, NamesMustBeThereOnce) {
  const TempDir dir;
  const std::string first = dir.write("first", safetensors_bytes({kA}));
  const std::string second = dir.write("second", safetensors_bytes({kB, kA}));
  EXPECT_PRED_FORMAT2(IsSubstring, second + ": tensor \"a\" is also in " + first,
                      message_of<CheckpointError>([&] { open_safetensors({first, second}, {{"B", "b"}}); }));
  EXPECT_PRED_FORMAT2(IsSubstring, first + ": there is no tensor \"b\", wanted as B",
                      message_of<CheckpointError>([&] { open_safetensors({first}, {{"B", "b"}}); }));
  EXPECT_PRED_FORMAT2(IsSubstring, "two tensors are given for X",
                      message_of<CheckpointError>([&] { open_safetensors({second}, {{"X", "a"}, {"X", "b"}}); }));
  EXPECT_PRED_FORMAT2(IsSubstring, "there is no tensor \"b\"",
                      message_of<CheckpointError>([&] { open_safetensors({}, {{"B", "b"}}); }));
}

TEST(Safetensors, AHeaderOfTenMegabytes) {
  const TempDir dir;
  std::string json = "{";
  const int count = 100000;
  for (int i = 0; i < count; ++i) {
    json += (i == 0 ? "" : ",") +
            entry("model.layers.experts." + std::to_string(i) + ".down_proj.weight", "U8", "[1, 1]", i, i + 1);
  }
  const std::string file = dir.write("x", with_header(json + "}", std::string(count, 'x')));
  ASSERT_GT(json.size(), 9'000'000u);
  EXPECT_EQ(read_safetensors_header(file).tensors.size(), static_cast<size_t>(count));
}

}  // namespace
}  // namespace splitfuse
