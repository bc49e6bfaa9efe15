/// Sampled gradients for queries and keys: a warp owns a target, walks its hashes, picks its pairs (pair_sample.cuh)
/// and adds them up in registers. No atomics, and a target's sum depends on nothing but its own pairs in their order.
///
///   sum_n  = sum over pairs: weight <value_n, value_m> unit_m                                 (lower bound)
///   sum_n  = sum over pairs: weight <value_n, value_m> (unit_m - x unit_n) / sqrt(1 - x^2)    (exact)
///   grad_n = (sum_n - unit_n <unit_n, sum_n>) / |row_n|
///
/// A team of 8, 16 or 32 lanes (rows of up to 64, 128, 256 columns) evaluates a pair, a lane has 8 of its columns; so a
/// warp reads a row each of 4, 2 or 1 candidates with one load of 16 bytes a lane (two for f32), and two steps at once.
///
/// Bytes per pair: the two rows of the candidate, (D + E) elements, and about 70 for its place in the order, its scale
/// and its share of offsets and codes. Candidates are at random places, and the rows of a head fit the second-level
/// cache and not the first. So with (num_hashes, hash_bits) = (16, 8), S = 4, D = E = 64, B H = 96, N = 16384, bf16 and
/// dout in f32 there are 201 M pairs of 256 (dq) or 384 (dk) and 70 bytes: 79 GB of that cache, 14 ms at 5.5 TB/s. A
/// step of 4 pairs takes 62 instructions, the picks for 32 pairs about 330: 5.2 G warp instructions, 6 ms if all slots
/// are used. The cache is the limit: 2 or 3 KB in flight for each of 20 or 24 warps are twice what its latency asks
/// for. Shared memory: 1.4 KiB a warp.
#pragma once
#include "device/load_store.cuh"
#include "device/team_row.cuh"
#include "pair_sample.cuh"
#include "unit_row.cuh"

namespace subquad::cuda {

static constexpr int kPairThreads = 128, kPairWarps = kPairThreads / kWarp;

/// A length within [2^-20, 2^20] has no power; the power of another one leaves a length within [2^-22, 2^22].
__device__ inline RowScale scale_of(Length length) {
  if (length.significand == 0) return {0, 0};
  const bool is_far = length.exponent == 0 && !(length.significand >= 0x1p-20f && length.significand <= 0x1p20f);
  const int exponent = is_far ? int(float_to_bits(length.significand) >> 23) - 127 : length.exponent;
  const float rest = is_far ? times_power(length.significand, -exponent) : length.significand;
  return {times_power(1, -exponent), rest};
}

/// A warp measures a row of q or k; rows of masked tokens are not read.
template <int Count, class T>
__global__ void __launch_bounds__(kPairThreads)
    row_scale_kernel(const __grid_constant__ PairSide side, int64_t batch, int dim, RowScale* scales) {
  const SideRow at = side_row_of_warp(side, batch, kPairWarps);
  if (!at.exists || !at.kept) return;
  WarpRow<Count> row = load_row<Count>(element<const T>(side.unit, at.b, at.h, at.n), dim);
  const RowScale scale = scale_of(measure_row(row));
  if (lane_id() == 0) scales[(at.b * side.heads + at.h) * side.seq + at.n] = scale;
}

/// A warp turns a row of dout into floats, for types of dout that no kernel below takes.
template <class T>
__global__ void __launch_bounds__(kPairThreads)
    widen_rows_kernel(const __grid_constant__ PairSide side, int64_t batch, int dim, float* rows) {
  const SideRow at = side_row_of_warp(side, batch, kPairWarps);
  if (!at.exists || !at.kept) return;
  const WarpRow<8> row = load_row<8>(element<const T>(side.value, at.b, at.h, at.n), dim);
  store_row(row, rows + ((at.b * side.heads + at.h) * side.seq + at.n) * dim, dim);
}

/// Below this 1 - x^2 it is taken from the difference of the two rows, which does not cancel.
static constexpr float kNearRows = 0.2f;

/// The columns of the target that a lane holds.
struct TargetColumns {
  float unit[kLaneColumns], value[kLaneColumns], sum[kLaneColumns];  // unit: with the exact rule
};

/// Adds a pair to the target's sum: product * inverse * row, and with the exact rule product (inverse * row - x unit) /
/// sqrt(1 - x^2). Where x is near +-1 it becomes +-1, so that the rows are subtracted from each other: that changes
/// only the part along the target, which finish_target takes out.
template <int Team, bool Exact>
__device__ inline void add_pair(float product, float inverse, float (&row)[kLaneColumns], TargetColumns& target) {
  if constexpr (!Exact) {
    product *= inverse;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) target.sum[i] = fmaf(product, row[i], target.sum[i]);
    return;
  }
  const float x = team_sum<Team>(dot(target.unit, row)) * inverse;
  float root = (1 - x) * (1 + x), along = -x;
  const bool is_near = !(root >= kNearRows);
  if (__any_sync(kFullMask, is_near)) {
    const float sign = x > 0 ? 1.0f : -1.0f;
    float square = 0;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const float difference = row[i] * inverse - sign * target.unit[i];
      square = fmaf(difference, difference, square);
      if (is_near) row[i] = difference;
    }
    const float gap = 0.5f * team_sum<Team>(square), near = gap * (2 - gap);
    if (is_near) root = near, along = 0, inverse = 1;
    if (is_near && near < 1e-8f) root = 1, product = 0;
  }
  product *= rsqrtf(root);
  along *= product, product *= inverse;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i)
    target.sum[i] = fmaf(product, row[i], fmaf(along, target.unit[i], target.sum[i]));
}

