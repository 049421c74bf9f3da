#include <array>
#include <utility>

#include "base/check.h"
#include "splitfuse/config.h"

namespace splitfuse {
namespace {

// By enumerator, from 0 on.
constexpr std::array kNormKinds = {"rms", "layer"};
constexpr std::array kNormPlaces = {"pre", "post", "both", "residual"};
constexpr std::array kParallels = {"none", "shared", "own"};
constexpr std::array kQkNorms = {"none", "head", "row"};
constexpr std::array kActivations = {"none", "silu", "gelu", "gelu_tanh", "relu", "swiglu_clamped"};
constexpr std::array kScorings = {"softmax", "top_softmax", "sigmoid"};

template <class Enum, class Words>
const char* word_of(Enum value, const Words& words) {
  const auto index = static_cast<size_t>(value);
  SPLITFUSE_ASSERT(index < words.size());
  return words[index];
}

template <class Enum, class Words>
Enum enum_of(const std::string& word, const Words& words) {
  std::string expected;
  for (size_t i = 0; i < words.size(); ++i) {
    if (word == words[i]) return static_cast<Enum>(i);
    expected += cat(i == 0 ? "" : i + 1 == words.size() ? " or " : ", ", '"', words[i], '"');
  }
  throw ConfigError(cat("\"", word, "\" is unknown here; expected ", expected));
}

}  // namespace

const char* config_word(NormKind value) { return word_of(value, kNormKinds); }
const char* config_word(NormPlace value) { return word_of(value, kNormPlaces); }
const char* config_word(Parallel value) { return word_of(value, kParallels); }
const char* config_word(QkNorm value) { return word_of(value, kQkNorms); }
const char* config_word(Activation value) { return word_of(value, kActivations); }
const char* config_word(Scoring value) { return word_of(value, kScorings); }

template <>
NormKind config_enum(const std::string& word) {
  return enum_of<NormKind>(word, kNormKinds);
}
template <>
NormPlace config_enum(const std::string& word) {
  return enum_of<NormPlace>(word, kNormPlaces);
}
template <>
Parallel config_enum(const std::string& word) {
  return enum_of<Parallel>(word, kParallels);
}
template <>
QkNorm config_enum(const std::string& word) {
  return enum_of<QkNorm>(word, kQkNorms);
}
template <>
Activation config_enum(const std::string& word) {
  return enum_of<Activation>(word, kActivations);
}
template <>
Scoring config_enum(const std::string& word) {
  return enum_of<Scoring>(word, kScorings);
}

}  // namespace splitfuse
