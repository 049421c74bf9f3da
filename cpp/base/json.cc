#include "base/json.h"

#include <algorithm>
#include <charconv>
#include <numeric>
#include <system_error>

#include "base/check.h"
#include "splitfuse/types.h"

namespace splitfuse {
namespace {

constexpr int kMaxDepth = 64;
constexpr char kHexDigits[] = "0123456789abcdef";

const char* kind_name(Json::Kind kind) {
  switch (kind) {
    case Json::Kind::kNull:
      return "null";
    case Json::Kind::kBool:
      return "a boolean";
    case Json::Kind::kInteger:
      return "an integer";
    case Json::Kind::kNumber:
      return "a number with a fraction or exponent";
    case Json::Kind::kString:
      return "a string";
    case Json::Kind::kArray:
      return "an array";
    case Json::Kind::kObject:
      return "an object";
  }
  return "nothing";
}

void expect(bool right, const char* expected, Json::Kind found) {
  if (!right) throw Error(cat("expected ", expected, ", found ", kind_name(found)));
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

bool is_plain(char c) {
  const auto byte = static_cast<unsigned char>(c);
  return byte >= 0x20 && byte < 0x80 && c != '"' && c != '\\';
}

/// Length of the UTF-8 sequence that `text` begins with; 0 if it is not one (RFC 3629: no overlong forms, no
/// surrogates, nothing beyond U+10FFFF).
size_t utf8_length(std::string_view text) {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const auto follows = [&](size_t i) { return (byte(i) & 0xc0u) == 0x80u; };
  const unsigned lead = byte(0);
  if (lead < 0x80) return text.empty() ? 0 : 1;
  if (lead >= 0xc2 && lead <= 0xdf) return follows(1) ? 2 : 0;
  if (lead >= 0xe0 && lead <= 0xef) {
    if ((lead == 0xe0 && byte(1) < 0xa0) || (lead == 0xed && byte(1) > 0x9f)) return 0;
    return follows(1) && follows(2) ? 3 : 0;
  }
  if (lead >= 0xf0 && lead <= 0xf4) {
    if ((lead == 0xf0 && byte(1) < 0x90) || (lead == 0xf4 && byte(1) > 0x8f)) return 0;
    return follows(1) && follows(2) && follows(3) ? 4 : 0;
  }
  return 0;
}

void append_utf8(uint32_t code, std::string& out) {
  const auto put = [&](uint32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xc0 | (code >> 6));
    put(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    put(0xe0 | (code >> 12));
    put(0x80 | ((code >> 6) & 0x3f));
    put(0x80 | (code & 0x3f));
  } else {
    put(0xf0 | (code >> 18));
    put(0x80 | ((code >> 12) & 0x3f));
    put(0x80 | ((code >> 6) & 0x3f));
    put(0x80 | (code & 0x3f));
  }
}

}  // namespace

/// Recursive descent over one text; the depth limit bounds the stack.
class JsonParser {
 public:
  explicit JsonParser(std::string_view text) : text_(text) {}

  Json document() {
    Json result = value(0);
    skip_space();
    if (at_ < text_.size()) fail("expected the end of the text");
    return result;
  }

 private:
  [[noreturn]] void fail(const std::string& what, size_t offset) const {
    throw Error(cat("JSON: ", what, " at byte ", offset));
  }
  [[noreturn]] void fail(const std::string& what) const { fail(what, at_); }

  // 0 stands for the end; a NUL in the text itself is never valid where peek() decides.
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void skip_space() {
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (c != ' ' && c != '\n' && c != '\r' && c != '\t') return;
      ++at_;
    }
  }

  bool take(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }

  Json value(int depth) {
    skip_space();
    Json result;
    switch (peek()) {
      case '{':
        read_object(depth, result);
        break;
      case '[':
        read_array(depth, result);
        break;
      case '"':
        result.kind_ = Json::Kind::kString;
        result.string_ = read_string();
        break;
      case 't':
        read_word("true");
        result.kind_ = Json::Kind::kBool;
        result.boolean_ = true;
        break;
      case 'f':
        read_word("false");
        result.kind_ = Json::Kind::kBool;
        break;
      case 'n':
        read_word("null");
        break;
      default:
        read_number(result);
        break;
    }
    return result;
  }

