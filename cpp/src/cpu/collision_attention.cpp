#include "core/parallel.h"
#include "cpu/collision_probability.h"
#include "cpu/table.h"
#include "cpu/tile.h"
#include "cpu/unit_row.h"

// One routine serves the forward pass and both halves of the backward pass. It owns a block of rows, visits the columns
// tile by tile, and sums over them
//
//   partner_sum[i]   = sum_j u(x_ij)^tau partner_j
//   unit_gradient[i] = (1 / |row_i|) (I - unit_i unit_i^T) sum_j c_ij unit_j,   c_ij = <partner_i, partner_j>
//   dp/dx(x_ij)
//
// Rows are queries with columns (k, v), or keys with columns (q, dout). The projection turns the sum into that of the
// t_ij of the header, for <unit_i, sum_j c_ij unit_j> = sum_j c_ij x_ij.

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = CollisionAttentionArgs;

struct Range {
  int64_t lo, hi;
};

struct Pass {
  Operand row_unit, row_partner;        // [B, heads of the rows, rows, dim]; the partner only for unit_gradient
  Operand column_unit, column_partner;  // [B, heads of the columns, columns, dim]
  Operand row_mask, column_mask;
  Operand unit_gradient, partner_sum;  // results, like the rows; null where not wanted
  int64_t batch, row_heads, column_heads, rows, columns, dim_unit, dim_partner;
  int hash_bits;
  bool exact, causal, rows_are_keys;
};

/// Queries as rows, nothing wanted yet.
Pass query_rows(const Args& a) {
  Pass p = {};
  p.row_unit = a.q, p.column_unit = a.k, p.column_partner = a.v;
  p.row_mask = a.query_mask, p.column_mask = a.key_mask;
  p.batch = a.batch, p.row_heads = a.heads_q, p.column_heads = a.heads_kv, p.rows = a.seq_q, p.columns = a.seq_k;
  p.dim_unit = a.dim_qk, p.dim_partner = a.dim_v;
  p.hash_bits = a.hash_bits, p.exact = a.exact, p.causal = a.causal;
  return p;
}

Pass forward_pass(const Args& a) {
  Pass p = query_rows(a);
  p.partner_sum = a.out;
  return p;
}

Pass query_pass(const Args& a) {
  Pass p = query_rows(a);
  p.row_partner = a.dout, p.unit_gradient = a.dq;
  return p;
}

Pass key_pass(const Args& a) {
  Pass p = query_rows(a);
  p.rows_are_keys = true;
  p.row_unit = a.k, p.row_partner = a.v, p.column_unit = a.q, p.column_partner = a.dout;
  p.row_mask = a.key_mask, p.column_mask = a.query_mask;
  p.row_heads = a.heads_kv, p.column_heads = a.heads_q, p.rows = a.seq_k, p.columns = a.seq_q;
  p.unit_gradient = a.dk, p.partner_sum = a.dv;
  return p;
}

/// Columns that a row sees.
Range seen_by(const Pass& p, int64_t row) {
  if (!p.causal) return {0, p.columns};
  const int64_t shifted = p.rows_are_keys ? row - (p.rows - p.columns) : row + (p.columns - p.rows) + 1;
  const int64_t bound = larger(0, smaller(shifted, p.columns));
  return p.rows_are_keys ? Range{bound, p.columns} : Range{0, bound};
}

/// Heads of the columns that a head of rows meets: those of its group.
Range column_heads_of(const Pass& p, int64_t head) {
  if (!p.rows_are_keys) return {head / (p.row_heads / p.column_heads), head / (p.row_heads / p.column_heads) + 1};
  const int64_t group = p.column_heads / p.row_heads;
  return {head * group, (head + 1) * group};
}

// Independent vectors that go through the long chain of operations together: two rows of one panel.
constexpr int kUnit = 2 * kPanelVectors;

