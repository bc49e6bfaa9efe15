/// Sines and cosines of vectors; the same steps on every row.
#pragma once
#include "cpu/exp.h"

namespace subquad::cpu::SUBQUAD_ISA {

struct SinCos {
  F32 sin, cos;
};

/// Within 1e-7 of the true values for |x| <= 1e4. From there on the error grows with |x|; from 2^20 on the results are
/// those of 0. NaN for infinity and NaN.
static inline SinCos sin_cos(F32 angle) {
  const F32 x = select(abs(angle) < set(0x1p20f), angle, angle - angle);
  // x = k pi / 2 + r. The first two parts of pi / 2 have 11 bits or fewer: their products with |k| < 2^13 are exact.
  const F32 k = round_to_integer(x * set(0.636619772f));
  const F32 r = fma(k, set(-0x1.4442d2p-24f), fma(k, set(-0x1.fb4p-12f), fma(k, set(-1.5703125f), x)));
  const F32 square = r * r;
  // Minimax on |r| <= pi / 4, absolute errors of 3e-9 and 1e-9.
  F32 s = set(-1.95172979e-4f), c = set(2.44384501e-5f);
  s = fma(s, square, set(8.33217800e-3f)), c = fma(c, square, set(-1.38873677e-3f));
  s = fma(s, square, set(-0.166666552f)), c = fma(c, square, set(4.16666456e-2f));
  const F32 sine = fma(s * square, r, r);
  const F32 cosine = fma(c * square, square, fma(set(-0.5f), square, set(1.0f)));
  const U32 quadrant = (U32) __builtin_convertvector(k, I32);
  const I32 swapped = (quadrant & 1u) != 0u;
  const U32 negative_sin = (quadrant & 2u) << 30, negative_cos = ((quadrant + 1u) & 2u) << 30;
  return {as_f32(as_u32(select(swapped, cosine, sine)) ^ negative_sin),
          as_f32(as_u32(select(swapped, sine, cosine)) ^ negative_cos)};
}

}  // namespace subquad::cpu::SUBQUAD_ISA
