/// The backward pass of softmax_attention, tile by tile: queries and keys are packed, pairs formed, and added to the
/// gradients of both.
#pragma once
#include "cpu/exp.h"
#include "cpu/row_product.h"
#include "cpu/unit_row.h"

namespace subquad::cpu::SUBQUAD_ISA {

// Queries and keys of a tile.
static constexpr int64_t kTile = kTileColumns;

/// The part of an interval that lies in [first, first + count), counted from `first`.
static inline Interval within(Interval x, int64_t first, int64_t count) {
  return clipped(x.lo - first, x.hi - first, count);
}

/// What kTileRows neighbours together see of a tile; bounds grow from one to the next.
static inline Interval seen_together(const Interval* seen, int64_t first, int64_t count) {
  return within({seen[0].lo, seen[kTileRows - 1].hi}, first, count);
}

/// Which results a tile adds to; `dx` if any but dv.
struct GradientWants {
  bool dq, dpair_bias, dk, dv, sums, dx;
};

struct GradientScratch {
  // A block of keys
  float *k_rows, *k_panels, *v_panels;  // [keys, unit]; panels [unit, kPanel] and [partner, kPanel]
  float *squares, *bias;                // [keys]: |k|^2; what a head adds to its logits, -inf where masked
  float *dk, *dv, *sums, *head_sums;    // [keys, unit], [keys, partner], [keys]: sum_n dx over the heads, over one
  Interval* seen_by;                    // [keys]
  bool* k_finite;                       // [keys / kTile]
  // A tile of queries
  float *q_rows, *dout_rows, *lse, *delta;  // [kTile, unit] times s, [kTile, partner], [kTile]
  Interval* seen;                           // [kTile]
  bool *q_finite, *dout_finite;
  float *p, *dx;     // [kTile, kTile]
  float* pair_bias;  // [kTile]
  float* dq;         // [heads of the task, rows of the task, unit]
};

/// Packs keys [first, first + count); masked keys and those past `count` become zeros.
static inline void pack_keys(const SoftmaxAttentionArgs& a, const SoftmaxSweep& sweep, int64_t batch, int64_t head_kv,
                             int64_t first, int64_t count, const GradientScratch& s) {
  const int64_t unit = padded(a.dim_qk), partner = padded(a.dim_v);
  const bool* keep = mask_of(sweep.key_mask, batch);
  for (int64_t j = 0; j < count; j += kPanel) {
    const int64_t present = smaller(count - j, kPanel);
    // The rows of v are needed only as panels: they pass through the place of dv.
    if (a.dout.data) {
      gather_rows(sweep.v, batch, head_kv, first + j, present, keep, a.dim_v, s.dv, partner);
      transpose_rows(s.dv, partner, s.v_panels + j * partner);
    }
    gather_rows(sweep.k, batch, head_kv, first + j, present, keep, a.dim_qk, s.k_rows + j * unit, unit);
    transpose_rows(s.k_rows + j * unit, unit, s.k_panels + j * unit);
  }
  // The same chain of operations as in the forward pass.
  for (int64_t j = 0; sweep.key_norm_bias != 0 && j < count; j += kLanes) {
    const float* column = s.k_panels + j / kPanel * kPanel * unit + j % kPanel;
    F32 square = {};
    for (int64_t d = 0; d < a.dim_qk; ++d, column += kPanel) square = fma(load(column), load(column), square);
    store(s.squares + j, square);
  }
  for (int64_t j = 0; j < round_up(count, kTileRows); ++j)
    s.seen_by[j] = rows_seeing(sweep.rule, first + smaller(j, count - 1), a.seq_q);
  for (int64_t at = 0; at < count; at += kTile)
    s.k_finite[at / kTile] = is_finite(s.k_rows + at * unit, smaller(kTile, count - at) * unit);
  clear(s.dk, round_up(count, kTileRows) * unit), clear(s.dv, round_up(count, kTileRows) * partner);
  clear(s.sums, round_up(count, kPanel));
}

/// What query head `head` adds to the logits of the packed keys.
static inline void add_key_bias(const SoftmaxSweep& sweep, int64_t batch, int64_t head, int64_t first, int64_t count,
                                const GradientScratch& s) {
  const int64_t end = round_up(count, kPanel);
  const bool* keep = mask_of(sweep.key_mask, batch);
  const float* bias = nullptr;
  if (const Operand& b = sweep.key_bias; b.data)
    bias = static_cast<const float*>(b.data) + batch * b.stride[0] + head / sweep.bias_group * b.stride[1] + first;
  clear(s.bias, end), clear(s.head_sums, end);
  if (bias) memcpy(s.bias, bias, size_t(count) * sizeof(float));
  const F32 factor = set(sweep.key_norm_bias);
  for (int64_t j = 0; sweep.key_norm_bias != 0 && j < end; j += kLanes)
    store(s.bias + j, fma(factor, load(s.squares + j), load(s.bias + j)));
  for (int64_t j = 0; j < end; ++j)
    if (j >= count || (keep && !keep[first + j]) || (bias && bias[j] == -kInfinity)) s.bias[j] = -kInfinity;
}

/// Packs queries [first, first + count) with their lse and delta; those with an lse of infinity become zeros. False if
/// all of them do.
static inline bool pack_queries(const SoftmaxAttentionArgs& a, const SoftmaxSweep& sweep, const float* lse,
                                const float* delta, int64_t batch, int64_t head, int64_t first, int64_t count,
                                const GradientScratch& s) {
  const int64_t unit = padded(a.dim_qk), partner = padded(a.dim_v);
  bool any = false;
  for (int64_t r = 0; r < count; ++r) any |= lse[r] != kInfinity;
  if (!any) return false;
  for (int64_t r = 0; r < count; r += kPanel) {
    const int64_t present = smaller(count - r, kPanel);
    gather_rows(a.q, batch, head, first + r, present, nullptr, a.dim_qk, s.q_rows + r * unit, unit);
    if (a.dout.data)
      gather_rows(a.dout, batch, head, first + r, present, nullptr, a.dim_v, s.dout_rows + r * partner, partner);
  }
  for (int64_t r = 0; r < round_up(count, kTileRows); ++r) {
    s.lse[r] = r < count ? lse[r] : kInfinity;
    s.delta[r] = r < count ? delta[r] : 0;
    s.seen[r] = keys_seen(sweep.rule, first + smaller(r, count - 1), sweep.seq_k);
    // The weights of such queries are 0 anyway, but one NaN among them would slow the tile down.
    if (s.lse[r] == kInfinity) clear(s.q_rows + r * unit, unit), clear(s.dout_rows + r * partner, partner);
    scale_row(s.q_rows + r * unit, unit, a.scale);
  }
  *s.q_finite = is_finite(s.q_rows, count * unit), *s.dout_finite = is_finite(s.dout_rows, count * partner);
  return true;
}

/// Queries [query, query + queries) of one head, as packed, and keys [key, key + keys), which start at key `at` of the
/// packed block.
struct GradientTile {
  const SoftmaxAttentionArgs& a;
  const SoftmaxSweep& sweep;
  const GradientScratch& s;
  GradientWants wants;
  int64_t batch, head, query, queries, key, keys, at;
};

/// Row n, from key m on, of an array [B, H, N, M] in f32.
static inline float* row_of_pairs(const Operand& x, int64_t batch, int64_t head, int64_t n, int64_t m) {
  return static_cast<float*>(x.data) + batch * x.stride[0] + head * x.stride[1] + n * x.stride[2] + m;
}

/// Row r of logits and products <dout, v> to p and dx, over whole vectors of columns.
static inline void form_row(const GradientTile& t, int64_t r, Interval columns) {
  float *p = t.s.p + r * kTile, *dx = t.s.dx + r * kTile;
  const float *bias = t.s.bias + t.at, *pair_bias = t.s.pair_bias;
  const F32 lse = set(t.s.lse[r]), delta = set(t.s.delta[r]);
  for (int64_t j = columns.lo; j < columns.hi; j += kLanes) {
    const F32 key_bias = load(bias + j), x = load(p + j) + key_bias + load(pair_bias + j);
    const I32 has_effect = key_bias != set(-kInfinity);
    const F32 weight = select(has_effect, exp(x - lse), F32{});
    store(p + j, weight);
    store(dx + j, select(has_effect, weight * (load(dx + j) - delta), F32{}));
  }
}

/// p and dx of row r: 0 where the query sees nothing.
static inline void finish_row(const GradientTile& t, int64_t r) {
  float *p = t.s.p + r * kTile, *dx = t.s.dx + r * kTile;
  const Interval own = t.s.lse[r] == kInfinity ? Interval{0, 0} : within(t.s.seen[r], t.key, t.keys);
  if (own.lo < own.hi) {
    if (t.sweep.pair_bias.data)
      memcpy(t.s.pair_bias + own.lo, row_of_pairs(t.sweep.pair_bias, t.batch, t.head, t.query + r, t.key + own.lo),
             size_t(own.hi - own.lo) * sizeof(float));
    form_row(t, r, {own.lo / kLanes * kLanes, own.hi});
  }
  if (own.hi - own.lo < kTile) {
    clear(p, own.lo), clear(p + own.hi, kTile - own.hi);
    clear(dx, own.lo), clear(dx + own.hi, kTile - own.hi);
  }
  if (own.lo >= own.hi) return;
  if (t.wants.sums)
    for (int64_t j = 0; j < kTile; j += kLanes)
      store(t.s.head_sums + t.at + j, load(t.s.head_sums + t.at + j) + load(dx + j));
  if (t.wants.dpair_bias)
    memcpy(row_of_pairs(t.sweep.dpair_bias, t.batch, t.head, t.query + r, t.key + own.lo), dx + own.lo,
           size_t(own.hi - own.lo) * sizeof(float));
}

/// Fills p and dx.
static inline void form_pairs(const GradientTile& t) {
  const GradientScratch& s = t.s;
  const int64_t unit = padded(t.a.dim_qk), partner = padded(t.a.dim_v), end = round_up(t.queries, kTileRows);
  const auto for_each_group = [&](auto&& f) {
    for (int64_t r = 0; r < end; r += kTileRows) {
      const Interval any = seen_together(s.seen + r, t.key, t.keys);
      const int64_t lo = any.lo / kPanel * kPanel;
      if (any.lo < any.hi) f(r, lo, any.hi - lo);
    }
  };
  // One operand after the other, so that each stays in the L1 cache for all rows.
  for_each_group([&](int64_t r, int64_t lo, int64_t count) {
    product_of_rows(s.q_rows + r * unit, s.k_panels + (t.at + lo) * unit, t.a.dim_qk, unit, s.p + r * kTile + lo,
                    count);
  });
  if (t.wants.dx && t.a.dout.data)
    for_each_group([&](int64_t r, int64_t lo, int64_t count) {
      product_of_rows(s.dout_rows + r * partner, s.v_panels + (t.at + lo) * partner, t.a.dim_v, partner,
                      s.dx + r * kTile + lo, count);
    });
  else
    clear(s.dx, kTile * kTile);
  for (int64_t r = 0; r < end; ++r) finish_row(t, r);
}

/// Adds the tile to the gradients of its queries (dq: their sums) and of its keys.
static inline void add_pairs(const GradientTile& t, float* dq) {
  const GradientScratch& s = t.s;
  const int64_t unit = padded(t.a.dim_qk), partner = padded(t.a.dim_v);
  const bool k_finite = s.k_finite[t.at / kTile];
  for (int64_t r = 0; t.wants.dq && r < t.queries; r += kTileRows)
    add_weighted({s.dx + r * kTile, kTile, 1}, s.k_rows + t.at * unit, unit, seen_together(s.seen + r, t.key, t.keys),
                 k_finite, dq + r * unit);
  for (int64_t j = 0; t.wants.dk && j < t.keys; j += kTileRows)
    add_weighted({s.dx + j, 1, kTile}, s.q_rows, unit, seen_together(s.seen_by + t.at + j, t.query, t.queries),
                 *s.q_finite, s.dk + (t.at + j) * unit);
  for (int64_t j = 0; t.wants.dv && j < t.keys; j += kTileRows)
    add_weighted({s.p + j, 1, kTile}, s.dout_rows, partner, seen_together(s.seen_by + t.at + j, t.query, t.queries),
                 *s.dout_finite, s.dv + (t.at + j) * partner);
}

}  // namespace subquad::cpu::SUBQUAD_ISA
