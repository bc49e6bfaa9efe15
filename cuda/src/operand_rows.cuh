/// Rows and masks of arrays whose element type is known at run time.
#pragma once
#include "core/operand.h"
#include "device/load_store.cuh"

namespace subquad::cuda {

/// False for a masked token. Without a mask all are kept.
__device__ inline bool is_kept(const Operand& mask, int64_t b, int64_t token) {
  return !mask.data || static_cast<const uint8_t*>(mask.data)[b * mask.stride[0] + token];
}

/// Calls f(x[b, h, n]) with a pointer to elements of the type of x: float, half or bfloat16.
template <class F>
__device__ inline void visit_row(const Operand& x, int64_t b, int64_t h, int64_t n, F&& f) {
  if (x.dtype == DType::f32) f(element<float>(x, b, h, n));
  if (x.dtype == DType::f16) f(element<half>(x, b, h, n));
  if (x.dtype == DType::bf16) f(element<bfloat16>(x, b, h, n));
}

/// Whether all rows x[b, h, n] begin at multiples of `bytes`, a power of two.
inline bool has_aligned_rows(const Operand& x, int64_t bytes) {
  const int64_t steps = (x.stride[0] | x.stride[1] | x.stride[2]) * dtype_bytes(x.dtype);
  return ((uint64_t(steps) | reinterpret_cast<uintptr_t>(x.data)) & uint64_t(bytes - 1)) == 0;
}

/// Whether rows of `dim` elements can be read or written four elements at a time.
inline bool allows_quads(const Operand& x, int64_t dim) {
  return dim % kQuad == 0 && has_aligned_rows(x, kQuad * dtype_bytes(x.dtype));
}

}  // namespace subquad::cuda
