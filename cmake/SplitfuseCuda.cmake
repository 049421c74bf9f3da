# Whether the CUDA backend is built. Sets SPLITFUSE_CUDA_BUILT, and if so enables the language and makes splitfuse_cutlass,
# the headers of CUTLASS, out of SPLITFUSE_CUTLASS_DIR or the wheel nvidia-cutlass beside the Python that builds.
set(SPLITFUSE_CUDA_BUILT FALSE)

if(NOT SPLITFUSE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "SPLITFUSE_CUDA is '${SPLITFUSE_CUDA}'; it must be AUTO, ON or OFF.")
endif()
if(SPLITFUSE_CUDA STREQUAL "OFF" OR (SPLITFUSE_CUDA STREQUAL "AUTO" AND CMAKE_CROSSCOMPILING))
  return()
endif()

# ---- What it takes
set(missing "")

set(hints "")
find_package(Python 3.10 COMPONENTS Interpreter QUIET)
if(Python_FOUND)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import importlib.util; print(*importlib.util.find_spec('cutlass_library').submodule_search_locations)"
    OUTPUT_VARIABLE wheel OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE absent)
  if(absent EQUAL 0)
    set(hints ${wheel}/source)
  endif()
endif()
find_path(SPLITFUSE_CUTLASS_DIR cute/tensor.hpp HINTS ${hints} PATH_SUFFIXES include
          DOC "The folder that holds cute/ and cutlass/")
if(NOT SPLITFUSE_CUTLASS_DIR)
  list(APPEND missing "CUTLASS headers (pip install --no-deps nvidia-cutlass==4.2.0.0, "
                      "or set SPLITFUSE_CUTLASS_DIR to the folder that holds cute/ and cutlass/)")
  list(JOIN missing "" missing)
elseif(NOT EXISTS "${SPLITFUSE_CUTLASS_DIR}/cute/tensor.hpp")
  list(APPEND missing "CUTLASS headers: there is no ${SPLITFUSE_CUTLASS_DIR}/cute/tensor.hpp")
endif()

check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE version ERROR_QUIET)
  if(NOT version MATCHES "release ([0-9.]+)" OR CMAKE_MATCH_1 VERSION_LESS 13.0)
    list(APPEND missing "a CUDA compiler >= 13.0 (${CMAKE_CUDA_COMPILER} is ${CMAKE_MATCH_1})")
  endif()
else()
  list(APPEND missing "a CUDA compiler (nvcc >= 13.0 on PATH, or CUDACXX)")
endif()

if(missing)
  list(JOIN missing "; " missing)
  if(SPLITFUSE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "SPLITFUSE_CUDA=ON, but this is missing: ${missing}. "
                        "Install it, or configure with SPLITFUSE_CUDA=AUTO.")
  endif()
  message(STATUS "No CUDA backend: this is missing: ${missing}")
  return()
endif()

# ---- The language
if(SPLITFUSE_CCACHE AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${SPLITFUSE_CCACHE})
endif()
if(NOT CMAKE_CUDA_HOST_COMPILER AND NOT DEFINED ENV{CUDAHOSTCXX})
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)   # each target names its own
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
find_package(CUDAToolkit REQUIRED)

add_library(splitfuse_cutlass INTERFACE)
target_include_directories(splitfuse_cutlass SYSTEM INTERFACE ${SPLITFUSE_CUTLASS_DIR})
target_compile_options(splitfuse_cutlass INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>)

# A compiler of kernels takes up to 5 GB.
set_property(GLOBAL APPEND PROPERTY JOB_POOLS splitfuse_nvcc=2)
set(SPLITFUSE_CUDA_BUILT TRUE)
