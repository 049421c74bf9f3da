#include "cpu/rows.h"

#include <cstddef>

#include "backend/backend.h"

namespace splitfuse {

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

void RowOps::rms_norm(const float* x, const float* weight, float eps, int32_t columns, int32_t count,
                      std::span<const int32_t> rows, void* out) {
  const int64_t stride = row_stride(columns);
  const int64_t total = rows.empty() ? count : static_cast<int64_t>(rows.size());
  pool_.run_parts(total, [&](int, int64_t first, int64_t past) {
    for (int64_t row = first; row < past; ++row) {
      const int64_t from = rows.empty() ? row : rows[static_cast<size_t>(row)];
      kernels_.rms_norm(x + from * stride, weight, eps, columns,
                        static_cast<std::byte*>(out) + row * stride * dtype_size(dtype_));
    }
  });
}

}  // namespace splitfuse
