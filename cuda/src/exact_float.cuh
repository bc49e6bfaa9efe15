/// Float arithmetic that is rounded after every operation: nvcc would otherwise fuse products into sums, and the bits
/// would differ from those of the CPU.
#pragma once
#include "device/language.cuh"

namespace subquad::cuda {

struct ExactFloat {
  float value;

  __device__ explicit ExactFloat(float x) : value(x) {}
};

#if defined(__CUDACC__)
__device__ inline ExactFloat operator*(ExactFloat a, ExactFloat b) { return ExactFloat(__fmul_rn(a.value, b.value)); }
__device__ inline ExactFloat operator+(ExactFloat a, ExactFloat b) { return ExactFloat(__fadd_rn(a.value, b.value)); }
__device__ inline ExactFloat operator/(ExactFloat a, ExactFloat b) { return ExactFloat(__fdiv_rn(a.value, b.value)); }
#else
// The host compiler is told not to fuse.
inline ExactFloat operator*(ExactFloat a, ExactFloat b) { return ExactFloat(a.value * b.value); }
inline ExactFloat operator+(ExactFloat a, ExactFloat b) { return ExactFloat(a.value + b.value); }
inline ExactFloat operator/(ExactFloat a, ExactFloat b) { return ExactFloat(a.value / b.value); }
#endif
__device__ inline ExactFloat operator-(ExactFloat a) { return ExactFloat(-a.value); }
__device__ inline ExactFloat operator-(ExactFloat a, ExactFloat b) { return a + -b; }
__device__ inline ExactFloat operator*(float a, ExactFloat b) { return ExactFloat(a) * b; }
__device__ inline ExactFloat operator+(ExactFloat a, float b) { return a + ExactFloat(b); }
__device__ inline ExactFloat operator-(float a, ExactFloat b) { return ExactFloat(a) + -b; }

}  // namespace subquad::cuda
