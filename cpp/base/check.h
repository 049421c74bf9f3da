// Assertions for programmers' faults and a way to build messages.
#pragma once

#include <sstream>
#include <string>

namespace splitfuse {

/// Concatenates anything that streams.
template <class... Args>
std::string cat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

namespace detail {
[[noreturn]] void assertion_failed(const char* expression, const char* file, int line);
}

/// Integer division rounded up, and rounding up to a multiple; for non-negative values.
template <class T>
constexpr T ceil_div(T value, T divisor) {
  return (value + divisor - 1) / divisor;
}
template <class T>
constexpr T round_up(T value, T multiple) {
  return ceil_div(value, multiple) * multiple;
}

}  // namespace splitfuse

/// Ends the program with file and line if a fault of ours is found. On in every build: it is never in an inner loop.
#define SPLITFUSE_ASSERT(expression) \
  ((expression) ? void(0) : ::splitfuse::detail::assertion_failed(#expression, __FILE__, __LINE__))
