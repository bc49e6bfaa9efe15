/// Which pairs the sampled gradient evaluates: for every target at most `num_samples` of the candidates that share its
/// bucket, and with the exact rule as many of those in the buckets one bit away, each cut down to what causal order
/// lets the target see.
///
/// The warp of a target works on as many hashes at a time as it has lanes for: a lane finds a bucket, draws, and looks
/// up a candidate and where its rows are. Nothing depends on other targets, so the chain of dependent reads is paid
/// once for up to 32 pairs.
#pragma once
#include "bucket_index.cuh"
#include "core/philox.h"
#include "operand_rows.cuh"

namespace subquad::cuda {

/// A row of q or k becomes a unit row as row * power / length. The power of two is 1 unless the row's length is far
/// from 1, so that what is left of the length may be a factor of anything. A zero row has both 0.
struct alignas(8) RowScale {
  float power, length;
};

/// The queries of all heads, or the keys. A token has a row of q or k next to a value row, of dout or v.
struct PairSide {
  Operand unit, value, codes, mask, grad;
  int64_t heads, seq;
  const RowScale* scales;  // [B, heads, seq]; of masked tokens not written
  BucketIndexes index;
};

/// dq (the targets are the queries) or dk (they are the keys): both are the same sum.
struct PairProblem {
  PairSide targets, candidates;
  int64_t batch, group;
  int32_t num_hashes, dim_unit, dim_value, hash_bits, num_samples;
  int32_t picks_a_hash;   // num_samples, twice that with the exact rule
  int32_t hashes_a_time;  // whose flipped buckets, and where that is possible whose picks, fit the lanes of a warp
  uint32_t sample_factor, sample_shift;  // n / num_samples = n * factor >> shift for n < 2^31
  bool exact, causal, targets_are_queries;
  bool wide_loads;                   // every row allows 16 bytes at a time
  float own_weight, flipped_weight;  // of a pair when all candidates are taken
  uint64_t seed;
  const int64_t* seed_ptr;
};

/// The row of a side that this warp owns, if it exists; whether its token is kept.
struct SideRow {
  int64_t b, h, n;
  bool exists, kept;
};

__device__ inline SideRow side_row_of_warp(const PairSide& side, int64_t batch, int warps) {
  const int64_t row = int64_t(blockIdx.x) * warps + warp_id();
  SideRow at = {row / side.seq / side.heads, row / side.seq % side.heads, row % side.seq,
                row < batch * side.heads * side.seq, true};
  if (at.exists) at.kept = is_kept(side.mask, at.b, at.n);
  return at;
}

/// A target, and the candidates of one head.
struct PairHead {
  const void *unit, *value;  // rows of the first candidate
  const RowScale* scales;
  BucketIndex index;  // of the first hash
  const void* codes;  // the target's for the first hash
  int64_t bound;      // with causal order: the first candidate that a query does not see, or that a key does
  uint32_t target, draw_head;
  uint64_t seed;
};

/// A picked candidate. Null rows of weight 0 fill up a board.
struct alignas(16) Pair {
  const void *unit, *value;
  float power, inverse, weight;  // inverse: 1 / length, 0 for a zero row
};

/// The memory of a warp. What all lanes have in common is here too, because registers are what is scarce. Flipped
/// bucket j of the i-th of the hashes under way is at i * hash_bits + j; `ends` counts the candidates in the flipped
/// buckets of a hash up to this one.
struct PairBoard {
  Pair pairs[kWarp];
  int32_t begins[kWarp], ends[kWarp];
  SideRow row;    // the target
  PairHead head;  // its candidates
};

/// Puts up what the warp has to know of a target and the candidates of one head.
template <class T, class V>
__device__ inline void put_head(const PairProblem& p, int64_t member, PairBoard& board) {
  const int64_t b = board.row.b, h = board.row.h, n = board.row.n;
  const PairSide& side = p.candidates;
  const int64_t head = p.targets_are_queries ? h / p.group : h * p.group + member;
  PairHead at = {};
  at.unit = element<const T>(side.unit, b, head), at.value = element<const V>(side.value, b, head);
  at.scales = side.scales + (b * side.heads + head) * side.seq;
  at.index = index_of(side.index, b, head, 0);
  const Operand& codes = p.targets.codes;
  const int64_t code = b * codes.stride[0] + h * codes.stride[1] + n * codes.stride[3];
  at.codes = static_cast<const char*>(codes.data) + code * (codes.dtype == DType::u16 ? 2 : 4);
  at.bound = n + side.seq - p.targets.seq + (p.targets_are_queries ? 1 : 0);
  at.target = uint32_t(n), at.draw_head = p.targets_are_queries ? uint32_t(h) : 0x80000000u + uint32_t(head);
  at.seed = p.seed_ptr ? uint64_t(*p.seed_ptr) : p.seed;
  // fill_board has made all lanes meet since they read what was here.
  if (lane_id() == 0) board.head = at;
  __syncwarp();
}

__device__ inline int32_t code_of(const PairProblem& p, const PairHead& at, int32_t r) {
  const int64_t i = r * p.targets.codes.stride[2];
  return p.targets.codes.dtype == DType::u16 ? int32_t(static_cast<const uint16_t*>(at.codes)[i])
                                             : static_cast<const int32_t*>(at.codes)[i];
}

__device__ inline const int32_t* order_of(const PairProblem& p, const PairHead& at, int32_t r) {
  return at.index.order + int64_t(r) * int32_t(p.candidates.seq);
}

/// Some candidates of a bucket: positions of the order.
struct PairRange {
  int32_t begin, count;
};

__device__ inline PairRange visible_range(const PairProblem& p, const PairHead& at, int32_t r, int32_t code) {
  BucketIndex index = at.index;
  index.order = order_of(p, at, r);
  index.offsets += int64_t(r) * int32_t(index.entries + 1);
  if (index.shift) index.codes += int64_t(r) * int32_t(p.candidates.seq);
  BucketRange range = find_bucket(index, code);
  if (p.causal) {
    const int64_t cut = lower_bound(index.order, range.begin, range.end, at.bound);
    (p.targets_are_queries ? range.end : range.begin) = cut;
  }
  return {int32_t(range.begin), int32_t(range.end - range.begin)};
}

/// Writes the flipped buckets of the hashes from `first` on to the board.
__device__ inline void find_flipped(const PairProblem& p, const PairHead& at, int32_t first, PairBoard& board) {
  const int lane = lane_id(), place = lane / p.hash_bits, j = lane - place * p.hash_bits;
  PairRange range = {0, 0};
  if (place < p.hashes_a_time && first + place < p.num_hashes)
    range = visible_range(p, at, first + place, code_of(p, at, first + place) ^ 1 << j);
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t before = __shfl_up_sync(kFullMask, range.count, step);
    if (j >= step) range.count += before;
  }
  // fill_board has made all lanes meet since they read what was here.
  board.begins[lane] = range.begin, board.ends[lane] = range.count;
  __syncwarp();
}