/// Adds the pairs on the board to the target's sum: every team takes each (number of teams)-th of them.
template <int Team, bool Exact, bool Wide, class T, class V>
__device__ inline void add_pairs(const PairProblem& p, const PairBoard& board, PairCount pairs, TargetColumns& target) {
  // The rows of so many steps are read before the first is used.
  constexpr int kTeams = kWarp / Team, kSteps = Wide ? 2 : 1;
  for (int first = 0; first < pairs.count; first += kTeams * kSteps) {
    const Pair* pair = board.pairs + first + lane_id() / Team;
    StoredColumns<T> units[kSteps];
    StoredColumns<V> values[kSteps];
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const bool real = pair[u * kTeams].unit != nullptr;
      values[u] = load_columns<Team, Wide>(static_cast<const V*>(pair[u * kTeams].value), real ? p.dim_value : 0);
      units[u] = load_columns<Team, Wide>(static_cast<const T*>(pair[u * kTeams].unit), real ? p.dim_unit : 0);
    }
    float product[kSteps], row[kLaneColumns];
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      widen_columns(values[u], row);
      product[u] = dot(target.value, row);
    }
#pragma unroll
    for (int u = 0; u < kSteps; ++u) product[u] = team_sum<Team>(product[u]);
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      widen_columns(units[u], row);
#pragma unroll
      for (int i = 0; pairs.rescaled && i < kLaneColumns; ++i) row[i] *= pair[u * kTeams].power;
      add_pair<Team, Exact>(product[u] * pair[u * kTeams].weight, pair[u * kTeams].inverse, row, target);
    }
  }
}

/// The pairs of the target with the candidates of one head.
template <int Team, bool Exact, class T, class V>
__device__ inline void add_head(const PairProblem& p, PairBoard& board, TargetColumns& target) {
  const PairHead& at = board.head;
  const PickLane lane = pick_lane(p);
  for (int32_t first = 0; first < p.num_hashes; first += p.hashes_a_time) {
    const int32_t r = first + lane.place;
    const bool has_hash = lane.place < p.hashes_a_time && r < p.num_hashes;
    if constexpr (Exact) find_flipped(p, at, first, board);
    const PairRange own = has_hash ? visible_range(p, at, r, code_of(p, at, r)) : PairRange{0, 0};
    // One step, unless a hash has more picks than a warp has lanes.
    for (int begin = 0; begin < p.picks_a_hash; begin += kWarp) {
      const int t = begin + lane.t;
      Pair pair = {};
      const bool found =
          has_hash && t < p.picks_a_hash && pick_pair<Exact, T, V>(p, at, r, lane.place, t, own, board, pair);
      const PairCount pairs = fill_board(found, pair, board);
      if (p.wide_loads)
        add_pairs<Team, Exact, true, T, V>(p, board, pairs, target);
      else
        add_pairs<Team, Exact, false, T, V>(p, board, pairs, target);
    }
  }
}

