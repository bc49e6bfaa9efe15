/// Rows scaled to unit length without overflow or underflow for any finite row, and the logarithm of a length.
#pragma once
#include "device/load_store.cuh"
#include "device/team_row.cuh"

namespace subquad::cuda {

/// significand * 2^exponent: a length that may lie beyond the range of float. The significand is 0 or well within it.
struct Length {
  float significand;
  int exponent;
};

/// x * 2^exponent, rounded once.
__device__ inline float times_power(float x, int exponent) { return ldexpf(x, exponent); }

/// The length of the row whose columns the lanes of a team hold, and the row divided by its power of two, so that
/// row / significand is the unit row. For whole warps.
template <int Team, int Count>
__device__ inline Length measure_columns(float (&x)[Count]) {
  const auto squares = [&] {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < Count; ++i) sum = fmaf(x[i], x[i], sum);
    return team_sum<Team>(sum);
  };
  float square = squares();
  int exponent = 0;
  // Where the squares leave [2^-90, 2^126] some of them may have overflowed, or lost bits that count. All teams of the
  // warp go along, those that need nothing with a power of 1.
  const bool is_inside = square >= 0x1p-90f && square <= 0x1p126f;
  if (__any_sync(kFullMask, !is_inside)) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < Count; ++i) largest = fmaxf(largest, fabsf(x[i]));
    largest = team_max<Team>(largest);
    const bool is_zero = largest == 0 && square == 0;
    if (!is_inside && !is_zero) exponent = int(float_to_bits(largest) >> 23) - 127;
#pragma unroll
    for (int i = 0; i < Count; ++i) x[i] = times_power(x[i], -exponent);
    square = squares();
  }
  return {sqrtf(square), exponent};
}

template <int Count>
__device__ inline Length measure_row(WarpRow<Count>& x) {
  return measure_columns<kWarp>(x.value);
}

/// ln of a length, -inf for 0.
__device__ inline float log_length(Length length) {
  if (length.significand == 0) return bits_to_float(0xff800000u);
  return float(log(double(length.significand)) + length.exponent * 0.69314718055994530942);
}

}  // namespace subquad::cuda
