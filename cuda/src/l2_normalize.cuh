/// Rows scaled to unit length. A team of lanes owns a row, eight columns a lane in two groups of four; a warp is 4 teams
/// of 8 lanes for rows of up to 64 columns, else one of 32.
///
/// One read and one write of every element: bound by memory. For 96 heads of 16384 rows of 64 columns, f32 to bf16, that
/// is 0.6 GB, 0.14 ms on an H200 at 4.3 TB/s; about 60 instructions a row are 0.1 ms.
#pragma once
#include "device/team_row.cuh"
#include "ops/l2_normalize_args.h"
#include "unit_row.cuh"

namespace subquad::cuda {

static constexpr int kNormalizeThreads = 256;
static constexpr int kQuad = 4, kQuads = kLaneColumns / kQuad;

/// The row of a team.
struct NormalizeRow {
  int64_t b, h, n;
  bool exists;
  __device__ int64_t in(const Operand& x) const { return b * x.stride[0] + h * x.stride[1] + n * x.stride[2]; }
};

template <int Team>
__device__ inline NormalizeRow normalize_row_of_team(const L2NormalizeArgs& args) {
  const int64_t rows = args.batch * args.heads * args.seq;
  const int64_t row = int64_t(blockIdx.x) * (kNormalizeThreads / Team) + threadIdx.x / Team;
  // Dividing 64-bit numbers takes longer than all the rest.
  if (rows <= int64_t(UINT32_MAX)) {
    const uint32_t r = uint32_t(row), seq = uint32_t(args.seq), heads = uint32_t(args.heads);
    return {r / seq / heads, r / seq % heads, r % seq, row < rows};
  }
  return {row / args.seq / args.heads, row / args.seq % args.heads, row % args.seq, row < rows};
}

template <int Team>
__device__ inline int first_column(int quad) {
  return (quad * Team + int(threadIdx.x) % Team) * kQuad;
}

/// Four elements, read or written at once.
template <class T>
struct alignas(kQuad * sizeof(T)) Quad {
  T value[kQuad];
};

/// Columns of this lane of the row at `row`, zeros from `dim` on. Wide: by fours, which address and `dim` must allow.
template <int Team, bool Wide, class T>
__device__ inline void load_quads(const T* row, int dim, float (&x)[kLaneColumns]) {
#pragma unroll
  for (int p = 0; p < kQuads; ++p) {
    const int column = first_column<Team>(p);
    Quad<T> quad = {};
    if constexpr (Wide) {
      if (column < dim) quad = *reinterpret_cast<const Quad<T>*>(row + column);
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i)
        if (column + i < dim) quad.value[i] = row[column + i];
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) x[p * kQuad + i] = to_float(quad.value[i]);
  }
}

template <int Team, bool Wide, class T>
__device__ inline void store_quads(const float (&x)[kLaneColumns], T* row, int dim) {
#pragma unroll
  for (int p = 0; p < kQuads; ++p) {
    const int column = first_column<Team>(p);
    Quad<T> quad;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) from_float(x[p * kQuad + i], &quad.value[i]);
    if constexpr (Wide) {
      if (column < dim) *reinterpret_cast<Quad<T>*>(row + column) = quad;
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i)
        if (column + i < dim) row[column + i] = quad.value[i];
    }
  }
}

/// The same for an array whose type is known when the kernel runs; the branch is the same for all threads.
template <int Team, bool Wide>
__device__ inline void load_quads(const Operand& array, int64_t at, int dim, float (&x)[kLaneColumns]) {
  if (array.dtype == DType::f32) load_quads<Team, Wide>(static_cast<const float*>(array.data) + at, dim, x);
  if (array.dtype == DType::f16) load_quads<Team, Wide>(static_cast<const half*>(array.data) + at, dim, x);
  if (array.dtype == DType::bf16) load_quads<Team, Wide>(static_cast<const bfloat16*>(array.data) + at, dim, x);
}

template <int Team, bool Wide>
__device__ inline void store_quads(const float (&x)[kLaneColumns], const Operand& array, int64_t at, int dim) {
  if (array.dtype == DType::f32) store_quads<Team, Wide>(x, static_cast<float*>(array.data) + at, dim);
  if (array.dtype == DType::f16) store_quads<Team, Wide>(x, static_cast<half*>(array.data) + at, dim);
  if (array.dtype == DType::bf16) store_quads<Team, Wide>(x, static_cast<bfloat16*>(array.data) + at, dim);
}

// Whole warps stay to the end, because teams of one warp meet in its collectives; teams without a row have zeros.

template <int Team, bool Wide>
__global__ void __launch_bounds__(kNormalizeThreads) l2_normalize_kernel(const __grid_constant__ L2NormalizeArgs args) {
  const NormalizeRow at = normalize_row_of_team<Team>(args);
  const int dim = int(args.dim);
  float row[kLaneColumns] = {};
  if (at.exists) load_quads<Team, Wide>(args.x, at.in(args.x), dim, row);
  const Length length = measure_columns<Team>(row);
  if (!at.exists) return;
  if (length.significand != 0)
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) row[i] /= length.significand;
  store_quads<Team, Wide>(row, args.y, at.in(args.y), dim);
  if (args.lse.data && threadIdx.x % Team == 0)
    static_cast<float*>(args.lse.data)[at.in(args.lse)] = log_length(length);
}

/// dx = (dy - y <y, dy>) e^-lse. The exponential is a double: lse may lie beyond the range of float's.
template <int Team, bool Wide>
__global__ void __launch_bounds__(kNormalizeThreads)
    l2_normalize_bwd_kernel(const __grid_constant__ L2NormalizeArgs args) {
  const NormalizeRow at = normalize_row_of_team<Team>(args);
  const int dim = int(args.dim);
  float lse = bits_to_float(0xff800000u);
  if (at.exists) lse = static_cast<const float*>(args.lse.data)[at.in(args.lse)];
  float row[kLaneColumns] = {}, unit[kLaneColumns] = {};
  if (lse != bits_to_float(0xff800000u)) {
    load_quads<Team, Wide>(args.dy, at.in(args.dy), dim, row);
    load_quads<Team, Wide>(args.y, at.in(args.y), dim, unit);
  }
  const float along = -team_sum<Team>(dot(unit, row));
  if (!at.exists) return;
  if (lse != bits_to_float(0xff800000u)) {
    const double inverse = exp(-double(lse));
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) row[i] = float(fmaf(along, unit[i], row[i]) * inverse);
  }
  store_quads<Team, Wide>(row, args.dx, at.in(args.dx), dim);
}

}  // namespace subquad::cuda