  void read_word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) fail(cat("expected ", word));
    at_ += word.size();
  }

  void enter(int depth) {
    if (depth >= kMaxDepth) fail(cat("nested deeper than ", kMaxDepth));
    ++at_;
    skip_space();
  }

  void read_array(int depth, Json& out) {
    enter(depth);
    out.kind_ = Json::Kind::kArray;
    if (take(']')) return;
    do {
      out.array_.push_back(value(depth + 1));
      skip_space();
    } while (take(','));
    if (!take(']')) fail("expected ',' or ']'");
  }

  void read_object(int depth, Json& out) {
    enter(depth);
    out.kind_ = Json::Kind::kObject;
    if (take('}')) return;
    std::vector<size_t> offsets;
    do {
      skip_space();
      offsets.push_back(at_);
      if (peek() != '"') fail("expected a key in quotes");
      std::string key = read_string();
      skip_space();
      if (!take(':')) fail("expected ':'");
      Json member = value(depth + 1);
      out.object_.emplace_back(std::move(key), std::move(member));
      skip_space();
    } while (take(','));
    if (!take('}')) fail("expected ',' or '}'");
    refuse_duplicates(out.object_, offsets);
  }

  void refuse_duplicates(const std::vector<std::pair<std::string, Json>>& members,
                         const std::vector<size_t>& offsets) const {
    std::vector<size_t> order(members.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      const int compared = members[a].first.compare(members[b].first);
      return compared != 0 ? compared < 0 : a < b;
    });
    for (size_t i = 1; i < order.size(); ++i) {
      const std::string& key = members[order[i]].first;
      if (key == members[order[i - 1]].first) fail(cat("key ", json_quote(key), " given twice"), offsets[order[i]]);
    }
  }

  std::string read_string() {
    ++at_;
    std::string out;
    while (true) {
      const size_t begin = at_;
      while (at_ < text_.size() && is_plain(text_[at_])) ++at_;
      out.append(text_, begin, at_ - begin);
      if (at_ >= text_.size()) fail("string without its closing quote");
      const auto byte = static_cast<unsigned char>(text_[at_]);
      if (byte == '"') {
        ++at_;
        return out;
      }
      if (byte == '\\') {
        read_escape(out);
      } else if (byte < 0x20) {
        fail("control character in a string");
      } else {
        const size_t length = utf8_length(text_.substr(at_));
        if (length == 0) fail("invalid UTF-8");
        out.append(text_, at_, length);
        at_ += length;
      }
    }
  }

  void read_escape(std::string& out) {
    const size_t begin = at_++;
    const char c = peek();
    ++at_;
    switch (c) {
      case '"':
      case '\\':
      case '/':
        out.push_back(c);
        return;
      case 'b':
        out.push_back('\b');
        return;
      case 'f':
        out.push_back('\f');
        return;
      case 'n':
        out.push_back('\n');
        return;
      case 'r':
        out.push_back('\r');
        return;
      case 't':
        out.push_back('\t');
        return;
      case 'u':
        break;
      default:
        fail("unknown escape", begin);
    }
    uint32_t code = read_hex4();
    if (code >= 0xd800 && code < 0xe000) {
      const bool paired = code < 0xdc00 && text_.substr(at_, 2) == "\\u";
      if (paired) at_ += 2;
      const uint32_t low = paired ? read_hex4() : 0;
      if (low < 0xdc00 || low >= 0xe000) fail("unpaired surrogate", begin);
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    append_utf8(code, out);
  }

  uint32_t read_hex4() {
    const std::string_view digits = text_.substr(std::min(at_, text_.size()), 4);
    uint32_t code = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
    if (error != std::errc() || digits.size() < 4 || end != digits.data() + 4) fail("expected four hex digits");
    at_ += 4;
    return code;
  }

  void skip_digits() {
    if (!is_digit(peek())) fail("expected a digit");
    while (is_digit(peek())) ++at_;
  }

  void read_number(Json& out) {
    const size_t begin = at_;
    const bool negative = take('-');
    if (!negative && !is_digit(peek())) fail("expected a value");
    if (!take('0')) skip_digits();
    bool integer = true;
    if (take('.')) {
      integer = false;
      skip_digits();
    }
    if (take('e') || take('E')) {
      integer = false;
      if (!take('+')) take('-');
      skip_digits();
    }
    const char* first = text_.data() + begin;
    const char* last = text_.data() + at_;
    std::errc error;
    if (integer) {
      out.kind_ = Json::Kind::kInteger;
      error = std::from_chars(first, last, out.integer_).ec;
    } else {
      out.kind_ = Json::Kind::kNumber;
      error = std::from_chars(first, last, out.number_).ec;
    }
    if (error != std::errc()) fail(integer ? "integer beyond 64 bits" : "number beyond the range of a double", begin);
  }

  std::string_view text_;
  size_t at_ = 0;
};

Json Json::parse(std::string_view text) { return JsonParser(text).document(); }

bool Json::boolean() const {
  expect(kind_ == Kind::kBool, "a boolean", kind_);
  return boolean_;
}

int64_t Json::integer() const {
  expect(kind_ == Kind::kInteger, "an integer", kind_);
  return integer_;
}

double Json::number() const {
  expect(kind_ == Kind::kNumber || kind_ == Kind::kInteger, "a number", kind_);
  return kind_ == Kind::kInteger ? static_cast<double>(integer_) : number_;
}

const std::string& Json::string() const {
  expect(kind_ == Kind::kString, "a string", kind_);
  return string_;
}

const std::vector<Json>& Json::array() const {
  expect(kind_ == Kind::kArray, "an array", kind_);
  return array_;
}

const std::vector<std::pair<std::string, Json>>& Json::object() const {
  expect(kind_ == Kind::kObject, "an object", kind_);
  return object_;
}

const Json* Json::find(std::string_view key) const {
  for (const auto& [name, member] : object()) {
    if (name == key) return &member;
  }
  return nullptr;
}

std::string json_quote(std::string_view text) {
  std::string out = "\"";
  for (size_t i = 0; i < text.size();) {
    const char c = text[i];
    const size_t length = utf8_length(text.substr(i));
    if (length > 1) {
      out.append(text, i, length);
    } else if (length == 0) {
      out += "\\ufffd";
    } else if (is_plain(c) && c != '\x7f') {
      out.push_back(c);
    } else if (c == '"' || c == '\\') {
      out.push_back('\\');
      out.push_back(c);
    } else {
      out += "\\u00";
      out.push_back(kHexDigits[(c >> 4) & 0xf]);
      out.push_back(kHexDigits[c & 0xf]);
    }
    i += std::max<size_t>(length, 1);
  }
  out.push_back('"');
  return out;
}

}  // namespace splitfuse
