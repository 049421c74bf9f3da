#include "cpu/rows.h"

#include <algorithm>
#include <cstddef>

namespace splitfuse {
namespace {

RowNorm row_norm(const Norm& norm) {
  return {norm.weight, norm.bias, norm.columns, norm.eps, norm.kind == NormKind::kLayer};
}

/// Columns of logits that a thread takes at a time: of one row there may be as many as of a batch.
constexpr int64_t kLogitsPart = 4096;

}  // namespace

RowKernels make_row_kernels(DType dtype, Isa isa) {
  RowKernels kernels;
  row_kernels_ref(dtype, kernels);
#if defined(__x86_64__)
  if (isa >= Isa::kAvx2) row_kernels_avx2(dtype, kernels);
  if (isa >= Isa::kAvx512) row_kernels_avx512(dtype, kernels);
#elif defined(__aarch64__)
  if (isa >= Isa::kNeon) row_kernels_neon(dtype, kernels);
#else
  (void)isa;
#endif
  return kernels;
}

RowOps::RowOps(DType dtype, Isa isa, ThreadPool& pool)
    : dtype_(dtype), pool_(pool), kernels_(make_row_kernels(dtype, isa)) {}

void RowOps::norm(const Norm& norm, const float* x, int32_t count, std::span<const int32_t> rows, void* out) {
  const RowNorm how = row_norm(norm);
  const int64_t stride = row_stride(norm.columns);
  const int64_t total = rows.empty() ? count : static_cast<int64_t>(rows.size());
  pool_.run_parts(total, [&](int, int64_t first, int64_t past) {
    for (int64_t row = first; row < past; ++row) {
      const int64_t from = rows.empty() ? row : rows[static_cast<size_t>(row)];
      kernels_.norm(how, x + from * stride, static_cast<std::byte*>(out) + row * stride * dtype_size(dtype_));
    }
  });
}

void RowOps::norm_in_place(const Norm& norm, int32_t count, float* x) {
  if (norm.weight == nullptr) return;
  const RowNorm how = row_norm(norm);
  const int64_t stride = row_stride(norm.columns);
  pool_.run_parts(count, [&](int, int64_t first, int64_t past) {
    for (int64_t row = first; row < past; ++row) kernels_.norm_in_place(how, x + row * stride);
  });
}

void RowOps::add(const Norm& norm, const float* y, float scale, int32_t count, float* x) {
  const RowNorm how = row_norm(norm);
  const int64_t stride = row_stride(norm.columns);
  pool_.run_parts(count, [&](int, int64_t first, int64_t past) {
    for (int64_t row = first; row < past; ++row) kernels_.add(how, y + row * stride, scale, x + row * stride);
  });
}

void RowOps::scale_logits(float* logits, int32_t count, int32_t vocab, float scale, float softcap) {
  const int64_t parts = (vocab + kLogitsPart - 1) / kLogitsPart;
  pool_.run_parts(count * parts, [&](int, int64_t first, int64_t past) {
    for (int64_t part = first; part < past; ++part) {
      const int64_t begin = part % parts * kLogitsPart;
      const auto columns = static_cast<int32_t>(std::min(kLogitsPart, vocab - begin));
      kernels_.scale_and_cap(logits + part / parts * row_stride(vocab) + begin, columns, scale, softcap);
    }
  });
}

}  // namespace splitfuse
