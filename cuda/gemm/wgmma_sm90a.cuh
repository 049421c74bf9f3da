// wgmma on tiles that TMA laid down with the 128-byte swizzle.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

namespace splitfuse::cuda {

/// How wgmma finds rows of 64 16-bit elements: 128 bytes each, 1024 for 8 of them, swizzled. `address`: of the first,
/// in shared memory; a multiple of 1024. 16 further elements along a row are 32 bytes, 2 in the descriptor's units
/// of 16.
__device__ __forceinline__ uint64_t rows_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 / 16} << 32;
  constexpr uint64_t kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kEightRows | kUnused | (address & 0x3ffffu) >> 4;
}

namespace detail {

namespace gmma = cute::SM90::GMMA;
constexpr auto kAlongDepth = gmma::Major::K;

template <class Element, int kRows>
struct Instruction;
#define SPLITFUSE_WGMMA(rows)                                                                                     \
  template <>                                                                                                     \
  struct Instruction<__nv_bfloat16, rows> : gmma::MMA_64x##rows##x16_F32BF16BF16_SS<kAlongDepth, kAlongDepth> {}; \
  template <>                                                                                                     \
  struct Instruction<__half, rows> : gmma::MMA_64x##rows##x16_F32F16F16_SS<kAlongDepth, kAlongDepth> {};
SPLITFUSE_WGMMA(8)
SPLITFUSE_WGMMA(16)
SPLITFUSE_WGMMA(32)
SPLITFUSE_WGMMA(64)
SPLITFUSE_WGMMA(128)
SPLITFUSE_WGMMA(256)
#undef SPLITFUSE_WGMMA

template <class Op, size_t... kIndex>
__device__ __forceinline__ void call(uint64_t a, uint64_t b, float* sums, gmma::ScaleOut scale,
                                     std::index_sequence<kIndex...>) {
  Op::fma(a, b, sums[kIndex]..., scale);
}

}  // namespace detail

/// A warpgroup's sums [64 weight rows, kRows] += 16 of depth, or = where `first`. Asynchronous: as of wgmma.
template <class Element, int kRows>
__device__ __forceinline__ void wgmma(uint64_t weights, uint64_t in, float (&sums)[kRows / 2], bool first) {
  detail::call<detail::Instruction<Element, kRows>>(weights, in, sums,
                                                    first ? detail::gmma::ScaleOut::Zero : detail::gmma::ScaleOut::One,
                                                    std::make_index_sequence<kRows / 2>{});
}

/// Keeps the compiler from moving what it does with the sums across.
template <int kCount>
__device__ __forceinline__ void hold(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) cute::warpgroup_fence_operand(sums[i]);
}

}  // namespace splitfuse::cuda
