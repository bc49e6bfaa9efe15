/// Rows of floats scaled to unit length, without overflow or underflow for any finite row; logarithm and exponential of
/// a length.
#pragma once
#include "cpu/simd.h"

namespace subquad::cpu::SUBQUAD_ISA {

/// Rows are held padded with zeros to a multiple of 16 floats, one cache line, so that no loop has a tail.
static inline int64_t padded(int64_t dim) { return (dim + 15) & ~int64_t(15); }

/// dst[0..padded(dim)) = src[0..dim) as float, then zeros.
template <class T>
static inline void widen_padded(const T* src, float* dst, int64_t dim) {
  widen(src, dst, dim);
  for (int64_t i = dim; i < padded(dim); ++i) dst[i] = 0;
}

static inline float dot(const float* a, const float* b, int64_t size) {
  constexpr int kSums = 16 / kLanes;
  F32 sum[kSums] = {};
  for (int64_t i = 0; i < size; i += 16)
    for (int j = 0; j < kSums; ++j) sum[j] = fma(load(a + i + j * kLanes), load(b + i + j * kLanes), sum[j]);
  for (int j = 1; j < kSums; ++j) sum[0] += sum[j];
  return reduce_add(sum[0]);
}

/// sum += row; as the rows, `size` is in whole vectors.
static inline void add_row(const float* row, float* sum, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) store(sum + i, load(sum + i) + load(row + i));
}

static inline void scale_row(float* row, int64_t size, float factor) {
  for (int64_t i = 0; i < size; i += kLanes) store(row + i, load(row + i) * set(factor));
}

static inline void divide_row(float* row, int64_t size, float divisor) {
  for (int64_t i = 0; i < size; i += kLanes) store(row + i, load(row + i) / set(divisor));
}

/// row *= 2^exponent, in steps that are floats themselves.
static inline void scale_row_by_power(float* row, int64_t size, int exponent) {
  while (exponent != 0) {
    const int step = exponent < -126 ? -126 : exponent > 127 ? 127 : exponent;
    scale_row(row, size, bits_to_float(uint32_t(step + 127) << 23));
    exponent -= step;
  }
}

/// significand * 2^exponent: a length that may lie beyond the range of float. The significand is 0 or well within it.
struct Length {
  float significand;
  int exponent;
};

/// Scales the row to unit length and returns the length it had; a zero row stays zero.
static inline Length normalize_row(float* row, int64_t size) {
  float square = dot(row, row, size);
  int exponent = 0;
  // Where the squares leave [2^-90, 2^126] some of them may have overflowed, or lost bits that count.
  if (!(square >= 0x1p-90f && square <= 0x1p126f)) {
    F32 largest = {};
    for (int64_t i = 0; i < size; i += kLanes) largest = max(abs(load(row + i)), largest);
    const float magnitude = reduce_max(largest);
    if (magnitude == 0 && square == 0) return {0, 0};
    exponent = int(float_to_bits(magnitude) >> 23) - 127;
    scale_row_by_power(row, size, -exponent);
    square = dot(row, row, size);
  }
  const float significand = sqrt(square);
  divide_row(row, size, significand);
  return {significand, exponent};
}

static constexpr double kLn2 = 0.69314718055994530942;

/// ln of a length, correct to one rounding; -inf for 0.
static inline float log_length(Length length) {
  const float x = length.significand;
  if (x == 0) return bits_to_float(0xff800000u);
  if (!(x < 0x1p127f)) return x;  // infinity or NaN
  const uint32_t bits = float_to_bits(x);
  int exponent = int(bits >> 23) - 127;
  double m = bits_to_float((bits & 0x7fffffu) | 0x3f800000u);
  if (m > 1.41421356) m *= 0.5, ++exponent;
  // ln m = 2 artanh s; |s| < 0.172, so the first term left out is below 1e-9.
  const double s = (m - 1) / (m + 1), t = s * s;
  const double series = 2 * s * (1 + t * (1.0 / 3 + t * (1.0 / 5 + t * (1.0 / 7 + t * (1.0 / 9)))));
  return float((exponent + length.exponent) * kLn2 + series);
}

/// e^x, correct to one rounding of the significand.
static inline Length exp_length(float x) {
  if (x != x) return {x, 0};
  const double limited = x < -200 ? -200 : x > 200 ? 200 : x;
  const double scaled = limited * (1 / kLn2);
  const int exponent = int(scaled + (scaled < 0 ? -0.5 : 0.5));
  // |r| <= ln 2 / 2, so the first term left out is below 1e-9.
  const double r = limited - exponent * kLn2;
  double series = 1;
  for (int i = 8; i > 0; --i) series = 1 + series * r * (1.0 / i);
  return {float(series), exponent};
}

}  // namespace subquad::cpu::SUBQUAD_ISA
