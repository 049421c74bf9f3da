#include "base/check.h"

#include <cstdio>
#include <cstdlib>

namespace splitfuse::detail {

void assertion_failed(const char* expression, const char* file, int line) {
  std::fprintf(stderr, "splitfuse: internal error: %s (%s:%d)\n", expression, file, line);
  std::abort();
}

}  // namespace splitfuse::detail
