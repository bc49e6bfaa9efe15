/// Short sequences: every pair of a target and a source is compared, without scratch memory.
///
///   out[t] = scale * sum_s count(t, s) rows[s],   count(t, s) = hashes by which the codes are equal
///
/// A warp owns 4 targets and walks the sources 64 at a time, two per lane: all counts of a tile are found first, then
/// the rows whose count is not 0 (a ballot finds them) are added in ascending order, lanes as columns. The codes of a
/// tile go through shared memory, rows are read where they are: a head's rows fit the L1 cache. Where there are few
/// targets, 2, 4 or 8 warps share them, each with its own 64 sources of a tile, and their sums are added in order.
///
/// 2.4 instructions of a warp compare a target with 32 sources by one hash, about 15 add one row: for 96 heads of 512
/// tokens and 32 hashes of 8 bits, an eighth of whose pairs meet, instruction issue takes 0.13 ms on an H200.
/// 12 KiB of shared memory a block.
#pragma once
#include "bucket_codes.cuh"

namespace subquad::cuda {

static constexpr int kPairThreads = 256, kPairWarps = kPairThreads / kWarp;
static constexpr int kPairTargets = 4;  // of a warp
static constexpr int kPairSources = 2;  // of a lane
static constexpr int kPairTile = kPairSources * kWarp;
static constexpr int kPairHashes = 32;                // compared between two barriers if no warps share their targets
static constexpr int kNoSource = -1, kNoTarget = -2;  // codes that equal no other

/// `sharing` warps (1, 2, 4 or 8) have the same targets.
struct PairsArgs {
  BucketProblem problem;
  int64_t tiles;  // of the targets of a head
  int sharing;
};

/// What a block works on: `count` targets of a head from `first` on, and the tiles of sources that any of them sees.
struct PairsBlock {
  int64_t b, head_kv, head, first;
  int64_t begin, end, step;
  int hashes;  // staged at once
};

__device__ inline PairsBlock pairs_block(const PairsArgs& a) {
  const BucketProblem& p = a.problem;
  const int64_t heads = p.heads_kv * p.targets.group, row = int64_t(blockIdx.x) / a.tiles;
  const int targets = kPairTargets * kPairWarps / a.sharing;
  PairsBlock block = {
      row / heads, row % heads / p.targets.group, row % heads, blockIdx.x % a.tiles * targets, 0, p.sources.tokens,
      0,           kPairHashes / a.sharing};
  block.step = int64_t(kPairTile) * a.sharing;
  if (!p.causal) return block;
  const int64_t last = min(block.first + targets, p.targets.tokens) - 1;
  if (p.backward)
    block.begin = max(causal_bound(p, block.first), int64_t(0)) / block.step * block.step;
  else
    block.end = min(causal_bound(p, last), block.end);
  return block;
}

/// Codes of hashes [hash, hash + block.hashes) of `count` tokens from `first` on, [hash, token]; `none` behind the
/// last.
__device__ inline void stage_codes(const BucketProblem& p, const BucketSide& side, const PairsBlock& block,
                                   int64_t head, int64_t hash, int64_t first, int count, int32_t none,
                                   int32_t* staged) {
  for (int i = int(threadIdx.x); i < block.hashes * count; i += kPairThreads) {
    const int r = i / count;
    const int64_t token = first + i % count;
    int32_t code = none;
    if (hash + r < p.num_hashes && token < side.tokens)
      code = code_or(load_raw(side, block.b, head, hash + r, token), p.num_buckets, none);
    staged[i] = code;
  }
}

/// Adds weight * row for the lanes of `sources`, in ascending order. Several rows are read before the first is added.
template <int Count, class T>
__device__ inline void add_rows(WarpRow<Count>& sum, unsigned sources, int weight, const T* rows, int64_t step,
                                int64_t dim) {
  constexpr int kBatch = Count > 4 ? 2 : 4;
  while (sources) {
    WarpRow<Count> x[kBatch];
    float weights[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int source = sources ? __ffs(int(sources)) - 1 : 0;
      // Nothing is read for a source that is not there: its row may hold NaN.
      x[i] = load_row<Count>(rows + source * step, sources ? dim : 0);
      weights[i] = float(__shfl_sync(kFullMask, weight, source));
      sources &= sources - 1;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
      for (int j = 0; j < Count; ++j) sum.value[j] = fmaf(weights[i], x[i].value[j], sum.value[j]);
  }
}

/// counts[i][j] += hashes by which target i of the warp and source j of the lane are equal.
__device__ inline void count_equal(const int32_t* sources, int source_step, const int32_t* targets, int target_step,
                                   int hashes, int (&counts)[kPairTargets][kPairSources]) {
#pragma unroll 4
  for (int r = 0; r < hashes; ++r) {
    const int4 t = *reinterpret_cast<const int4*>(targets + r * target_step);
    const int32_t target[kPairTargets] = {t.x, t.y, t.z, t.w};
#pragma unroll
    for (int j = 0; j < kPairSources; ++j) {
      const int32_t source = sources[r * source_step + j * kWarp + lane_id()];
#pragma unroll
      for (int i = 0; i < kPairTargets; ++i) counts[i][j] += target[i] == source;
    }
  }
}

/// Target i of a warp sees the sources that lie below (backward: not below) this number + i in the warp's part of a
/// tile.
__device__ inline int sees_below(const BucketProblem& p, int64_t target, int64_t source) {
  constexpr int64_t kAll = 1 << 20;
  const int64_t bound = p.causal ? causal_bound(p, target) - source : p.backward ? -kAll : kAll;
  return int(min(max(bound, -kAll), kAll));
}

/// Adds the rows of a warp's part of a tile to the sums of its targets.
template <int Count, class T>
__device__ inline void add_tile_rows(WarpRow<Count> (&sums)[kPairTargets],
                                     const int (&counts)[kPairTargets][kPairSources], int below, bool backward,
                                     const T* rows, int64_t step, int64_t dim) {
#pragma unroll
  for (int j = 0; j < kPairSources; ++j)
#pragma unroll
    for (int i = 0; i < kPairTargets; ++i) {
      const bool sees = (j * kWarp + lane_id() < below + i) != backward;
      add_rows(sums[i], __ballot_sync(kFullMask, sees && counts[i][j]), counts[i][j], rows + j * kWarp * step, step,
               dim);
    }
}

/// Adds the sums of the warps that share their targets to that of the first of them.
template <int Count>
__device__ inline void join_warps(WarpRow<Count> (&sums)[kPairTargets], int sharing, float* scratch) {
#pragma unroll
  for (int i = 0; i < kPairTargets; ++i) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < Count; ++j) scratch[(warp_id() * Count + j) * kWarp + lane_id()] = sums[i].value[j];
    __syncthreads();
    if (warp_id() % sharing) continue;
    for (int other = 1; other < sharing; ++other)
#pragma unroll
      for (int j = 0; j < Count; ++j)
        sums[i].value[j] += scratch[((warp_id() + other) * Count + j) * kWarp + lane_id()];
  }
}

