/// Exponentials and logarithms of vectors, within one unit in the last place of the true value plus the rounding of the
/// argument; the same steps on every row.
#pragma once
#include "cpu/simd.h"

namespace subquad::cpu::SUBQUAD_ISA {

static constexpr float kLog2E = 1.44269504f;
// ln 2 in two parts: the first has few enough bits that its product with an exponent is exact.
static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
static constexpr float kInfinity = __builtin_inff();

/// Nearest integer, ties to even, of |x| < 2^22.
static inline F32 round_to_integer(F32 x) {
#if defined(__AVX512F__)
  return (F32)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (F32)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  return (F32)vrndnq_f32((float32x4_t)x);
#else
  const F32 magic = set(0x1.8p23f);
  return (x + magic) - magic;
#endif
}

/// x 2^n for integral n: one rounding if the result is subnormal (zero on rows without a scaling instruction,
/// from 2^-126 down), infinity if it overflows.
static inline F32 scale_by_power(F32 x, F32 n) {
#if defined(__AVX512F__)
  return (F32)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  const F32 limited = min(max(n, set(-252.0f)), set(252.0f));
  const I32 whole = __builtin_convertvector(limited, I32), half = whole >> 1;
  const F32 first = as_f32((half + 127) << 23), second = as_f32((whole - half + 127) << 23);
  return x * first * second;
#endif
}

/// e^x 2^-n with integral n, |n| <= 30000; x counts as at most 20000 in magnitude. A shift n that grows by one halves
/// the result exactly, which lets a running maximum grow without changing a bit of what was summed before it. e^-inf =
/// 0; NaN stays NaN. Step by step for `Count` vectors at once, which keeps the pipelines full.
template <int Count>
static inline void exp_shifted(F32 (&x)[Count], F32 n) {
  F32 k[Count], r[Count], p[Count];
  const auto for_each = [](auto&& step) {
    for (int i = 0; i < Count; ++i) step(i);
  };
  // The product of an exponent below 2^15 with kLn2High is exact; min and max keep a NaN.
  for_each([&](int i) { x[i] = min(set(20000.0f), max(set(-20000.0f), x[i])); });
  for_each([&](int i) { k[i] = round_to_integer(x[i] * set(kLog2E)); });
  for_each([&](int i) { r[i] = fma(k[i], set(-kLn2High), x[i]); });
  for_each([&](int i) { r[i] = fma(k[i], set(-kLn2Low), r[i]); });
  // Minimax on |r| <= ln 2 / 2, relative error 2e-9.
  for_each([&](int i) { p[i] = fma(set(0.0013843607f), r[i], set(0.0083741955f)); });
  for_each([&](int i) { p[i] = fma(p[i], r[i], set(0.041668005f)); });
  for_each([&](int i) { p[i] = fma(p[i], r[i], set(0.16666430f)); });
  for_each([&](int i) { p[i] = fma(p[i], r[i], set(0.49999994f)); });
  for_each([&](int i) { p[i] = fma(p[i], r[i], set(1.0f)); });
  for_each([&](int i) { p[i] = fma(p[i], r[i], set(1.0f)); });
  for_each([&](int i) { x[i] = scale_by_power(p[i], k[i] - n); });
}

static inline F32 exp_shifted(F32 x, F32 n) {
  F32 y[1] = {x};
  exp_shifted(y, n);
  return y[0];
}

static inline F32 exp(F32 x) { return exp_shifted(x, F32{}); }
static inline float exp(float x) { return exp(set(x))[0]; }

/// ln x; -inf for 0, NaN below it, infinity for infinity; subnormal numbers count as 0.
static inline F32 log(F32 x) {
  const U32 bits = as_u32(x) - 0x3f3504f3u;  // of sqrt(1/2): the significand is taken from [sqrt(1/2), sqrt(2))
  const F32 e = __builtin_convertvector((I32)bits >> 23, F32);
  const F32 f = as_f32((bits & 0x007fffffu) + 0x3f3504f3u) - set(1.0f);
  F32 p = set(-0.0763442963f);
  p = fma(p, f, set(0.127615497f));
  p = fma(p, f, set(-0.131601945f));
  p = fma(p, f, set(0.142017618f));
  p = fma(p, f, set(-0.166233569f));
  p = fma(p, f, set(0.200012267f));
  p = fma(p, f, set(-0.250008225f));
  p = fma(p, f, set(0.333333313f));
  const F32 square = f * f;
  const F32 small = fma(square * f, p, fma(e, set(kLn2Low), set(-0.5f) * square));
  const F32 finite = fma(e, set(kLn2High), small + f);
  const F32 tiny = select(x < set(0.0f), set(__builtin_nanf("")), set(-kInfinity));
  const F32 at_ends = select(x < set(0x1p-126f), tiny, finite);
  return select(x < set(kInfinity), at_ends, x);
}
static inline float log(float x) { return log(set(x))[0]; }

}  // namespace subquad::cpu::SUBQUAD_ISA
