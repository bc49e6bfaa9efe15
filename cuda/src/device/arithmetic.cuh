/// Single instructions of f32 arithmetic that the language's own functions would wrap in longer sequences.
#pragma once
#include "device/language.cuh"

namespace subquad::cuda {

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
