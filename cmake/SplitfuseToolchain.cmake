# The compiler: found with a clear message, checked, and given the flags of every target.
include(CheckLanguage)

if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
  message(FATAL_ERROR "splitfuse runs on Linux; this is ${CMAKE_SYSTEM_NAME}.")
endif()
check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  message(FATAL_ERROR "splitfuse needs a C++20 compiler (g++ >= 11 or clang >= 14) and found none. "
                      "On Debian: apt-get install g++. Elsewhere: set CXX.")
endif()
if(NOT CMAKE_CXX_COMPILER_LAUNCHER)
  find_program(SPLITFUSE_CCACHE ccache)
  if(SPLITFUSE_CCACHE)
    set(CMAKE_CXX_COMPILER_LAUNCHER ${SPLITFUSE_CCACHE})
  endif()
endif()
enable_language(CXX)

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()

include(CheckCXXSourceCompiles)
set(CMAKE_REQUIRED_FLAGS -std=c++20)
check_cxx_source_compiles([[
#include <bit>
#include <concepts>
#include <cstdint>
#include <span>
struct Pair { int a, b; bool operator==(const Pair&) const = default; };
int main() {
  int values[2] = {1, 2};
  std::span<const int> view(values);
  return std::bit_cast<std::int32_t>(1.0f) == view[0] && Pair{1, 2} == Pair{1, 2};
}]] SPLITFUSE_CXX20)
unset(CMAKE_REQUIRED_FLAGS)
if(NOT SPLITFUSE_CXX20)
  message(FATAL_ERROR "splitfuse needs a C++20 compiler (g++ >= 11 or clang >= 14); ${CMAKE_CXX_COMPILER} "
                      "(${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}) cannot compile a C++20 program. "
                      "On Debian 12: apt-get install g++. Elsewhere: set CXX.")
endif()

find_package(Threads REQUIRED)

# What every target of ours is compiled with. Results must not depend on where the compiler chose to fuse a
# multiplication with an addition, so it never does: kernels that want FMA ask for it by name.
add_library(splitfuse_flags INTERFACE)
set(warnings -Wall -Wextra)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # False alarms inside its own std::string (GCC bug 105651).
  list(APPEND warnings -Wno-restrict)
endif()
list(JOIN warnings "," host_warnings)
target_compile_options(splitfuse_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:${warnings} -ffp-contract=off $<$<BOOL:${SPLITFUSE_WERROR}>:-Werror>>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=${host_warnings} --fmad=false $<$<BOOL:${SPLITFUSE_WERROR}>:-Werror=all-warnings>>)
if(SPLITFUSE_SANITIZE)
  list(JOIN SPLITFUSE_SANITIZE "," sanitizers)
  # -O1: instrumented, the kernels take minutes to compile at -O3.
  target_compile_options(splitfuse_flags INTERFACE -fsanitize=${sanitizers} -fno-sanitize-recover=all
                         -fno-omit-frame-pointer -g -O1)
  target_link_options(splitfuse_flags INTERFACE -fsanitize=${sanitizers})
endif()