/// The position of candidate i of all flipped buckets of the hash at `place`.
__device__ inline int32_t flipped_position(const PairProblem& p, const PairBoard& board, int place, int32_t i) {
  const int32_t* ends = board.ends + place * p.hash_bits;
  int low = 0, high = p.hash_bits - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ends[middle] > i)
      high = middle;
    else
      low = middle + 1;
  }
  return board.begins[place * p.hash_bits + low] + i - (low ? ends[low - 1] : 0);
}

__device__ inline uint32_t draw_word(const PairHead& at, uint32_t r, bool flipped) {
  const philox::Words words =
      philox::words(at.seed, at.target, r / 4 + (flipped ? 1u << 30 : 0), at.draw_head, philox::kPairs);
  const uint32_t low = r & 1 ? words.w[1] : words.w[0], high = r & 1 ? words.w[3] : words.w[2];
  return r & 2 ? high : low;
}

/// Pick t of n > num_samples candidates: (start + floor(t n / num_samples)) mod n.
__device__ inline int32_t spread(const PairProblem& p, uint32_t word, uint32_t n, uint32_t t) {
  const uint32_t step = uint32_t(uint64_t(n) * p.sample_factor >> p.sample_shift);
  const uint32_t rest = t * (n - step * uint32_t(p.num_samples));
  const uint32_t start = uint32_t(uint64_t(word) * n >> 32);  // philox::below
  const uint32_t i = start + t * step + uint32_t(uint64_t(rest) * p.sample_factor >> p.sample_shift);
  return int32_t(i < n ? i : i - n);
}

/// Where a lane's picks are: pick t + 32 i, i >= 0, of the hash at `place` of those under way.
struct PickLane {
  int place, t;
};

__device__ inline PickLane pick_lane(const PairProblem& p) {
  const int place = p.picks_a_hash < kWarp ? lane_id() / p.picks_a_hash : 0;
  return {place, lane_id() - place * p.picks_a_hash};
}

/// Pick t of hash r, first those of its own bucket, then flipped ones. False if there is no such candidate. T and V are
/// the types of the candidates' rows.
template <bool Exact, class T, class V>
__device__ inline bool pick_pair(const PairProblem& p, const PairHead& at, int32_t r, int place, int t, PairRange own,
                                 const PairBoard& board, Pair& pair) {
  const bool flipped = Exact && t >= p.num_samples;
  if (flipped) t -= p.num_samples;
  const int32_t n = flipped ? board.ends[place * p.hash_bits + p.hash_bits - 1] : own.count;
  if (t >= n) return false;
  pair.weight = flipped ? p.flipped_weight : p.own_weight;
  int32_t i = t;
  if (n > p.num_samples) {
    i = spread(p, draw_word(at, uint32_t(r), flipped), uint32_t(n), uint32_t(t));
    pair.weight *= float(n) / float(p.num_samples);
  }
  const int32_t token = order_of(p, at, r)[flipped ? flipped_position(p, board, place, i) : own.begin + i];
  pair.unit = static_cast<const T*>(at.unit) + token * p.candidates.unit.stride[2];
  pair.value = static_cast<const V*>(at.value) + token * p.candidates.value.stride[2];
  const RowScale scale = at.scales[token];
  pair.power = scale.power, pair.inverse = scale.power == 0 ? 0 : 1 / scale.length;
  return true;
}

/// What is on a board.
struct PairCount {
  int count;
  bool rescaled;  // some pair's power is not 1
};

/// Writes the picks of all lanes to the board, one after the other.
__device__ inline PairCount fill_board(bool found, const Pair& pair, PairBoard& board) {
  const int lane = lane_id();
  const unsigned all = __ballot_sync(kFullMask, found);
  const bool rescaled = __any_sync(kFullMask, found && pair.power != 1);
  const int count = __popc(all);
  // The pairs before these have been read.
  __syncwarp();
  if (found) board.pairs[__popc(all & ((1u << lane) - 1))] = pair;
  if (lane >= count) board.pairs[lane] = {nullptr, nullptr, 1, 0, 0};
  __syncwarp();
  return {count, rescaled};
}

}  // namespace subquad::cuda
