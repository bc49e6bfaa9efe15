#include "core/parallel.h"
#include "cpu/sparse_dot.h"
#include "cpu/table.h"
#include "cpu/unit_row.h"

// The entries of a row are cut into pieces of kPiece, by their places in the row alone. A piece has sums of its own,
//
//   top = max_e x_e,   total = sum_e e^{x_e - top},   sums = sum_e e^{x_e - top} v_e,
//
// and those of the pieces are merged in order. So the same bits come out whether one thread visits all the pieces of a
// row or many share them.

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = SparseAttentionArgs;

// Query heads that read a row of keys together where they have the same entries.
constexpr int kMostHeads = 4;

/// What is known of one row of one head.
struct State {
  float top, total;  // total 0: no entry of weight above 0
  float* sums;       // [padded dim_v]
};

struct Scratch {
  EntryBuffer* entries;
  float* queries;  // [heads, depth]
  float* scores;   // [kMostHeads, kScorePitch]
  float* piece;    // [kMostHeads, width]: sums of a piece
  State* states;   // [heads]
  float* sums;     // [heads, width]
};

/// How the work is cut up. A unit is the heads of one item that are visited together: those of a group where they have
/// the same entries, else one.
struct Plan {
  int64_t heads, units;           // heads of a unit, and units
  int64_t depth, width;           // of queries and of sums in scratch
  int64_t rows_per_task, blocks;  // blocks of rows of a unit
  int64_t pieces;                 // the most a row may have where they are visited apart, else 0
};

int64_t most_entries(const Args& a) {
  const PatternArgs& p = a.pattern;
  if (p.form == PatternForm::indices) return p.slots;
  if (p.form == PatternForm::csr) return smaller(p.entries, a.seq_k);
  return smaller(a.seq_k, p.num_columns * smaller(p.block_cap, a.seq_k));
}

// Neighbouring rows often have keys in common, which are in the cache then.
constexpr int64_t kRowsPerTask = 32;
// Where there are fewer tasks than this, pieces are visited apart, if the memory for their results is not much.
constexpr int64_t kEnoughTasks = 64;
constexpr int64_t kMostPieceBytes = int64_t(16) << 20;

Plan make_plan(const Args& a) {
  Plan p = {};
  const bool shared = a.pattern.form == PatternForm::indices && a.pattern.heads <= a.heads_kv && a.heads_kv > 0;
  p.heads = shared ? a.heads_q / a.heads_kv : 1;
  p.units = p.heads > 0 ? a.batch * (a.heads_q / p.heads) : 0;
  p.depth = padded(a.dim), p.width = padded(a.dim_v);
  p.rows_per_task = kRowsPerTask;
  while (p.rows_per_task > 1 && p.units * ((a.seq_q + p.rows_per_task - 1) / p.rows_per_task) < kEnoughTasks)
    p.rows_per_task /= 2;
  p.blocks = (a.seq_q + p.rows_per_task - 1) / p.rows_per_task;
  const int64_t pieces = (most_entries(a) + kPiece - 1) / kPiece, rows = p.units * a.seq_q;
  if (rows >= kEnoughTasks || pieces <= 1) return p;
  const bool fits = rows * p.heads * pieces * p.width * int64_t(sizeof(float)) <= kMostPieceBytes;
  if (fits) p.pieces = pieces;
  return p;
}

Scratch lay_out(Arena& arena, const Plan& p) {
  Scratch s;
  s.entries = take<EntryBuffer>(arena, 1);
  s.queries = take<float>(arena, p.heads * p.depth);
  s.scores = take<float>(arena, kMostHeads * kScorePitch);
  s.piece = take<float>(arena, kMostHeads * p.width);
  s.states = take<State>(arena, p.heads);
  s.sums = take<float>(arena, p.heads * p.width);
  return s;
}

/// Row n of the heads of a unit.
struct Row {
  int64_t batch, head, head_kv, n;
  PatternRow entries;
  bool kept;
};

Row row_of(const Args& a, const Plan& p, int64_t unit, int64_t n) {
  const int64_t per_item = a.heads_q / p.heads, head = unit % per_item * p.heads;
  Row row = {unit / per_item, head, head / (a.heads_q / a.heads_kv), n, {}, true};
  if (const bool* keep = mask_of(a.query_mask, row.batch)) row.kept = keep[n];
  if (row.kept) row.entries = pattern_row(a.pattern, a.heads_q, a.seq_q, row.batch, row.head, n);
  return row;
}

/// Dot products to logits, with -inf behind the last; returns the largest, and 0 if there is none above -inf.
float to_logits(float* scores, const Entries& piece, float scale) {
  const int64_t end = round_up(piece.count, kLanes);
  F32 top = set(-kInfinity);
  for (int64_t i = 0; i < end; i += kLanes) {
    F32 x = load(scores + i) * set(scale);
    if (piece.log_weights) {
      const int64_t left = piece.count - i;
      x += left >= kLanes ? load(piece.log_weights + i) : load_part(piece.log_weights + i, left);
    }
    if (i + kLanes > piece.count) x = select(lanes_below(piece.count - i), x, set(-kInfinity));
    store(scores + i, x);
    top = max(x, top);
  }
  const float largest = reduce_max(top);
  return largest == -kInfinity ? 0.0f : largest;
}

