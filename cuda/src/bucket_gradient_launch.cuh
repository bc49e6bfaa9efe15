/// The host part of bucket_gradient that depends on the type of q, k and v: a translation unit for each.
#pragma once
#include "bucket_gradient.cuh"
#include "device/launch.cuh"

namespace subquad::cuda {

const char* launch_pairs_f32(const Queue& queue, const PairProblem& problem);
const char* launch_pairs_f16(const Queue& queue, const PairProblem& problem);
const char* launch_pairs_bf16(const Queue& queue, const PairProblem& problem);

inline dim3 grid_of_warps(int64_t rows) { return dim3(unsigned((rows + kPairWarps - 1) / kPairWarps)); }

template <int Team, class T, class V>
const char* launch_team(const Queue& queue, const PairProblem& p) {
  const auto kernel = p.exact ? pair_gradient_kernel<Team, true, T, V> : pair_gradient_kernel<Team, false, T, V>;
  const dim3 grid = grid_of_warps(p.batch * p.targets.heads * p.targets.seq);
  return launch(queue, kernel, grid, dim3(kPairThreads), 0, p);
}

template <class T, class V>
const char* launch_width(const Queue& queue, const PairProblem& p) {
  const int64_t width = p.dim_unit > p.dim_value ? p.dim_unit : p.dim_value;
  if (width <= 8 * kLaneColumns) return launch_team<8, T, V>(queue, p);
  if (width <= 16 * kLaneColumns) return launch_team<16, T, V>(queue, p);
  return launch_team<32, T, V>(queue, p);
}

/// The candidates' value rows are float or T.
template <class T>
const char* launch_pairs(const Queue& queue, const PairProblem& p) {
  return p.candidates.value.dtype == DType::f32 ? launch_width<T, float>(queue, p) : launch_width<T, T>(queue, p);
}

}  // namespace subquad::cuda