/// Calls f(offset in a tile [kTileRows, kTileColumns] for each vector of the unit) for the units of columns [lo, hi).
template <class F>
inline void for_each_unit(Range columns, F&& f) {
  for (int r = 0; r < kTileRows; r += 2) {
    for (int64_t j = columns.lo; j < columns.hi; j += kPanel) {
      int64_t offset[kUnit];
      for (int i = 0; i < kUnit; ++i)
        offset[i] = (r + i / kPanelVectors) * kTileColumns + j + i % kPanelVectors * kLanes;
      f(offset);
    }
  }
}

/// Cosines [kTileRows, kTileColumns] to weights u^tau, over whole panels of columns.
void to_weights(float* cosines, Range columns, int hash_bits) {
  for_each_unit(columns, [&](const int64_t(&offset)[kUnit]) {
    F32 u[kUnit], weight[kUnit];
    for (int i = 0; i < kUnit; ++i) u[i] = collision_probability(load(cosines + offset[i]));
    raise(u, hash_bits, weight);
    for (int i = 0; i < kUnit; ++i) store(cosines + offset[i], weight[i]);
  });
}

/// Cosines to weights and products <partner_i, partner_j> to coefficients c_ij, likewise.
void to_coefficients(const Pass& p, float* cosines, float* products, Range columns) {
  const float factor = p.exact ? float(p.hash_bits) * kInversePi : float(p.hash_bits) * 0.5f;
  for_each_unit(columns, [&](const int64_t(&offset)[kUnit]) {
    F32 u[kUnit], power[kUnit];
    for (int i = 0; i < kUnit; ++i) u[i] = collision_probability(load(cosines + offset[i]));
    raise(u, p.hash_bits - 1, power);
    for (int i = 0; i < kUnit; ++i) {
      const F32 magnitude = abs(load(cosines + offset[i])), weight = power[i] * u[i];
      const F32 square = (1.0f - magnitude) * (1.0f + magnitude);
      const F32 slope = p.exact ? (square < 1e-8f ? F32{} : power[i] / sqrt(square)) : weight;
      store(products + offset[i], load(products + offset[i]) * slope * factor);
      store(cosines + offset[i], weight);
    }
  });
}

struct Scratch {
  float* rows;                            // [kPanel, dim], a panel on its way
  float *row_units, *row_partners;        // transposed panels of the block
  float *column_units, *column_partners;  // transposed panels of the tile
  float *unit_rows, *partner_rows;        // the same columns as rows, for the weights to multiply
  float *cosines, *products;              // [kTileRows, kTileColumns]
  float *unit_sums, *partner_sums;        // [block, dim]
};

Scratch lay_out(Arena& arena, const Pass& p, int64_t block) {
  const int64_t unit = padded(p.dim_unit), partner = padded(p.dim_partner);
  const int64_t gradient = p.unit_gradient.data != nullptr, sum = p.partner_sum.data != nullptr;
  Scratch s;
  s.rows = take<float>(arena, kPanel * larger(unit, partner));
  s.row_units = take<float>(arena, block * unit);
  s.row_partners = take<float>(arena, gradient * block * partner);
  s.column_units = take<float>(arena, kTileColumns * unit);
  s.column_partners = take<float>(arena, gradient * kTileColumns * partner);
  s.unit_rows = take<float>(arena, gradient * kTileColumns * round_up(unit, kPanel));
  s.partner_rows = take<float>(arena, sum * kTileColumns * round_up(partner, kPanel));
  s.cosines = take<float>(arena, kTileRows * kTileColumns);
  s.products = take<float>(arena, gradient * kTileRows * kTileColumns);
  s.unit_sums = take<float>(arena, gradient * block * unit);
  s.partner_sums = take<float>(arena, sum * block * partner);
  return s;
}

/// Scales rows [kPanel, pitch] to unit length.
void normalize_rows(float* rows, int64_t pitch, Length (&lengths)[kPanel]) {
  for (int r = 0; r < kPanel; ++r) lengths[r] = normalize_row(rows + r * pitch, pitch);
}

struct Block {
  int64_t batch, head, first, rows;  // of the rows
};

