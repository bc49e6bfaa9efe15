/// The 32 lanes of a warp.
#pragma once
#include "device/language.cuh"

namespace subquad::cuda {

static constexpr int kWarp = 32;
static constexpr unsigned kFullMask = 0xffffffffu;

__device__ inline int lane_id() { return int(threadIdx.x) & (kWarp - 1); }
__device__ inline int warp_id() { return int(threadIdx.x) / kWarp; }

/// The sum of x over the lanes of a team, the same bits in all of them. A warp is 32 / Team teams, which all take part.
template <int Team>
__device__ inline float team_sum(float x) {
#pragma unroll
  for (int step = Team / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}

/// The largest x over the lanes of a team.
template <int Team>
__device__ inline float team_max(float x) {
#pragma unroll
  for (int step = Team / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}

}  // namespace subquad::cuda
