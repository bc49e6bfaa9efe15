/// Tensor-core products of 16-bit operands with f32 sums, in the layouts of PTX's mma.sync.m16n8k16 and ldmatrix.
#pragma once
#include "device/language.cuh"
#include "subquad/dtype.h"
#if !defined(__CUDACC__)
#include "emulator/mma.h"
#endif

namespace subquad::cuda {

/// Two numbers rounded to T, the first in the lower half.
__device__ inline uint32_t pack(float low, float high, bfloat16) {
#if defined(__CUDACC__)
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  return ::emulator::pack_as<bfloat16>(low, high);
#endif
}

__device__ inline uint32_t pack(float low, float high, half) {
#if defined(__CUDACC__)
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  return ::emulator::pack_as<half>(low, high);
#endif
}

/// d += a b for a warp: a [16, 16], b [16, 8], d [16, 8]. With g = lane / 4, t = lane % 4:
/// a[i] = A[g + 8 (i & 1)][2 t + 8 (i >> 1) + {0, 1}], b[i] = B[2 t + 8 i + {0, 1}][g],
/// d[i] = D[g + 8 (i >> 1)][2 t + (i & 1)].
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  ::emulator::mma<bfloat16>(d, a, b);
#endif
}

__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half) {
#if defined(__CUDACC__)
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  ::emulator::mma<half>(d, a, b);
#endif
}

/// Four 8 x 8 matrices of 16-bit elements from shared memory; lane 8 j + r names the 16-byte aligned row r of matrix j.
/// Lane l gets of each matrix the elements [l / 4][2 (l % 4) + {0, 1}], or transposed the elements
/// [2 (l % 4) + {0, 1}][l / 4].
template <bool Transposed>
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#else
  ::emulator::ldmatrix_x4(r, row, Transposed);
#endif
}

}  // namespace subquad::cuda
