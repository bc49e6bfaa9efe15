/// u(x) = 1 - acos(x) / pi, the probability that a random hyperplane leaves two rows of cosine x on one side, and
/// powers of it.
#pragma once
#include "cpu/simd.h"

namespace subquad::cpu::SUBQUAD_ISA {

static constexpr float kInversePi = 0.318309886f;

/// u(x); |x| > 1 by rounding counts as 1, NaN stays NaN. Abramowitz and Stegun 4.4.46: acos(x) = sqrt(1 - x) P(x) on
/// [0, 1], to 2e-8.
static inline F32 collision_probability(F32 x) {
  constexpr float kCoefficients[] = {-0.0012624911f, 0.0066700901f, -0.0170881256f, 0.0308918810f,
                                     -0.0501743046f, 0.0889789874f, -0.2145988016f, 1.5707963050f};
  const F32 magnitude = abs(x);
  F32 p = set(kCoefficients[0] * kInversePi);
  for (int i = 1; i < 8; ++i) p = fma(p, magnitude, set(kCoefficients[i] * kInversePi));
  const F32 angle = sqrt(max(F32{}, 1.0f - magnitude)) * p;
  return x < 0.0f ? angle : 1.0f - angle;
}

/// power = u^n, n >= 0, by squaring from the highest bit of n on. Count independent vectors hide the latency.
template <int Count>
static inline void raise(const F32 (&u)[Count], int n, F32 (&power)[Count]) {
  for (int i = 0; i < Count; ++i) power[i] = n ? u[i] : set(1.0f);
  for (int bit = 30 - __builtin_clz(unsigned(n | 1)); bit >= 0; --bit) {
    for (int i = 0; i < Count; ++i) power[i] *= power[i];
    if (n >> bit & 1)
      for (int i = 0; i < Count; ++i) power[i] *= u[i];
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA
