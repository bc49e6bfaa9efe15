/// u(x) = 1 - acos(x) / pi, the probability that a random hyperplane leaves two rows of cosine x on one side, and
/// powers of it.
#pragma once
#include "device/arithmetic.cuh"

namespace subquad::cuda {

static constexpr float kInversePi = 0.318309886f;

/// u(x); |x| > 1 by rounding counts as 1, NaN stays NaN. Abramowitz and Stegun 4.4.46: acos(x) = sqrt(1 - x) P(x) on
/// [0, 1], to 2e-8. 13 instructions.
__device__ inline float collision_probability(float x) {
  constexpr float kCoefficients[] = {-0.0012624911f, 0.0066700901f, -0.0170881256f, 0.0308918810f,
                                     -0.0501743046f, 0.0889789874f, -0.2145988016f, 1.5707963050f};
  const float magnitude = fabsf(x);
  float p = kCoefficients[0] * kInversePi;
#pragma unroll
  for (int i = 1; i < 8; ++i) p = fmaf(p, magnitude, kCoefficients[i] * kInversePi);
  const float angle = approximate_sqrt(saturate(1.0f - magnitude)) * p;
  return x < 0.0f ? angle : 1.0f - angle;
}

/// power = u^n, n >= 0, by squaring from the highest bit of n on; n is the same in the whole warp.
template <int Count>
__device__ inline void raise(const float (&u)[Count], int n, float (&power)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) power[i] = n ? u[i] : 1.0f;
  for (int bit = 30 - __clz(n | 1); bit >= 0; --bit) {
#pragma unroll
    for (int i = 0; i < Count; ++i) power[i] *= power[i];
    if (n >> bit & 1)
#pragma unroll
      for (int i = 0; i < Count; ++i) power[i] *= u[i];
  }
}

}  // namespace subquad::cuda