/// Logits to weights e^{x - top}; returns their sum.
float to_weights(float* scores, int64_t count, float top) {
  constexpr int kUnit = 4;
  F32 total = {};
  int64_t i = 0;
  for (; i + kUnit * kLanes <= count; i += kUnit * kLanes) {
    F32 x[kUnit];
    for (int j = 0; j < kUnit; ++j) x[j] = load(scores + i + j * kLanes) - set(top);
    exp_shifted(x, F32{});
    for (int j = 0; j < kUnit; ++j) store(scores + i + j * kLanes, x[j]), total += x[j];
  }
  for (; i < count; i += kLanes) {
    const F32 x = exp(load(scores + i) - set(top));
    store(scores + i, x);
    total += x;
  }
  return reduce_add(total);
}

/// state = state merged with one more piece.
void merge(State& state, float top, float total, const float* sums, int64_t width) {
  if (total == 0.0f) return;
  if (state.total == 0.0f) {
    memcpy(state.sums, sums, size_t(width) * sizeof(float));
    state.top = top, state.total = total;
    return;
  }
  const float largest = top > state.top ? top : state.top;
  const float old_factor = exp(state.top - largest), new_factor = exp(top - largest);
  state.top = largest, state.total = state.total * old_factor + total * new_factor;
  for (int64_t e = 0; e < width; e += kLanes)
    store(state.sums + e, fma(load(sums + e), set(new_factor), load(state.sums + e) * set(old_factor)));
}

/// One piece for R heads of a unit; results are added to their states.
template <int R, class T>
void visit_piece(const Args& a, const Plan& p, const HeadRows<T>& k, const HeadRows<T>& v, const Entries& piece,
                 const float* queries, State* states, const Scratch& s) {
  visit_int<64, 128>(a.dim, [&](auto dim) {
    constexpr int kVectors = int(decltype(dim)::value) / kLanes;
    dot_piece<R, kVectors>(queries, p.depth, k, piece, s.scores);
  });
  float top[R], total[R];
  for (int r = 0; r < R; ++r) {
    top[r] = to_logits(s.scores + r * kScorePitch, piece, a.scale);
    total[r] = to_weights(s.scores + r * kScorePitch, piece.count, top[r]);
  }
  weigh_piece<R>(s.scores, v, piece, s.piece, p.width);
  for (int r = 0; r < R; ++r) merge(states[r], top[r], total[r], s.piece + r * p.width, a.dim_v);
}

/// One piece for all heads of a unit.
template <class T>
void visit_heads(const Args& a, const Plan& p, const Row& row, const Entries& piece, const Scratch& s) {
  if (piece.count == 0) return;
  const HeadRows<T> k = rows_of_head<T>(a.k, row.batch, row.head_kv, a.dim);
  const HeadRows<T> v = rows_of_head<T>(a.v, row.batch, row.head_kv, a.dim_v);
  int64_t h = 0;
  for (; h + 4 <= p.heads; h += 4) visit_piece<4>(a, p, k, v, piece, s.queries + h * p.depth, s.states + h, s);
  for (; h + 2 <= p.heads; h += 2) visit_piece<2>(a, p, k, v, piece, s.queries + h * p.depth, s.states + h, s);
  for (; h < p.heads; ++h) visit_piece<1>(a, p, k, v, piece, s.queries + h * p.depth, s.states + h, s);
}

/// Empty states, and the queries of a row as products read them.
template <class T>
void begin_row(const Args& a, const Plan& p, const Row& row, const Scratch& s) {
  for (int64_t h = 0; h < p.heads; ++h) {
    s.states[h] = {-kInfinity, 0.0f, s.sums + h * p.width};
    if (row.kept)
      widen_padded(rows_of_head<T>(a.q, row.batch, row.head + h, a.dim).at(row.n), s.queries + h * p.depth, a.dim);
  }
}

/// sums += weight context
template <class C>
void add_context(const C* context, float weight, float* sums, int64_t dim) {
  int64_t e = 0;
  for (; e + kLanes <= dim; e += kLanes) store(sums + e, fma(load(context + e), set(weight), load(sums + e)));
  if (e < dim) store(sums + e, fma(load_part(context + e, dim - e), set(weight), load(sums + e)));
}