/// Of the warp's target; as that of a zero row if it is masked.
__device__ inline RowScale scale_of_row(const PairProblem& p, const SideRow& at) {
  if (!at.kept) return {0, 0};
  return p.targets.scales[(at.b * p.targets.heads + at.h) * p.targets.seq + at.n];
}

/// This lane's columns of the target's unit row, as good as quotients: in one dimension it is 1, and nothing is left of
/// the gradient.
template <int Team, class T>
__device__ inline void load_unit(const PairProblem& p, const SideRow& at, RowScale scale, float (&x)[kLaneColumns]) {
  const T* row = element<const T>(p.targets.unit, at.b, at.h, at.n);
  widen_columns(p.wide_loads ? load_columns<Team, true>(row, p.dim_unit) : load_columns<Team, false>(row, p.dim_unit),
                x);
  const float inverse = 1 / scale.length;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const float scaled = x[i] * scale.power, quotient = scaled * inverse;
    x[i] = fmaf(fmaf(-quotient, scale.length, scaled), inverse, quotient);
  }
}

/// Reads the target's rows. False if it has no gradient: its own row is zero, or it is a query and its dout is.
template <int Team, class T, class V>
__device__ inline bool load_target(const PairProblem& p, const SideRow& at, RowScale scale, TargetColumns& target) {
  if (scale.power == 0) return false;
  const PairSide& side = p.targets;
  const int dim = p.dim_value;
  if (side.value.dtype == DType::f32)
    load_like<Team, kPieceOf<V>>(element<const float>(side.value, at.b, at.h, at.n), dim, target.value);
  else
    load_like<Team, kPieceOf<V>>(element<const T>(side.value, at.b, at.h, at.n), dim, target.value);
  load_unit<Team, T>(p, at, scale, target.unit);
  bool any = false;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) any |= target.value[i] != 0;
  return !p.targets_are_queries || __any_sync(kFullMask, any);
}

/// Adds up the sums of the teams and takes them through the normalisation.
template <int Team, class T>
__device__ inline void finish_target(const PairProblem& p, const SideRow& at, RowScale scale, TargetColumns& target) {
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) target.sum[i] = sum_over_teams<Team>(target.sum[i]);
  float unit[kLaneColumns];
  load_unit<Team, T>(p, at, scale, unit);
  const float along = team_sum<Team>(dot(unit, target.sum)), inverse = 1 / scale.length;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) target.sum[i] = fmaf(-along, unit[i], target.sum[i]) * inverse * scale.power;
}

/// Blocks that share a multiprocessor: as many as leave a lane the registers it needs.
template <bool Exact, class T, class V>
static constexpr int kPairBlocks = (Exact ? 5 : 6) - (sizeof(T) < sizeof(V) ? 1 : 0);

/// T is the type of q, k, v, dq and dk, V that of the candidates' value rows; the targets' are float or T.
template <int Team, bool Exact, class T, class V>
__global__ void __launch_bounds__(kPairThreads, (kPairBlocks<Exact, T, V>))
    pair_gradient_kernel(const __grid_constant__ PairProblem p) {
  __shared__ PairBoard boards[kPairWarps];
  PairBoard& board = boards[warp_id()];
  if (lane_id() == 0) board.row = side_row_of_warp(p.targets, p.batch, kPairWarps);
  __syncwarp();
  const SideRow& at = board.row;
  if (!at.exists) return;
  TargetColumns target = {};
  if (load_target<Team, T, V>(p, at, scale_of_row(p, at), target)) {
    const int64_t members = p.candidates.seq == 0 ? 0 : p.targets_are_queries ? 1 : p.group;
    for (int64_t member = 0; member < members; ++member) {
      put_head<T, V>(p, member, board);
      add_head<Team, Exact, T, V>(p, board, target);
    }
    finish_target<Team, T>(p, at, scale_of_row(p, at), target);
  }
  if (lane_id() >= Team) return;
  T* grad = element<T>(p.targets.grad, at.b, at.h, at.n);
  if (p.wide_loads)
    store_columns<Team, true>(target.sum, grad, p.dim_unit);
  else
    store_columns<Team, false>(target.sum, grad, p.dim_unit);
}

}  // namespace subquad::cuda