void pack_rows(const Pass& p, const Block& block, const Scratch& s) {
  const int64_t unit = padded(p.dim_unit), partner = padded(p.dim_partner);
  const bool* keep = mask_of(p.row_mask, block.batch);
  Length lengths[kPanel];
  for (int64_t r = 0; r < block.rows; r += kPanel) {
    const int64_t first = block.first + r, count = smaller(block.rows - r, kPanel);
    gather_rows(p.row_unit, block.batch, block.head, first, count, keep, p.dim_unit, s.rows, unit);
    normalize_rows(s.rows, unit, lengths);
    transpose_rows(s.rows, unit, s.row_units + r * unit);
    if (!p.unit_gradient.data) continue;
    gather_rows(p.row_partner, block.batch, block.head, first, count, keep, p.dim_partner, s.rows, partner);
    transpose_rows(s.rows, partner, s.row_partners + r * partner);
  }
}

/// Packs columns [first, first + count) of one head; masked columns and those past `count` become zeros.
void pack_columns(const Pass& p, int64_t batch, int64_t head, int64_t first, int64_t count, const Scratch& s) {
  const int64_t unit = padded(p.dim_unit), partner = padded(p.dim_partner);
  const bool* keep = mask_of(p.column_mask, batch);
  Length lengths[kPanel];
  for (int64_t j = 0; j < count; j += kPanel) {
    const int64_t present = smaller(count - j, kPanel);
    gather_rows(p.column_unit, batch, head, first + j, present, keep, p.dim_unit, s.rows, unit);
    normalize_rows(s.rows, unit, lengths);
    transpose_rows(s.rows, unit, s.column_units + j * unit);
    if (p.unit_gradient.data) split_rows(s.rows, unit, j, s.unit_rows);
    gather_rows(p.column_partner, batch, head, first + j, present, keep, p.dim_partner, s.rows, partner);
    if (p.unit_gradient.data) transpose_rows(s.rows, partner, s.column_partners + j * partner);
    if (p.partner_sum.data) split_rows(s.rows, partner, j, s.partner_rows);
  }
}

/// sums[r] += weights[r] times the columns that row r sees: those that the whole group sees together, then the others
/// row by row. A column that a row does not see is never multiplied, for it may hold NaN.
void add_seen(const float* weights, const float* panels, const Range (&seen)[kTileRows], float* sums, int64_t dim) {
  const Range common = {seen[kTileRows - 1].lo, larger(seen[0].hi, seen[kTileRows - 1].lo)};
  add_weighted_rows(weights + common.lo, panels + common.lo * kPanel, common.hi - common.lo, sums, dim, dim);
  for (int r = 0; r < kTileRows; ++r) {
    const float* row = weights + r * kTileColumns;
    const int64_t before = seen[r].lo, after = larger(common.hi, seen[r].lo);
    add_weighted_row(row + before, panels + before * kPanel, common.lo - before, sums + r * dim, dim);
    add_weighted_row(row + after, panels + after * kPanel, seen[r].hi - after, sums + r * dim, dim);
  }
}

/// kTileRows rows of the block, from its row r on, against the packed columns [first, first + count).
void visit_rows(const Pass& p, const Block& block, int64_t r, int64_t first, int64_t count, const Scratch& s) {
  const int64_t unit = padded(p.dim_unit), partner = padded(p.dim_partner);
  Range seen[kTileRows];
  for (int i = 0; i < kTileRows; ++i) {
    const Range range = seen_by(p, block.first + smaller(r + i, block.rows - 1));
    seen[i] = {larger(0, smaller(range.lo - first, count)), larger(0, smaller(range.hi - first, count))};
  }
  // Bounds grow with the row, so the first and the last row hold those of the group.
  const Range all = {seen[0].lo / kPanel * kPanel, round_up(seen[kTileRows - 1].hi, kPanel)};
  if (all.lo >= all.hi) return;
  const int64_t panel = r / kPanel * kPanel, lane = r % kPanel;
  product_of_panels(s.row_units + panel * unit + lane, s.column_units + all.lo * unit, p.dim_unit, unit,
                    s.cosines + all.lo, all.hi - all.lo);
  if (p.unit_gradient.data) {
    product_of_panels(s.row_partners + panel * partner + lane, s.column_partners + all.lo * partner, p.dim_partner,
                      partner, s.products + all.lo, all.hi - all.lo);
    to_coefficients(p, s.cosines, s.products, all);
    add_seen(s.products, s.unit_rows, seen, s.unit_sums + r * unit, unit);
  } else {
    to_weights(s.cosines, all, p.hash_bits);
  }
  if (p.partner_sum.data) add_seen(s.cosines, s.partner_rows, seen, s.partner_sums + r * partner, partner);
}

