/// Rows of student and teacher attention side by side: what the passes of attention_divergence share.
///
/// Both softmax rows are S_r = e^{x_r - top} inverse, with the largest logit and the inverse of the sum of the rest.
#pragma once
#include "cpu/exp.h"
#include "cpu/visible_tile.h"
#include "ops/attention_divergence_args.h"

namespace subquad::cpu::SUBQUAD_ISA {

enum Side { kStudent, kTeacher, kSides };

struct DivergenceSides {
  LogitSide side[kSides];
};

static inline DivergenceSides sides_of(const AttentionDivergenceArgs& a) {
  return {{logit_side(a.q, a.k, a.heads_q, a.heads_kv, a.dim, a.scale),
           logit_side(a.q_teacher, a.k_teacher, a.heads_q, a.heads_teacher, a.dim_teacher, a.scale_teacher)}};
}

static inline const char* divergence_supports(const AttentionDivergenceArgs& a) {
  return larger(a.dim, a.dim_teacher) > kMaxHeadDim ? kTooWide : nullptr;
}

/// What normalises both softmax rows of a row.
struct RowNorms {
  float top[kSides], inverse[kSides];
  float log_ratio;  // ln of the sum of the student over that of the teacher
};

struct DivergenceScratch {
  float *queries[kSides], *keys[kSides];  // transposed panels, of the block times the scale, of the tile
  float* rows[kSides];    // the keys of the tile as rows: all of the student's, a panel of the teacher's
  float* logits[kSides];  // [kTileRows, kTileColumns]
  float* sums;            // [block, kSides, kLanes]: of the weights, relative to the largest so far
  int32_t* counts;        // [block]
};

static inline DivergenceScratch take_divergence_scratch(Arena& arena, const DivergenceSides& sides, int64_t block) {
  DivergenceScratch s;
  for (int i = 0; i < kSides; ++i) {
    const int64_t depth = depth_of(sides.side[i]);
    s.queries[i] = take<float>(arena, block * depth);
    s.keys[i] = take<float>(arena, kTileColumns * depth);
    s.rows[i] = take<float>(arena, (i == kStudent ? kTileColumns : kPanel) * depth);
    s.logits[i] = take<float>(arena, kTileRows * kTileColumns);
  }
  s.sums = take<float>(arena, block * kSides * kLanes);
  s.counts = take<int32_t>(arena, block);
  return s;
}

/// Packs the queries of a block; the most keys that one of them sees.
static inline int64_t open_block(const AttentionDivergenceArgs& a, const DivergenceSides& sides,
                                 const VisibleBlock& block, const DivergenceScratch& s) {
  const int64_t most = load_counts(a.visible, block, s.counts);
  for (int i = 0; most > 0 && i < kSides; ++i) pack_block(sides.side[i], block, s.queries[i]);
  return most;
}

/// Ranks [first, first + count), of which kTileRows rows from row r of the block on see some.
struct GroupTile {
  int64_t r, first, count;
};

/// Calls visit(group) with the logits of both sides for every group of rows and tile of keys, tile by tile.
template <class F>
static inline void for_each_group(const DivergenceSides& sides, const VisibleBlock& block, int64_t most,
                                  const DivergenceScratch& s, F&& visit) {
  for (int64_t first = 0; first < most; first += kTileColumns) {
    const int64_t count = smaller(kTileColumns, most - first);
    for (int i = 0; i < kSides; ++i)
      pack_ranks(sides.side[i], block, first, count, i == kStudent, s.rows[i], s.keys[i]);
    for (int64_t r = 0; r < block.rows; r += kTileRows) {
      const int64_t columns = seen_from(most_seen(s.counts + r), first, count);
      if (columns == 0) continue;
      for (int i = 0; i < kSides; ++i) form_logits(sides.side[i], s.queries[i], r, s.keys[i], columns, s.logits[i]);
      visit(GroupTile{r, first, columns});
    }
  }
}

/// Calls visit(row of the block, count, logits) for the rows of a group that see some of its ranks: the first `count`.
template <class F>
static inline void for_each_row_of(const GroupTile& group, const DivergenceScratch& s, F&& visit) {
  for (int i = 0; i < kTileRows; ++i) {
    const int64_t count = seen_from(s.counts[group.r + i], group.first, group.count);
    float* const logits[kSides] = {s.logits[kStudent] + i * kTileColumns, s.logits[kTeacher] + i * kTileColumns};
    if (count > 0) visit(group.r + i, count, logits);
  }
}

/// Logits from `count` to the end of their panel to -inf.
static inline void hide_unseen(float* logits, int64_t count) {
  for (; count % kPanel != 0; ++count) logits[count] = -kInfinity;
}

// Vectors of a panel of logits of both sides.
static constexpr int kBoth = kSides * kPanelVectors;

/// Logits of a panel less the largest of their side, and the exponentials of that.
static inline void weigh_panel(const float* const (&logits)[kSides], const float (&top)[kSides], F32 (&below)[kBoth],
                               F32 (&weight)[kBoth]) {
  for (int v = 0; v < kBoth; ++v) {
    const int side = v / kPanelVectors;
    weight[v] = below[v] = load(logits[side] + v % kPanelVectors * kLanes) - set(top[side]);
  }
  exp_shifted(weight, F32{});
}

/// Adds the weights of the first `count` logits of a row on both sides.
static inline void add_norms(float* const (&logits)[kSides], int64_t count, RowNorms& norms, float* sums) {
  for (int i = 0; i < kSides; ++i) {
    hide_unseen(logits[i], count);
    F32 top = set(-kInfinity);
    for (int64_t j = 0; j < count; j += kLanes) top = max(load(logits[i] + j), top);
    if (!any(top > set(norms.top[i]))) continue;
    const float largest = reduce_max(top), before = norms.top[i];
    norms.top[i] = largest;
    if (before != -kInfinity) scale_row(sums + i * kLanes, kLanes, exp(before - largest));
  }
  F32 sum[kSides];
  for (int i = 0; i < kSides; ++i) sum[i] = load(sums + i * kLanes);
  for (int64_t j = 0; j < count; j += kPanel) {
    F32 below[kBoth], weight[kBoth];
    weigh_panel({logits[kStudent] + j, logits[kTeacher] + j}, norms.top, below, weight);
    for (int v = 0; v < kBoth; ++v) sum[v / kPanelVectors] += weight[v];
  }
  for (int i = 0; i < kSides; ++i) store(sums + i * kLanes, sum[i]);
}

/// The norms of the rows of a block; those of a row without keys mean nothing.
static inline void find_norms(const DivergenceSides& sides, const VisibleBlock& block, int64_t most,
                              const DivergenceScratch& s, RowNorms* norms) {
  memset(s.sums, 0, size_t(block.rows * kSides * kLanes) * sizeof(float));
  for (int64_t r = 0; r < block.rows; ++r) norms[r] = {{-kInfinity, -kInfinity}, {0, 0}, 0};
  for_each_group(sides, block, most, s, [&](const GroupTile& group) {
    for_each_row_of(group, s, [&](int64_t r, int64_t count, float* const(&logits)[kSides]) {
      add_norms(logits, count, norms[r], s.sums + r * kSides * kLanes);
    });
  });
  for (int64_t r = 0; r < block.rows; ++r) {
    const float* sums = s.sums + r * kSides * kLanes;
    const float student = reduce_add(load(sums)), teacher = reduce_add(load(sums + kLanes));
    norms[r].inverse[kStudent] = 1 / student, norms[r].inverse[kTeacher] = 1 / teacher;
    norms[r].log_ratio = log(student / teacher);
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA
