#include "cpu/column_cursor.h"
#include "cpu/exp.h"
#include "cpu/table.h"
#include "cpu/visible_tile.h"

// One pass over the keys. With the largest logit x_max so far and w = e^{x - x_max}, a row keeps
//
//   total = sum w,   squares = sum w^2,   slopes = sum w (x - x_max),   masses_c = e^lag sum over block c of w
//
// so that sum P ln P = slopes / total - ln total, where both terms have one sign. `lag` is how far the largest logit is
// above the one that the masses refer to: they need not be scaled whenever it grows.

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = TeacherBlocksArgs;

// e^kMostLag times any number of weights stays far from overflow.
constexpr float kMostLag = 40.0f;
// Differences that count as infinite: their exponential is 0, and 0 times them too.
constexpr float kFarBelow = -20000.0f;
constexpr int kSums = 3;  // total, squares, slopes

struct RowState {
  float top, mass_top, mass_factor;  // the largest logit, that of the masses, e^(top - mass_top)
  ColumnCursor cursor;
};

struct Scratch {
  float* queries;     // transposed panels of the block, times the scale
  float *keys, *row;  // of the tile: transposed panels; a panel of rows on its way
  float* logits;      // [kTileRows, kTileColumns], and a vector behind them
  float* sums;        // [block, kSums, kLanes]
  RowState* states;   // [block]
  int32_t* counts;    // [block]
};

Scratch lay_out(Arena& arena, const LogitSide& side, int64_t block) {
  const int64_t depth = depth_of(side);
  Scratch s;
  s.queries = take<float>(arena, block * depth);
  s.keys = take<float>(arena, kTileColumns * depth);
  s.row = take<float>(arena, kPanel * depth);
  s.logits = take<float>(arena, kTileRows * kTileColumns + kLanes);
  s.sums = take<float>(arena, block * kSums * kLanes);
  s.states = take<RowState>(arena, block);
  s.counts = take<int32_t>(arena, block);
  return s;
}

LogitSide side_of(const Args& a) { return logit_side(a.q, a.k, a.heads_q, a.heads_kv, a.dim, a.scale); }

float* masses_of(const Args& a, const VisibleBlock& block, int64_t r) {
  return element<float>(a.masses, block.batch, block.head, block.first + r);
}

void scale_all(float* x, int64_t count, float factor) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(x + i, load(x + i) * set(factor));
  for (; i < count; ++i) x[i] *= factor;
}

/// Makes `top` the largest logit of the row.
void raise_top(RowState& row, float top, float* sums, float* masses) {
  if (row.top == -kInfinity) {
    row.top = row.mass_top = top;
    return;
  }
  const float step = row.top - top;
  const F32 factor = exp(set(step)), total = load(sums), slopes = load(sums + 2 * kLanes);
  store(sums, factor * total);
  store(sums + kLanes, factor * factor * load(sums + kLanes));
  // A step beyond the reach of exp would be multiplied by 0.
  store(sums + 2 * kLanes, factor * fma(max(set(kFarBelow), set(step)), total, slopes));
  row.top = top;
  if (top - row.mass_top > kMostLag) {
    scale_all(masses, row.cursor.column + 1, exp(row.mass_top - top));
    row.mass_top = top;
  }
  row.mass_factor = exp(top - row.mass_top);
}

/// `Count` vectors of logits to weights, added to the sums of their row.
template <int Count>
inline void weigh(float* logits, F32 top, F32 (&sum)[kSums]) {
  F32 below[Count], weight[Count];
  for (int v = 0; v < Count; ++v) below[v] = max(set(kFarBelow), load(logits + v * kLanes) - top);
  for (int v = 0; v < Count; ++v) weight[v] = below[v];
  exp_shifted(weight, F32{});
  for (int v = 0; v < Count; ++v) {
    store(logits + v * kLanes, weight[v]);
    sum[0] += weight[v];
    sum[1] = fma(weight[v], weight[v], sum[1]);
    sum[2] = fma(weight[v], below[v], sum[2]);
  }
}

inline float sum_of(const float* x, int64_t count) {
  if (count <= 4) {
    float sum = x[0];
    for (int64_t i = 1; i < count; ++i) sum += x[i];
    return sum;
  }
  F32 sum = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum += load(x + i);
  if (i < count) sum += select(lanes_below(count - i), load(x + i), F32{});
  return reduce_add(sum);
}

// Blocks of a row have one of two widths, Width or Width + 1. Up to this one the choice costs less than a branch on it.
constexpr int64_t kMostNarrow = 7;

/// Adds the weights of the columns behind that of the cursor which end within ranks [first, first + count).
template <int64_t Width>
void add_narrow(const float* weights, int64_t first, int64_t count, float factor, ColumnCursor& at, float* masses) {
  const float* next = weights + (at.end - first);
  const float* const last = weights + (count - Width - 1);
  while (next <= last) {
    at.rest += at.step_rest;
    const bool is_wide = at.rest >= at.modulus;
    at.rest -= is_wide ? at.modulus : 0;
    float sum = 0;
    for (int64_t i = 0; i < Width; ++i) sum += next[i];
    sum += is_wide ? next[Width] : 0.0f;
    masses[++at.column] = factor * sum;
    next += Width + is_wide;
  }
  at.end = first + (next - weights);
}