/// Writes partner_sum, and unit_gradient after the projection that undoes the normalisation.
void finish_rows(const Pass& p, const Block& block, const Scratch& s) {
  const int64_t unit = padded(p.dim_unit), partner = padded(p.dim_partner);
  const bool* keep = mask_of(p.row_mask, block.batch);
  if (p.partner_sum.data) {
    for (int64_t r = 0; r < block.rows; ++r) {
      float* sum = s.partner_sums + r * partner;
      if (keep && !keep[block.first + r]) memset(sum, 0, size_t(partner) * sizeof(float));
      store_row(p.partner_sum, block.batch, block.head, block.first + r, sum, p.dim_partner);
    }
  }
  if (!p.unit_gradient.data) return;
  Length lengths[kPanel];
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t i = r % kPanel;
    if (i == 0) {
      gather_rows(p.row_unit, block.batch, block.head, block.first + r, smaller(block.rows - r, kPanel), keep,
                  p.dim_unit, s.rows, unit);
      normalize_rows(s.rows, unit, lengths);
    }
    float* sum = s.unit_sums + r * unit;
    const float* row = s.rows + i * unit;
    if (lengths[i].significand == 0.0f) {
      memset(sum, 0, size_t(unit) * sizeof(float));
    } else {
      const F32 along = set(-dot(row, sum, unit));
      for (int64_t d = 0; d < unit; d += kLanes) store(sum + d, fma(along, load(row + d), load(sum + d)));
      divide_row(sum, unit, lengths[i].significand);
      scale_row_by_power(sum, unit, -lengths[i].exponent);
    }
    store_row(p.unit_gradient, block.batch, block.head, block.first + r, sum, p.dim_unit);
  }
}

/// All rows of the block against columns [first, end) of one head, as far as they fit a tile.
void visit_tile(const Pass& p, const Block& block, int64_t head, int64_t first, int64_t end, const Scratch& s) {
  const bool *keep_rows = mask_of(p.row_mask, block.batch), *keep = mask_of(p.column_mask, block.batch);
  const int64_t count = smaller(kTileColumns, p.columns - first);
  if (!any_kept(keep, first, count)) return;
  pack_columns(p, block.batch, head, first, count, s);
  for (int64_t r = 0; r < block.rows; r += kTileRows) {
    const int64_t next = first + kTileColumns + r / kTileRows;
    if (next < end) {
      prefetch_row(p.column_unit, block.batch, head, next, p.dim_unit);
      prefetch_row(p.column_partner, block.batch, head, next, p.dim_partner);
    }
    if (any_kept(keep_rows, block.first + r, smaller(kTileRows, block.rows - r)))
      visit_rows(p, block, r, first, count, s);
  }
}

void run_block(const Pass& p, const Block& block, const Scratch& s) {
  const int64_t groups = round_up(block.rows, kTileRows);
  if (p.unit_gradient.data) memset(s.unit_sums, 0, size_t(groups * padded(p.dim_unit)) * sizeof(float));
  if (p.partner_sum.data) memset(s.partner_sums, 0, size_t(groups * padded(p.dim_partner)) * sizeof(float));
  if (any_kept(mask_of(p.row_mask, block.batch), block.first, block.rows)) {
    pack_rows(p, block, s);
    const Range heads = column_heads_of(p, block.head);
    const int64_t begin = seen_by(p, block.first).lo / kTileColumns * kTileColumns;
    const int64_t end = seen_by(p, block.first + block.rows - 1).hi;
    for (int64_t head = heads.lo; head < heads.hi; ++head)
      for (int64_t first = begin; first < end; first += kTileColumns) visit_tile(p, block, head, first, end, s);
  }
  finish_rows(p, block, s);
}

