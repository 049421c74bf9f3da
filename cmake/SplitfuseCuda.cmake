# Whether the CUDA backend is built. Sets SPLITFUSE_CUDA_SOURCES: without CUDA, the stub whose factory says so.
set(SPLITFUSE_CUDA_SOURCES ${PROJECT_SOURCE_DIR}/cuda/no_cuda.cc)

if(NOT SPLITFUSE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "SPLITFUSE_CUDA is '${SPLITFUSE_CUDA}'; it must be AUTO, ON or OFF.")
endif()
if(SPLITFUSE_CUDA STREQUAL "ON")
  set(missing "")
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    list(APPEND missing "a CUDA compiler (nvcc >= 13.0 on PATH, or CUDACXX)")
  endif()
  find_path(SPLITFUSE_CUTLASS_DIR cute/tensor.hpp PATH_SUFFIXES include)
  if(NOT SPLITFUSE_CUTLASS_DIR)
    list(APPEND missing "CUTLASS headers (set SPLITFUSE_CUTLASS_DIR to the folder that holds cute/ and cutlass/)")
  endif()
  if(missing)
    list(JOIN missing "; " missing)
    message(FATAL_ERROR "SPLITFUSE_CUDA=ON, but this is missing: ${missing}. "
                        "Install it, or configure with SPLITFUSE_CUDA=AUTO.")
  endif()
  message(FATAL_ERROR "SPLITFUSE_CUDA=ON: compiler and CUTLASS are there, but this version has no CUDA kernels yet. "
                      "Configure with SPLITFUSE_CUDA=AUTO for the CPU backend.")
endif()
