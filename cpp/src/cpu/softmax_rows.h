/// Rows of softmax_attention and the running sums they keep: what its forward kernels share.
///
/// Of a row is kept
///
///   total = sum_m w_m,   sum = sum_m w_m v_m,   w_m = e^{x_m - base} 2^-power
///
/// with weights of at most 1. The power follows the largest logit so far, in steps that are rare and cost no rounding.
/// The base is 0 unless a logit lies beyond kReach; then it is that logit. What a row does not see weighs 0, which
/// leaves the other terms of its sums as they are: the bits of a row do not depend on the rows it is grouped with.
#pragma once
#include "cpu/softmax_tile.h"
#include "cpu/unit_row.h"

namespace subquad::cpu::SUBQUAD_ISA {

// Distance of a logit from its base that exp_shifted can tell exactly.
static constexpr float kReach = 16000.0f;
// A step of the power leaves room for logits to grow by e^8 before the next one.
static constexpr int kRoom = 12;

/// Queries [first, first + rows) of one head.
struct Block {
  int64_t batch, head, head_kv, first, rows;
};

struct RunningRows {
  float* sums;                     // [block, padded dim_v]
  float* totals;                   // [block, kLanes]
  float* divisors;                 // the same of the weights after rounding; null where they are not rounded
  float *bases, *powers, *limits;  // [block]; no logit so far is above the limit, and before the first that is -inf
  Interval* seen;                  // [block], keys of the sweep
};

static inline RunningRows take_running_rows(Arena& arena, const SoftmaxAttentionArgs& a, int64_t block,
                                            bool has_divisors) {
  RunningRows s;
  s.sums = take<float>(arena, a.out.data ? block * padded(a.dim_v) : 0);
  s.totals = take<float>(arena, block * kLanes);
  s.divisors = has_divisors ? take<float>(arena, block * kLanes) : nullptr;
  s.bases = take<float>(arena, block);
  s.powers = take<float>(arena, block);
  s.limits = take<float>(arena, block);
  s.seen = take<Interval>(arena, block);
  return s;
}

/// Before the first sweep.
static inline void clear_rows(const SoftmaxAttentionArgs& a, int64_t rows, const RunningRows& s) {
  if (a.out.data) memset(s.sums, 0, size_t(rows * padded(a.dim_v)) * sizeof(float));
  memset(s.totals, 0, size_t(rows * kLanes) * sizeof(float));
  if (s.divisors) memset(s.divisors, 0, size_t(rows * kLanes) * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) s.bases[r] = 0, s.powers[r] = 0, s.limits[r] = -kInfinity;
}

/// Makes room for the logit `top`, the largest of row r and above its limit.
static inline void raise_limit(const SoftmaxAttentionArgs& a, const RunningRows& s, int64_t r, float top) {
  const bool is_first = s.limits[r] == -kInfinity;
  float base = s.bases[r], distance = top - base;
  if (!(distance >= -kReach && distance <= kReach)) base = top, distance = 0;
  const float power = float(int32_t(distance * kLog2E) + 1 + kRoom);
  if (!is_first) {
    const float factor = exp_shifted(set(s.bases[r] - base), set(power - s.powers[r]))[0];
    scale_row(s.totals + r * kLanes, kLanes, factor);
    if (s.divisors) scale_row(s.divisors + r * kLanes, kLanes, factor);
    if (a.out.data) scale_row(s.sums + r * padded(a.dim_v), padded(a.dim_v), factor);
  }
  s.bases[r] = base, s.powers[r] = power, s.limits[r] = base + power * float(kLn2);
}

/// Calls visit(rows, key) for the tiles of a sweep, by their first keys, with the rows of the block that see some of
/// the tile, in whole groups of Group. Intervals grow with the row, and so do the rows of a tile.
template <int Group, class F>
static inline void for_each_tile(const SoftmaxSweep& sweep, const Block& block, Interval* seen, F&& visit) {
  const int64_t rows = round_up(block.rows, Group);
  for (int64_t r = 0; r < rows; ++r)
    seen[r] = keys_seen(sweep.rule, block.first + smaller(r, block.rows - 1), sweep.seq_k);
  Interval seeing = {0, 0};
  const int64_t begin = seen[0].lo / kTileColumns * kTileColumns, end = seen[rows - 1].hi;
  for (int64_t first = begin; first < end; first += kTileColumns) {
    while (seen[seeing.lo + Group - 1].hi <= first) seeing.lo += Group;
    seeing.hi = larger(seeing.lo, seeing.hi);
    while (seeing.hi < rows && seen[seeing.hi].lo < smaller(end, first + kTileColumns)) seeing.hi += Group;
    if (seeing.lo < seeing.hi) visit(seeing, first);
  }
}

/// Products of kTileRows rows, from row r of the block on, to logits.
static inline void to_logits(const SoftmaxSweep& sweep, const Block& block, int64_t r, const KeyTile& tile,
                             const Seen& seen, float* scores) {
  if (const Operand& b = sweep.pair_bias; b.data) {
    const float* base = static_cast<const float*>(b.data) + block.batch * b.stride[0] + block.head * b.stride[1];
    const float* rows[kTileRows];
    for (int i = 0; i < kTileRows; ++i)
      rows[i] = base + (block.first + smaller(r + i, block.rows - 1)) * b.stride[2] + tile.first;
    finish_logits(tile, seen, rows, scores);
  } else if (tile.has_bias || tile.has_gaps || !seen.is_whole) {
    finish_logits(tile, seen, nullptr, scores);
  }
}

/// Writes out and lse.
static inline void finish_rows(const SoftmaxAttentionArgs& a, const Block& block, const RunningRows& s) {
  const bool* keep = mask_of(a.query_mask, block.batch);
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t row = block.first + r, width = padded(a.dim_v);
    const bool kept = !keep || keep[row];
    const float total = kept ? reduce_add(load(s.totals + r * kLanes)) : 0.0f;
    if (a.out.data) {
      float* sum = s.sums + r * width;
      const float divisor = kept && s.divisors ? reduce_add(load(s.divisors + r * kLanes)) : total;
      if (divisor == 0.0f)
        memset(sum, 0, size_t(width) * sizeof(float));
      else
        divide_row(sum, width, divisor);
      store_row(a.out, block.batch, block.head, row, sum, a.dim_v);
    }
    if (a.lse.data) {
      float* lse = static_cast<float*>(a.lse.data) + block.batch * a.lse.stride[0] + block.head * a.lse.stride[1];
      lse[row * a.lse.stride[2]] = total == 0.0f ? -kInfinity : log_length({total, int(s.powers[r])}) + s.bases[r];
    }
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA
