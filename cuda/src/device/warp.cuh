/// The 32 lanes of a warp.
#pragma once
#include "device/language.cuh"

namespace subquad::cuda {

static constexpr int kWarp = 32;
static constexpr unsigned kFullMask = 0xffffffffu;

__device__ inline int lane_id() { return int(threadIdx.x) & (kWarp - 1); }
__device__ inline int warp_id() { return int(threadIdx.x) / kWarp; }

/// The sum of x over the lanes, the same bits in all of them.
__device__ inline float warp_sum(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}

}  // namespace subquad::cuda