/// Adds the weights of ranks [first, first + count) to their blocks.
void add_masses(const float* weights, int64_t first, int64_t count, RowState& row, float* masses) {
  ColumnCursor at = row.cursor;
  for (int64_t j = 0; j < count; j = smaller(count, at.end - first)) {
    seek(at, first + j);
    const int64_t stop = smaller(count, at.end - first);
    masses[at.column] += row.mass_factor * sum_of(weights + j, stop - j);
    if (stop < count && at.whole_step <= kMostNarrow)
      visit_int<0, 1, 2, 3, 4, 5, 6, 7>(at.whole_step, [&](auto width) {
        add_narrow<width.value>(weights, first, count, row.mass_factor, at, masses);
      });
  }
  row.cursor = at;
}

/// The logits of ranks [first, first + count) of one row.
void add_row(float* logits, int64_t first, int64_t count, RowState& row, float* sums, float* masses) {
  constexpr int kUnit = 4;
  const int64_t end = round_up(count, kLanes);
  for (int64_t j = count; j < end; ++j) logits[j] = -kInfinity;
  F32 top = set(-kInfinity);
  for (int64_t j = 0; j < end; j += kLanes) top = max(load(logits + j), top);
  if (any(top > set(row.top))) raise_top(row, reduce_max(top), sums, masses);
  F32 sum[kSums];
  for (int i = 0; i < kSums; ++i) sum[i] = load(sums + i * kLanes);
  int64_t j = 0;
  for (; j + kUnit * kLanes <= end; j += kUnit * kLanes) weigh<kUnit>(logits + j, set(row.top), sum);
  for (; j < end; j += kLanes) weigh<1>(logits + j, set(row.top), sum);
  for (int i = 0; i < kSums; ++i) store(sums + i * kLanes, sum[i]);
  add_masses(logits, first, count, row, masses);
}

void visit_tile(const Args& a, const LogitSide& side, const VisibleBlock& block, int64_t first, int64_t count,
                const Scratch& s) {
  pack_ranks(side, block, first, count, false, s.row, s.keys);
  for (int64_t r = 0; r < block.rows; r += kTileRows) {
    const int64_t columns = seen_from(most_seen(s.counts + r), first, count);
    if (columns == 0) continue;
    form_logits(side, s.queries, r, s.keys, columns, s.logits);
    for (int i = 0; i < kTileRows; ++i)
      if (const int64_t own = seen_from(s.counts[r + i], first, count); own > 0)
        add_row(s.logits + i * kTileColumns, first, own, s.states[r + i], s.sums + (r + i) * kSums * kLanes,
                masses_of(a, block, r + i));
  }
}

void finish_rows(const Args& a, const VisibleBlock& block, const Scratch& s) {
  for (int64_t r = 0; r < block.rows; ++r) {
    const RowState& row = s.states[r];
    const float* sums = s.sums + r * kSums * kLanes;
    float squares = 0, plogp = 0;
    if (s.counts[r] > 0) {
      const float total = reduce_add(load(sums)), inverse = 1 / total;
      scale_all(masses_of(a, block, r), a.columns, exp(row.mass_top - row.top) * inverse);
      squares = reduce_add(load(sums + kLanes)) * inverse * inverse;
      plogp = reduce_add(load(sums + 2 * kLanes)) * inverse - log(total);
    }
    *element<float>(a.sum_squares, block.batch, block.head, block.first + r) = squares;
    *element<float>(a.sum_plogp, block.batch, block.head, block.first + r) = plogp;
  }
}

void run_block(const Args& a, const LogitSide& side, const VisibleBlock& block, const Scratch& s) {
  const int64_t most = load_counts(a.visible, block, s.counts);
  for (int64_t r = 0; r < block.rows; ++r) {
    memset(masses_of(a, block, r), 0, size_t(a.columns) * sizeof(float));
    s.states[r] = {-kInfinity, -kInfinity, 1.0f, first_column(s.counts[r], a.columns)};
  }
  memset(s.sums, 0, size_t(block.rows * kSums * kLanes) * sizeof(float));
  if (most > 0) pack_block(side, block, s.queries);
  for (int64_t first = 0; first < most; first += kTileColumns)
    visit_tile(a, side, block, first, smaller(kTileColumns, most - first), s);
  finish_rows(a, block, s);
}

auto layout_of(const Args& a) {
  return [side = side_of(a)](Arena& arena, int64_t block) { return lay_out(arena, side, block); };
}

VisiblePlan plan(const Queue& queue, const Args& a) {
  return plan_rows(queue, a.batch, a.heads_q, a.seq_q, layout_of(a));
}

const char* supports(const Args& a) { return a.dim > kMaxHeadDim ? kTooWide : nullptr; }

int64_t workspace_bytes(const Queue& queue, const Args& a) { return bytes_of(plan(queue, a)); }

const char* run(const Queue& queue, const Args& a, void* workspace) {
  const LogitSide side = side_of(a);
  for_each_block(plan(queue, a), a.positions, arena_at(workspace).base, layout_of(a),
                 [&](const VisibleBlock& block, const Scratch& s) { run_block(a, side, block, s); });
  return nullptr;
}

}  // namespace

const Slot<TeacherBlocksArgs> teacher_blocks_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
