/// Rows shared by a team of lanes, eight columns a lane, so that one load of 16 bytes a lane serves several rows at
/// once.
///
/// A warp is 32 / Team teams. A piece is what a lane loads at a time, `Piece` columns; the pieces of a team's lanes
/// follow each other, then come their second pieces.
#pragma once
#include "device/warp.cuh"
#include "subquad/dtype.h"

namespace subquad::cuda {

static constexpr int kLaneColumns = 8;

/// Columns in 16 bytes.
template <class T>
static constexpr int kPieceOf = 16 / int(sizeof(T));

/// The column of element i of this lane.
template <int Team, int Piece>
__device__ inline int column_of(int i) {
  return i / Piece * Team * Piece + lane_id() % Team * Piece + i % Piece;
}

/// A lane's columns as they are stored.
template <class T>
struct StoredColumns {
  uint4 piece[kLaneColumns / kPieceOf<T>];
};

__device__ inline uint32_t stored_bits(float x) { return float_to_bits(x); }
__device__ inline uint32_t stored_bits(half x) { return x.bits; }
__device__ inline uint32_t stored_bits(bfloat16 x) { return x.bits; }

/// 16 bytes of a row from `column` on, one element after the other, zeros from `dim` on.
template <class T>
__device__ inline uint4 gather_piece(const T* row, int column, int dim) {
  constexpr int kWordElements = 4 / int(sizeof(T));
  uint32_t word[4] = {};
#pragma unroll
  for (int i = 0; i < kPieceOf<T>; ++i)
    if (column + i < dim) word[i / kWordElements] |= stored_bits(row[column + i]) << i % kWordElements * 16;
  return {word[0], word[1], word[2], word[3]};
}

/// This lane's columns of a row, zeros from `dim` on. Wide: by 16 bytes at a time, which `dim` and the address must
/// allow.
template <int Team, bool Wide, class T>
__device__ inline StoredColumns<T> load_columns(const T* row, int dim) {
  StoredColumns<T> columns = {};
#pragma unroll
  for (int c = 0; c < kLaneColumns / kPieceOf<T>; ++c) {
    const int column = column_of<Team, kPieceOf<T>>(c * kPieceOf<T>);
    if constexpr (Wide) {
      if (column < dim) columns.piece[c] = __ldg(reinterpret_cast<const uint4*>(row + column));
    } else {
      columns.piece[c] = gather_piece(row, column, dim);
    }
  }
  return columns;
}

__device__ inline void widen_word(uint32_t word, float* x, float) { x[0] = bits_to_float(word); }

template <class T>
__device__ inline void widen_word(uint32_t word, float* x, T) {
  x[0] = to_float(T{uint16_t(word)}), x[1] = to_float(T{uint16_t(word >> 16)});
}

template <class T>
__device__ inline void widen_columns(const StoredColumns<T>& columns, float (&x)[kLaneColumns]) {
  constexpr int kWordElements = 4 / int(sizeof(T));
#pragma unroll
  for (int c = 0; c < kLaneColumns / kPieceOf<T>; ++c) {
    const uint32_t word[4] = {columns.piece[c].x, columns.piece[c].y, columns.piece[c].z, columns.piece[c].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) widen_word(word[i], x + c * kPieceOf<T> + i * kWordElements, T{});
  }
}

/// The same columns as those of rows of another type, whose pieces are `Piece` wide.
template <int Team, int Piece, class T>
__device__ inline void load_like(const T* row, int dim, float (&x)[kLaneColumns]) {
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const int column = column_of<Team, Piece>(i);
    x[i] = column < dim ? to_float(row[column]) : 0.0f;
  }
}

/// Writes this lane's columns below `dim`.
template <int Team, bool Wide, class T>
__device__ inline void store_columns(const float (&x)[kLaneColumns], T* row, int dim) {
  constexpr int kWordElements = 4 / int(sizeof(T));
#pragma unroll
  for (int c = 0; c < kLaneColumns / kPieceOf<T>; ++c) {
    const int column = column_of<Team, kPieceOf<T>>(c * kPieceOf<T>);
    uint32_t word[4] = {};
#pragma unroll
    for (int i = 0; i < kPieceOf<T>; ++i) {
      T stored;
      from_float(x[c * kPieceOf<T> + i], &stored);
      if constexpr (Wide)
        word[i / kWordElements] |= stored_bits(stored) << i % kWordElements * 16;
      else if (column + i < dim)
        row[column + i] = stored;
    }
    if constexpr (Wide)
      if (column < dim) *reinterpret_cast<uint4*>(row + column) = {word[0], word[1], word[2], word[3]};
  }
}

/// The sum over the lanes at the same place of all teams, the same bits in all of them.
template <int Team>
__device__ inline float sum_over_teams(float x) {
#pragma unroll
  for (int step = kWarp / 2; step >= Team; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}

__device__ inline float dot(const float (&a)[kLaneColumns], const float (&b)[kLaneColumns]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}

}  // namespace subquad::cuda