// Packing a tile of columns costs what 30 rows cost. The results do not depend on the number of rows in a task.
constexpr int64_t kMostRows = 512;

struct Plan {
  Pass pass;
  int64_t block_rows, blocks, tasks, worker_bytes;
};

Plan plan(const Queue& queue, const Pass& p) {
  const int64_t rows = rows_per_task(queue.num_threads, p.batch * p.row_heads, p.rows, kMostRows);
  const int64_t blocks = (p.rows + rows - 1) / rows;
  Arena arena = {};
  lay_out(arena, p, rows);
  return {p, rows, blocks, p.batch * p.row_heads * blocks, arena.used};
}

void run_task(const Plan& plan, int64_t task, void* memory) {
  const Pass& p = plan.pass;
  const int64_t head = task / plan.blocks, index = task % plan.blocks;
  // The long rows of a causal pass first: queries from the end, keys from the start.
  const int64_t first = (p.rows_are_keys ? index : plan.blocks - 1 - index) * plan.block_rows;
  Arena arena = {static_cast<char*>(memory), 0};
  const Scratch s = lay_out(arena, p, plan.block_rows);
  run_block(p, {head / p.row_heads, head % p.row_heads, first, smaller(plan.block_rows, p.rows - first)}, s);
}

/// The tasks of one or two plans as one list, on no more threads than there are tasks.
struct Work {
  Queue queue;
  Plan first, second;
  int64_t worker_bytes;
};

Work work(const Queue& queue, const Plan& first, const Plan& second) {
  Work w = {queue, first, second, larger(first.worker_bytes, second.worker_bytes)};
  w.queue.num_threads = int32_t(smaller(queue.num_threads, first.tasks + second.tasks));
  return w;
}

int64_t bytes_for(const Work& w) { return with_alignment({nullptr, w.queue.num_threads * w.worker_bytes}); }

void run_work(const Work& w, void* workspace) {
  char* base = arena_at(workspace).base;
  core::parallel_for(w.queue, w.first.tasks + w.second.tasks, [&](int64_t task, int worker) {
    void* memory = base + worker * w.worker_bytes;
    const bool in_first = task < w.first.tasks;
    run_task(in_first ? w.first : w.second, in_first ? task : task - w.first.tasks, memory);
  });
}

Work forward_work(const Queue& queue, const Args& args) { return work(queue, plan(queue, forward_pass(args)), {}); }

Work backward_work(const Queue& queue, const Args& args) {
  return work(queue, plan(queue, key_pass(args)), plan(queue, query_pass(args)));
}

const char* supports(const Args& a) { return larger(a.dim_qk, a.dim_v) > kMaxHeadDim ? kTooWide : nullptr; }

int64_t workspace_bytes(const Queue& queue, const Args& args) { return bytes_for(forward_work(queue, args)); }

const char* run(const Queue& queue, const Args& args, void* workspace) {
  run_work(forward_work(queue, args), workspace);
  return nullptr;
}

int64_t workspace_bytes_bwd(const Queue& queue, const Args& args) { return bytes_for(backward_work(queue, args)); }

const char* run_bwd(const Queue& queue, const Args& args, void* workspace) {
  run_work(backward_work(queue, args), workspace);
  return nullptr;
}

}  // namespace

const Slot<CollisionAttentionArgs> collision_attention_slot = {supports, workspace_bytes, run};
const Slot<CollisionAttentionArgs> collision_attention_bwd_slot = {supports, workspace_bytes_bwd, run_bwd};

}  // namespace subquad::cpu::SUBQUAD_ISA