/// out = m r sums / total + (1 - m) c and lse of one head.
void finish_head(const Args& a, const Row& row, int64_t head, const State& state) {
  const float *r = row_value(a.row_scale, row.batch, head, row.n), *m = row_value(a.mix, row.batch, head, row.n);
  const bool empty = state.total == 0.0f;
  if (empty) memset(state.sums, 0, size_t(padded(a.dim_v)) * sizeof(float));
  const float factor = (r ? *r : 1.0f) * (m ? *m : 1.0f);
  if (!empty) {
    for (int64_t e = 0; e < a.dim_v; e += kLanes)
      store(state.sums + e, load(state.sums + e) / set(state.total) * set(factor));
  }
  if (row.kept && a.context.data) {
    visit_float(a.context.dtype, [&](auto tag) {
      using C = decltype(tag);
      add_context(rows_of_head<C>(a.context, row.batch, head, a.dim_v).at(0) + row.n * a.context.stride[2], 1.0f - *m,
                  state.sums, a.dim_v);
    });
  }
  store_row(a.out, row.batch, head, row.n, state.sums, a.dim_v);
  if (a.lse.data)
    *row_value(a.lse, row.batch, head, row.n) = empty ? -kInfinity : log_length({state.total, 0}) + state.top;
}

/// Rows [first, end) of a unit.
template <class T>
void run_rows(const Args& a, const Plan& p, int64_t unit, int64_t first, int64_t end, const Scratch& s) {
  for (int64_t n = first; n < end; ++n) {
    const Row row = row_of(a, p, unit, n);
    begin_row<T>(a, p, row, s);
    Entries piece;
    for (RowCursor cursor = {}; next_piece(row.entries, cursor, *s.entries, piece);)
      visit_heads<T>(a, p, row, piece, s);
    for (int64_t h = 0; h < p.heads; ++h) finish_head(a, row, row.head + h, s.states[h]);
  }
}

/// One piece of a row, as the whole of what `s` holds.
template <class T>
void run_piece(const Args& a, const Plan& p, const Row& row, int64_t index, const Scratch& s) {
  begin_row<T>(a, p, row, s);
  RowCursor cursor = find_piece(row.entries, index);
  Entries piece;
  if (next_piece(row.entries, cursor, *s.entries, piece)) visit_heads<T>(a, p, row, piece, s);
}

const char* supports(const Args& a) { return larger(a.dim, a.dim_v) > kMaxHeadDim ? kTooWide : nullptr; }

int64_t worker_bytes(const Plan& p) {
  Arena arena = {};
  lay_out(arena, p);
  return arena.used;
}

/// The states of the pieces of all rows, [rows, pieces, heads].
struct Pieces {
  State* states;
  float* sums;
};

Pieces take_pieces(Arena& arena, const Args& a, const Plan& p) {
  const int64_t states = p.units * a.seq_q * p.pieces * p.heads;
  State* first = take<State>(arena, states);
  return {first, take<float>(arena, states * p.width)};
}

int64_t workspace_bytes(const Queue& queue, const Args& a) {
  const Plan p = make_plan(a);
  Arena arena = {};
  take_pieces(arena, a, p);
  return with_alignment({nullptr, arena.used + queue.num_threads * worker_bytes(p)});
}

Scratch scratch_of(const Arena& arena, const Plan& p, int worker) {
  Arena own = {arena.base + arena.used + worker * worker_bytes(p), 0};
  return lay_out(own, p);
}

/// All rows, their pieces on different threads.
template <class T>
void run_apart(const Queue& queue, const Args& a, const Plan& p, Arena arena) {
  const Pieces all = take_pieces(arena, a, p);
  const int64_t rows = p.units * a.seq_q;
  int64_t pieces = 1;
  for (int64_t row = 0; row < rows; ++row)
    pieces = larger(pieces, count_pieces(row_of(a, p, row / a.seq_q, row % a.seq_q).entries));
  core::parallel_for(queue, rows * pieces, [&](int64_t task, int worker) {
    Scratch s = scratch_of(arena, p, worker);
    s.states = all.states + task * p.heads, s.sums = all.sums + task * p.heads * p.width;
    const int64_t row = task / pieces;
    run_piece<T>(a, p, row_of(a, p, row / a.seq_q, row % a.seq_q), task % pieces, s);
  });
  core::parallel_for(queue, rows, [&](int64_t index, int worker) {
    const Scratch s = scratch_of(arena, p, worker);
    const Row row = row_of(a, p, index / a.seq_q, index % a.seq_q);
    for (int64_t h = 0; h < p.heads; ++h) {
      State whole = {-kInfinity, 0.0f, s.sums};
      for (int64_t i = 0; i < pieces; ++i) {
        const State& part = all.states[(index * pieces + i) * p.heads + h];
        merge(whole, part.top, part.total, part.sums, a.dim_v);
      }
      finish_head(a, row, row.head + h, whole);
    }
  });
}

const char* run(const Queue& queue, const Args& a, void* workspace) {
  const Plan p = make_plan(a);
  const Arena arena = arena_at(workspace);
  visit_float(a.q.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (p.pieces > 0) return run_apart<T>(queue, a, p, arena);
    core::parallel_for(queue, p.units * p.blocks, [&](int64_t task, int worker) {
      const int64_t first = task % p.blocks * p.rows_per_task;
      run_rows<T>(a, p, task / p.blocks, first, smaller(first + p.rows_per_task, a.seq_q),
                  scratch_of(arena, p, worker));
    });
  });
  return nullptr;
}

}  // namespace

const Slot<SparseAttentionArgs> sparse_attention_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
