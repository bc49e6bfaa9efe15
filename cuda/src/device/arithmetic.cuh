/// Arithmetic that the language's own operators and functions would make longer sequences of.
#pragma once
#include "device/language.cuh"

namespace subquad::cuda {

/// a / b rounded up, of numbers that are not negative.
__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Quotient {
  int64_t whole, rest;
};

/// a / b of numbers that are not negative. A division of 64 bits takes several times as long as one of 32.
__device__ inline Quotient divide(int64_t a, int64_t b) {
  if (uint64_t(a | b) >> 32) return {a / b, a % b};
  const uint32_t whole = uint32_t(a) / uint32_t(b);
  return {whole, uint32_t(a) - whole * uint32_t(b)};
}

/// x limited to [0, 1]; NaN gives 0.
__device__ inline float saturate(float x) {
#if defined(__CUDACC__)
  return __saturatef(x);
#else
  return x > 0 ? fminf(x, 1.0f) : 0.0f;
#endif
}

/// The square root to 2^-22; subnormals count as 0.
__device__ inline float approximate_sqrt(float x) {
#if defined(__CUDACC__)
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return sqrtf(x);
#endif
}

/// 1 / sqrt(x) to 2^-22; subnormals count as 0.
__device__ inline float approximate_reciprocal_sqrt(float x) {
#if defined(__CUDACC__)
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return rsqrtf(x);
#endif
}

}  // namespace subquad::cuda
