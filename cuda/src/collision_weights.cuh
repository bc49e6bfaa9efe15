/// Tiles of dot products to weights u^tau and to the coefficients of their gradients, in registers.
#pragma once
#include "collision_probability.cuh"
#include "collision_stream.cuh"

namespace subquad::cuda {

/// Dot products of a warp's rows with a tile to weights u^tau.
template <int Columns>
__device__ inline void to_weights(float (&products)[Columns / 8][4], const float (&row_factor)[2],
                                  const float* column_factor, int hash_bits) {
#pragma unroll
  for (int i = 0; i < Columns / 8; ++i)
#pragma unroll
    for (int c = 0; c < 4; ++c)
      products[i][c] = collision_probability(products[i][c] * column_factor[8 * i + (c & 1)] * row_factor[c >> 1]);
  // Most often a power of two: squares of the whole tile, so that the loop costs nothing. What is left is 1 then.
  while ((hash_bits & 1) == 0) {
    hash_bits /= 2;
#pragma unroll
    for (int i = 0; i < Columns / 8; ++i)
#pragma unroll
      for (int c = 0; c < 4; ++c) products[i][c] *= products[i][c];
  }
  if (hash_bits > 1) {
#pragma unroll
    for (int i = 0; i < Columns / 8; i += 2) {
      float u[8], power[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) u[c] = products[i + c / 4][c % 4];
      raise(u, hash_bits, power);
#pragma unroll
      for (int c = 0; c < 8; ++c) products[i + c / 4][c % 4] = power[c];
    }
  }
}

/// Dot products of units to weights, and those of partners to coefficients c_ij times the factor of the column.
template <int Columns>
__device__ inline void to_coefficients(float (&units)[Columns / 8][4], float (&partners)[Columns / 8][4],
                                       const float (&row_factor)[2], const float* column_factor, int hash_bits,
                                       bool exact) {
  const float scale = exact ? float(hash_bits) * kInversePi : float(hash_bits) * 0.5f;
  constexpr int kGroup = 2;
#pragma unroll
  for (int i = 0; i < Columns / 8; i += kGroup) {
    float u[4 * kGroup], power[4 * kGroup];
#pragma unroll
    for (int c = 0; c < 4 * kGroup; ++c) {
      float& x = units[i + c / 4][c % 4];
      const float factor = column_factor[8 * (i + c / 4) + (c & 1)];
      x = x * factor * row_factor[c % 4 >> 1];
      u[c] = collision_probability(x);
      partners[i + c / 4][c % 4] *= factor * scale;
    }
    raise(u, hash_bits - 1, power);
#pragma unroll
    for (int c = 0; c < 4 * kGroup; ++c) {
      float& x = units[i + c / 4][c % 4];
      const float weight = power[c] * u[c], magnitude = fabsf(x);
      float slope = weight;
      if (exact) {
        const float square = (1.0f - magnitude) * (1.0f + magnitude);
        slope = square < 1e-8f ? 0.0f : power[c] * approximate_reciprocal_sqrt(square);
      }
      partners[i + c / 4][c % 4] *= slope;
      x = weight;
    }
  }
}

/// Zeros where a row does not see a column.
template <int Columns>
__device__ inline void clear_unseen(const SeenTile& seen, float (&weight)[Columns / 8][4]) {
#pragma unroll
  for (int i = 0; i < Columns / 8; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int column = 8 * i + lane_id() % 4 * 2 + (c & 1);
      if (column < seen.lo[c >> 1] || column >= seen.hi[c >> 1]) weight[i][c] = 0;
    }
  }
}

}  // namespace subquad::cuda
