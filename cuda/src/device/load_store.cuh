/// Elements of any storage type as floats, and rows spread over the lanes of a warp.
#pragma once
#include "device/warp.cuh"
#include "subquad/dtype.h"

namespace subquad::cuda {

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
  return warp_sum(sum);
}

}  // namespace subquad::cuda
