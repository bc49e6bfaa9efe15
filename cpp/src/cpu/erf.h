/// The normal distribution of vectors, by the same steps on every row.
#pragma once
#include "cpu/exp.h"

namespace subquad::cpu::SUBQUAD_ISA {

/// (1 + erf(x / sqrt 2)) / 2, within 1e-7; to the left of 0 also within 3e-5 of the value itself down to x = -5.
template <int Count>
static inline void normal_cdf(F32 (&x)[Count]) {
  F32 y[Count], q[Count];
  const auto for_each = [](auto&& step) {
    for (int i = 0; i < Count; ++i) step(i);
  };
  for_each([&](int i) { y[i] = abs(x[i]); });
  // ln(2 cdf(-y)) / y, minimax weighted by cdf(-y)^0.6 over [0, 8]; beyond, the tail only falls faster.
  for_each([&](int i) { q[i] = fma(set(-2.72542557e-08f), y[i], set(7.47504146e-07f)); });
  for_each([&](int i) { q[i] = fma(q[i], y[i], set(-8.89456805e-06f)); });
  for_each([&](int i) { q[i] = fma(q[i], y[i], set(5.87241884e-05f)); });
  for_each([&](int i) { q[i] = fma(q[i], y[i], set(-0.000208033991f)); });
  for_each([&](int i) { q[i] = fma(q[i], y[i], set(1.94732474e-05f)); });
  for_each([&](int i) { q[i] = fma(q[i], y[i], set(0.00480157183f)); });
  for_each([&](int i) { q[i] = fma(q[i], y[i], set(-0.0363457948f)); });
  for_each([&](int i) { q[i] = fma(q[i], y[i], set(-0.318307489f)); });
  for_each([&](int i) { q[i] = fma(q[i], y[i], set(-0.797884762f)); });
  for_each([&](int i) { q[i] = q[i] * y[i]; });
  exp_shifted(q, set(1.0f));
  for_each([&](int i) { x[i] = select(x[i] > F32{}, set(1.0f) - q[i], q[i]); });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
