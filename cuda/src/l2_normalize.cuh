/// Rows scaled to unit length. A team of lanes owns a row, eight columns a lane in two groups of four; a warp is 4
/// teams of 8 lanes for rows of up to 64 columns, else one of 32.
///
/// One read and one write of every element: bound by memory. For 96 heads of 16384 rows of 64 columns, f32 to bf16,
/// that is 0.6 GB, 0.14 ms on an H200 at 4.3 TB/s; about 60 instructions a row are 0.1 ms.
#pragma once
#include "device/arithmetic.cuh"
#include "operand_rows.cuh"
#include "ops/l2_normalize_args.h"
#include "unit_row.cuh"

namespace subquad::cuda {

static constexpr int kNormalizeThreads = 256;

/// The row of a team.
struct NormalizeRow {
  int64_t b, h, n;
  bool exists;
};

template <int Team>
__device__ inline NormalizeRow normalize_row_of_team(const L2NormalizeArgs& args) {
  const int64_t rows = args.batch * args.heads * args.seq;
  const int64_t row = int64_t(blockIdx.x) * (kNormalizeThreads / Team) + threadIdx.x / Team;
  const Quotient token = divide(row, args.seq), head = divide(token.whole, args.heads);
  return {head.whole, head.rest, token.rest, row < rows};
}

/// Columns of this lane of a row, zeros from `dim` on. The type of the array is the same for all threads.
template <int Team, bool Wide, class T>
__device__ inline void load_row_as(const T* row, int dim, float (&x)[kLaneColumns]) {
#pragma unroll
  for (int i = 0; i < kLaneColumns; i += kQuad) {
    const Quad<float> quad = load_quad(row, column_of<Team, kQuad>(i), dim, Wide);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) x[i + j] = quad.value[j];
  }
}

template <int Team, bool Wide>
__device__ inline void load_row_of(const Operand& array, const NormalizeRow& at, int dim, float (&x)[kLaneColumns]) {
  visit_row(array, at.b, at.h, at.n, [&](const auto* row) { load_row_as<Team, Wide>(row, dim, x); });
}

template <int Team, bool Wide>
__device__ inline void store_row_of(const float (&x)[kLaneColumns], const Operand& array, const NormalizeRow& at,
                                    int dim) {
  visit_row(array, at.b, at.h, at.n, [&](auto* row) {
#pragma unroll
    for (int i = 0; i < kLaneColumns; i += kQuad) {
      const Quad<float> quad = {{x[i], x[i + 1], x[i + 2], x[i + 3]}};
      store_quad(quad, row, column_of<Team, kQuad>(i), dim, Wide);
    }
  });
}

// Whole warps stay to the end, because teams of one warp meet in its collectives; teams without a row have zeros.

template <int Team, bool Wide>
__global__ void __launch_bounds__(kNormalizeThreads) l2_normalize_kernel(const __grid_constant__ L2NormalizeArgs args) {
  const NormalizeRow at = normalize_row_of_team<Team>(args);
  const int dim = int(args.dim);
  float row[kLaneColumns] = {};
  if (at.exists) load_row_of<Team, Wide>(args.x, at, dim, row);
  const Length length = measure_columns<Team>(row);
  if (!at.exists) return;
  if (length.significand != 0)
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) row[i] /= length.significand;
  store_row_of<Team, Wide>(row, args.y, at, dim);
  if (args.lse.data && threadIdx.x % Team == 0) *element<float>(args.lse, at.b, at.h, at.n) = log_length(length);
}

/// dx = (dy - y <y, dy>) e^-lse. The exponential is a double: lse may lie beyond the range of float's.
template <int Team, bool Wide>
__global__ void __launch_bounds__(kNormalizeThreads)
    l2_normalize_bwd_kernel(const __grid_constant__ L2NormalizeArgs args) {
  const NormalizeRow at = normalize_row_of_team<Team>(args);
  const int dim = int(args.dim);
  float lse = bits_to_float(0xff800000u);
  if (at.exists) lse = *element<const float>(args.lse, at.b, at.h, at.n);
  float row[kLaneColumns] = {}, unit[kLaneColumns] = {};
  if (lse != bits_to_float(0xff800000u)) {
    load_row_of<Team, Wide>(args.dy, at, dim, row);
    load_row_of<Team, Wide>(args.y, at, dim, unit);
  }
  const float along = -team_sum<Team>(dot(unit, row));
  if (!at.exists) return;
  if (lse != bits_to_float(0xff800000u)) {
    const double inverse = exp(-double(lse));
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) row[i] = float(fmaf(along, unit[i], row[i]) * inverse);
  }
  store_row_of<Team, Wide>(row, args.dx, at, dim);
}

}  // namespace subquad::cuda