/// Count columns a lane: rows of up to 32 * Count elements.
template <int Count, class T>
__global__ void __launch_bounds__(kPairThreads, Count > 2 ? 2 : 3)
    bucket_pairs_kernel(const __grid_constant__ PairsArgs args) {
  __align__(16) __shared__ int32_t source_codes[kPairHashes * kPairTile];
  __align__(16) __shared__ int32_t target_codes[kPairHashes * kPairTargets * kPairWarps];
  const BucketProblem& p = args.problem;
  const PairsBlock block = pairs_block(args);
  const int sharing = args.sharing, part = warp_id() % sharing, first_target = warp_id() / sharing * kPairTargets;
  const int targets = kPairTargets * kPairWarps / sharing, sources = kPairTile * sharing;
  WarpRow<Count> sums[kPairTargets] = {};
  // The targets' codes of the only group of hashes stay.
  bool staged = false;
  for (int64_t h = 0; h < p.sources.group; ++h) {
    const int64_t head = block.head_kv * p.sources.group + h;
    for (int64_t first = block.begin; first < block.end; first += block.step) {
      int counts[kPairTargets][kPairSources] = {};
      for (int64_t hash = 0; hash < p.num_hashes; hash += block.hashes) {
        __syncthreads();
        stage_codes(p, p.sources, block, head, hash, first, sources, kNoSource, source_codes);
        if (!staged) stage_codes(p, p.targets, block, block.head, hash, block.first, targets, kNoTarget, target_codes);
        staged = p.num_hashes <= block.hashes;
        __syncthreads();
        count_equal(source_codes + part * kPairTile, sources, target_codes + first_target, targets,
                    int(min(p.num_hashes - hash, int64_t(block.hashes))), counts);
      }
      const int own = part * kPairTile;
      add_tile_rows(sums, counts, sees_below(p, block.first + first_target, first + own), p.backward,
                    element<const T>(p.rows, block.b, head, first + own), p.rows.stride[2], p.dim);
    }
  }
  if (sharing > 1) join_warps(sums, sharing, reinterpret_cast<float*>(source_codes));
  if (part) return;
#pragma unroll
  for (int i = 0; i < kPairTargets; ++i) {
    const int64_t target = block.first + first_target + i;
    if (target >= p.targets.tokens) break;
#pragma unroll
    for (int j = 0; j < Count; ++j) sums[i].value[j] *= p.scale;
    visit_row(p.out, block.b, block.head, target, [&](auto* row) { store_row(sums[i], row, p.dim); });
  }
}

}  // namespace subquad::cuda
