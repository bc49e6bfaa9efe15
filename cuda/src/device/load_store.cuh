/// Elements of any storage type as floats: fours of neighbours, and rows spread over the lanes of a warp.
#pragma once
#include "device/warp.cuh"
#include "subquad/dtype.h"

namespace subquad::cuda {

static constexpr int kQuad = 4;

/// Four neighbours, read or written at once.
template <class T>
struct alignas(kQuad * sizeof(T)) Quad {
  T value[kQuad];
};

/// Columns [column, column + 4) of a row as floats, zeros from `dim` on. `wide`: at once, which `dim` and the address
/// must allow.
template <class T>
__device__ inline Quad<float> load_quad(const T* row, int column, int dim, bool wide) {
  Quad<T> stored = {};
  if (wide) {
    if (column < dim) stored = *reinterpret_cast<const Quad<T>*>(row + column);
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i)
      if (column + i < dim) stored.value[i] = row[column + i];
  }
  Quad<float> x;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) x.value[i] = to_float(stored.value[i]);
  return x;
}

/// Writes those of the columns that are below `dim`.
template <class T>
__device__ inline void store_quad(const Quad<float>& x, T* row, int column, int dim, bool wide) {
  Quad<T> stored;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) from_float(x.value[i], &stored.value[i]);
  if (wide) {
    if (column < dim) *reinterpret_cast<Quad<T>*>(row + column) = stored;
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i)
      if (column + i < dim) row[column + i] = stored.value[i];
  }
}

/// A row of up to 32 * Count floats: element lane + 32 i of the row is value i; zeros behind the last.
template <int Count>
struct WarpRow {
  float value[Count];
};

template <int Count, class T>
__device__ inline WarpRow<Count> load_row(const T* row, int64_t dim) {
  WarpRow<Count> x;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    const int d = lane_id() + kWarp * i;
    x.value[i] = d < dim ? to_float(row[d]) : 0.0f;
  }
  return x;
}

template <int Count, class T>
__device__ inline void store_row(const WarpRow<Count>& x, T* row, int64_t dim) {
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    const int d = lane_id() + kWarp * i;
    if (d < dim) from_float(x.value[i], row + d);
  }
}

/// The same bits in all lanes.
template <int Count>
__device__ inline float dot(const WarpRow<Count>& a, const WarpRow<Count>& b) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Count; ++i) sum = fmaf(a.value[i], b.value[i], sum);
  return team_sum<kWarp>(sum);
}

}  // namespace subquad::cuda
