/// From the sums of collision_attention.cuh to gradients of raw rows: what lies along the row is taken out, for scaling
/// a row does not change its cosines, and the rest divided by its length.
///
///   dx = (sum - unit <unit, sum>) / |x|
///
/// A warp owns a row. Bound by memory.
#pragma once
#include "split_rows.cuh"

namespace subquad::cuda {

struct CollisionGradient {
  Operand x, mask, dx;
  const float* sum;  // [batch, heads, seq, width]
  int64_t batch, heads, seq, dim, width;
};

template <int Count, class X>
__global__ void __launch_bounds__(kSplitThreads)
    collision_gradient_kernel(const __grid_constant__ CollisionGradient g) {
  const int64_t row = int64_t(blockIdx.x) * (kSplitThreads / kWarp) + warp_id();
  if (row >= g.batch * g.heads * g.seq) return;
  const int64_t n = row % g.seq, h = row / g.seq % g.heads, b = row / g.seq / g.heads;
  WarpRow<Count> x = {}, gradient = {};
  if (is_kept(g.mask, b, n)) x = load_row<Count>(element<const X>(g.x, b, h, n), g.dim);
  const Length length = measure_row(x);
  if (length.significand != 0) {
    gradient = load_row<Count>(g.sum + row * g.width, g.dim);
#pragma unroll
    for (int i = 0; i < Count; ++i) x.value[i] /= length.significand;
    const float along = -dot(x, gradient);
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      const float across = fmaf(along, x.value[i], gradient.value[i]);
      gradient.value[i] = times_power(across / length.significand, -length.exponent);
    }
  }
  store_row(gradient, element<X>(g.dx, b, h, n), g.dim);
}

}  // namespace subquad::cuda
