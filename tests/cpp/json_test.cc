#include "base/json.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "safetensors_bytes.h"
#include "splitfuse/types.h"

namespace splitfuse {
namespace {

using ::testing::IsSubstring;

std::string refusal(const std::string& text) {
  return testing::message_of<Error>([&] { Json::parse(text); });
}

TEST(Json, ReadsEveryKind) {
  const Json json =
      Json::parse(R"( {"n": null, "t": true, "f": false, "i": -12, "d": 1.5e2, "s": "x", "a": [1, []], "o": {}} )");
  ASSERT_EQ(json.kind(), Json::Kind::kObject);
  EXPECT_EQ(json.find("n")->kind(), Json::Kind::kNull);
  EXPECT_TRUE(json.find("t")->boolean());
  EXPECT_FALSE(json.find("f")->boolean());
  EXPECT_EQ(json.find("i")->integer(), -12);
  EXPECT_EQ(json.find("d")->number(), 150.0);
  EXPECT_EQ(json.find("s")->string(), "x");
  ASSERT_EQ(json.find("a")->array().size(), 2u);
  EXPECT_EQ(json.find("a")->array()[0].integer(), 1);
  EXPECT_TRUE(json.find("a")->array()[1].array().empty());
  EXPECT_TRUE(json.find("o")->object().empty());
  EXPECT_EQ(json.find("absent"), nullptr);
}

TEST(Json, ObjectsKeepTheirOrder) {
  const Json json = Json::parse(R"({"z": 1, "a": 2, "m": 3})");
  std::string keys;
  for (const auto& [key, value] : json.object()) keys += key;
  EXPECT_EQ(keys, "zam");
}

TEST(Json, Numbers) {
  EXPECT_EQ(Json::parse("0").integer(), 0);
  EXPECT_EQ(Json::parse("-0").integer(), 0);
  EXPECT_EQ(Json::parse("9223372036854775807").integer(), std::numeric_limits<int64_t>::max());
  EXPECT_EQ(Json::parse("-9223372036854775808").integer(), std::numeric_limits<int64_t>::min());
  EXPECT_EQ(Json::parse("7").number(), 7.0);
  EXPECT_EQ(Json::parse("1E+2").number(), 100.0);
  EXPECT_EQ(Json::parse("0.1").number(), 0.1);
  EXPECT_EQ(Json::parse("1e0").kind(), Json::Kind::kNumber);
  EXPECT_TRUE(std::signbit(Json::parse("-0.0").number()));
  for (const char* wrong :
       {"01", "+1", "-", "1.", ".5", "1e", "1e+", "0x1", "NaN", "Infinity", "-Infinity", "1_0", "--1"}) {
    EXPECT_NE(refusal(wrong), "") << wrong;
  }
  EXPECT_PRED_FORMAT2(IsSubstring, "integer beyond 64 bits at byte 0", refusal("9223372036854775808"));
  EXPECT_PRED_FORMAT2(IsSubstring, "beyond the range of a double at byte 1", refusal("[1e999]"));
}

TEST(Json, Strings) {
  EXPECT_EQ(Json::parse(R"("\"\\\/\b\f\n\r\t")").string(), "\"\\/\b\f\n\r\t");
  EXPECT_EQ(Json::parse(R"("\u0041\u00e9\u20AC\ud83d\ude00")").string(), "A\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80");
  EXPECT_EQ(Json::parse("\"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\"").string(), "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80");
  EXPECT_EQ(Json::parse(R"("a\u0000b")").string(), std::string("a\0b", 3));
  for (const char* wrong : {R"("\x")", R"("\u12")", R"("\u12g4")", R"("\u-123")", R"("\ud800")", R"("\ud800\u0041")",
                            R"("\udc00")", R"("\ud83dx")", "\"a\nb\"", "\"a", "\"a\\", "\"\\u", "'a'"}) {
    EXPECT_NE(refusal(wrong), "") << wrong;
  }
  EXPECT_PRED_FORMAT2(IsSubstring, "unpaired surrogate at byte 8", refusal(R"(["ok", "\ud800"])"));
}

TEST(Json, RefusesInvalidUtf8) {
  for (const char* wrong : {"\x80", "\xc0\x80", "\xc1\xbf", "\xc3", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xe2\x82",
                            "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xff", "\xf0\x9f\x98"}) {
    EXPECT_PRED_FORMAT2(IsSubstring, "invalid UTF-8 at byte 1", refusal("\"" + std::string(wrong) + "\""));
    EXPECT_NE(refusal("\"" + std::string(wrong)), "");
  }
}

TEST(Json, RefusesWhatIsNotOneValue) {
  for (const char* wrong : {"",
                            " ",
                            "{",
                            "}",
                            "[",
                            "]",
                            "[1",
                            "[1,",
                            "[1,]",
                            "[,1]",
                            "[1 2]",
                            "{\"a\"}",
                            "{\"a\":}",
                            "{\"a\":1,}",
                            "{a:1}",
                            "{1:1}",
                            "{\"a\":1 \"b\":2}",
                            "nul",
                            "nulll",
                            "True",
                            "1 2",
                            "{} x",
                            "// c\n1",
                            "\xef\xbb\xbf{}",
                            "[1]\v"}) {
    EXPECT_NE(refusal(wrong), "") << wrong;
  }
  EXPECT_PRED_FORMAT2(IsSubstring, "at byte 1", refusal(std::string("1\0", 2)));
  EXPECT_PRED_FORMAT2(IsSubstring, "expected ':' at byte 13", refusal("{\"a\": 1, \"b\" 2}"));
}

TEST(Json, RefusesAKeyGivenTwice) {
  EXPECT_PRED_FORMAT2(IsSubstring, "key \"b\" given twice at byte 18", refusal(R"({"b": 1, "a": {}, "b": 2})"));
  EXPECT_PRED_FORMAT2(IsSubstring, "key \"a\" given twice", refusal(R"({"a": 1, "\u0061": 2})"));
  EXPECT_EQ(refusal(R"({"a": {"a": 1}, "b": {"a": 1}})"), "");
}

TEST(Json, BoundsItsDepth) {
  const auto nested = [](int depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_EQ(refusal(nested(64)), "");
  EXPECT_PRED_FORMAT2(IsSubstring, "nested deeper than 64 at byte 64", refusal(nested(65)));
  EXPECT_PRED_FORMAT2(IsSubstring, "nested deeper than 64", refusal(std::string(1000000, '[')));
  std::string objects;
  for (int i = 0; i < 100000; ++i) objects += "{\"a\":";
  EXPECT_PRED_FORMAT2(IsSubstring, "nested deeper than 64", refusal(objects));
}

TEST(Json, AccessorsNameTheKindFound) {
  const Json json = Json::parse(R"(["x", 1, 1.5, {}])");
  const auto& items = json.array();
  EXPECT_PRED_FORMAT2(IsSubstring, "expected an integer, found a string",
                      testing::message_of<Error>([&] { items[0].integer(); }));
  EXPECT_PRED_FORMAT2(IsSubstring, "expected an integer, found a number",
                      testing::message_of<Error>([&] { items[2].integer(); }));
  EXPECT_PRED_FORMAT2(IsSubstring, "expected a string, found an integer",
                      testing::message_of<Error>([&] { items[1].string(); }));
  EXPECT_PRED_FORMAT2(IsSubstring, "expected a number, found an object",
                      testing::message_of<Error>([&] { items[3].number(); }));
  EXPECT_PRED_FORMAT2(IsSubstring, "expected an array", testing::message_of<Error>([&] { items[3].array(); }));
  EXPECT_PRED_FORMAT2(IsSubstring, "expected an object, found an array",
                      testing::message_of<Error>([&] { json.find("x"); }));
  EXPECT_PRED_FORMAT2(IsSubstring, "expected a boolean", testing::message_of<Error>([&] { items[3].boolean(); }));
}

TEST(Json, QuoteIsUndoneByParse) {
  std::mt19937 random(7);
  const std::vector<std::string> pieces = {
      "a", "\"", "\\", "/", "\n", std::string(1, '\0'), "\x1f", "\x7f", "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80"};
  for (int i = 0; i < 1000; ++i) {
    std::string text;
    for (unsigned n = random() % 20; n > 0; --n) text += pieces[random() % pieces.size()];
    EXPECT_EQ(Json::parse(json_quote(text)).string(), text);
  }
}

TEST(Json, QuoteMendsInvalidUtf8) {
  EXPECT_EQ(json_quote("a\xff"
                       "b\xc3"),
            "\"a\\ufffdb\\ufffd\"");
  EXPECT_EQ(json_quote(std::string("\x01\0", 2)), "\"\\u0001\\u0000\"");
}

}  // namespace
}  // namespace splitfuse
