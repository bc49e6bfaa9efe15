#include "core/parallel.h"
#include "cpu/landmarks.h"
#include "cpu/table.h"

// Both passes form t for kTileRows queries at a time, in place of their scores with the landmarks. The gradient through
// the softmax over the queries needs the column sums S_c = sum_n t_nc dt_nc before anything else, so the backward pass
// goes over the queries twice; forming t again costs less than storing it. Sums over the queries are formed per piece
// of fixed size, and added up in the order of the pieces.

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = MixtureWeightsArgs;

constexpr float kFloor = 1e-8f;
// Packing the landmarks costs what some 16 queries cost.
constexpr int64_t kMostRows = 512, kPieceRows = 256;
static_assert(kPieceRows % kTileColumns == 0);

struct Scratch {
  Landmarks landmarks;
  float *column_lse, *balance;  // [width], [R, width]
  float* panel;                 // queries [kPanel, pitch], transposed
  float* scores;                // of kTileRows or, backward, kTileColumns rows
  float* line;                  // [R, width]: a row of log_alpha or dlog_alpha
  float *own, *column_sums;     // backward: [width]
  float *row_panels, *dq;       // backward: [kTileColumns, pitch] as panels; [kTileRows, pitch]
};

int64_t repetitions(const Args& a) { return a.landmarks ? a.samples / a.landmarks : 0; }

Scratch lay_out(Arena& arena, const Args& a, bool backward) {
  const int64_t score_rows = backward ? kTileColumns : kTileRows;
  Scratch s = {};
  s.landmarks = lay_out_landmarks(arena, a.landmarks, a.dim, score_rows, backward);
  const int64_t width = s.landmarks.width, pitch = s.landmarks.pitch;
  s.column_lse = take<float>(arena, width);
  s.balance = take<float>(arena, repetitions(a) * width);
  s.panel = take<float>(arena, kPanel * pitch);
  s.scores = take<float>(arena, scores_size(s.landmarks, score_rows));
  s.line = take<float>(arena, repetitions(a) * width);
  if (!backward) return s;
  s.own = take<float>(arena, width);
  s.column_sums = take<float>(arena, width);
  s.row_panels = take<float>(arena, kTileColumns * round_up(pitch, kPanel));
  s.dq = take<float>(arena, kTileRows * pitch);
  return s;
}

/// A range of queries of one head.
struct Range {
  int64_t batch, head, first, rows;
};

const float* row_of(const Operand& x, int64_t b, int64_t h) {
  return static_cast<const float*>(x.data) + b * x.stride[0] + h * x.stride[1];
}

void pack_head(const Args& a, const Range& range, Scratch& s) {
  Landmarks& l = s.landmarks;
  find_existing(l, a.counts, range.batch);
  for (int64_t c = 0; c < l.count; c += kPanel) {
    gather_rows(a.q_bar, range.batch, range.head, c, smaller(kPanel, l.count - c), l.keep, l.dim, l.packing, l.pitch);
    pack_landmarks(l, c);
  }
  if (a.over_queries) memcpy(s.column_lse, row_of(a.column_lse, range.batch, range.head), size_t(l.count) * 4);
  const float* balance = row_of(a.balance, range.batch, range.head);
  for (int64_t i = 0; i < repetitions(a); ++i)
    memcpy(s.balance + i * l.width, balance + i * l.count, size_t(l.count) * 4);
}

/// Scores of one query to t, 0 where there is no landmark; returns the mean over the landmarks that exist.
inline float form_t(const Args& a, const Scratch& s, float* row) {
  const Landmarks& l = s.landmarks;
  const F32 scale = set(a.scale);
  F32 sum = {};
  if (a.over_queries) {
    for_each_vector(l, [&](int64_t at, int64_t c) {
      const F32 t = select(load(l.exists + c), exp(fma(load(row + at), scale, -load(s.column_lse + c))), F32{});
      store(row + at, t);
      sum += t;
    });
    return reduce_add(sum) / float(l.existing);
  }
  F32 largest = set(-kInfinity);
  for_each_vector(l, [&](int64_t at, int64_t c) {
    const F32 score = load(row + at) * scale;
    store(row + at, score);
    largest = max(select(load(l.exists + c), score, largest), largest);
  });
  const F32 shift = set(reduce_max(largest));
  for_each_vector(l, [&](int64_t at, int64_t c) {
    const F32 t = select(load(l.exists + c), exp(load(row + at) - shift), F32{});
    store(row + at, t);
    sum += t;
  });
  const F32 total = set(reduce_add(sum));
  for_each_vector(l, [&](int64_t at, int64_t) { store(row + at, load(row + at) / total); });
  return 1 / float(l.existing);
}

/// Packs up to kPanel queries of the range, from its query r on.
void pack_queries(const Args& a, const Range& range, int64_t r, const Scratch& s) {
  const bool* keep = mask_of(a.query_mask, range.batch);
  pack_transposed(a.q, range.batch, range.head, range.first + r, larger(0, smaller(kPanel, range.rows - r)),
                  keep ? keep + range.first + r : nullptr, a.dim, s.panel);
}

/// A row of t, and its mean, to a row of log_alpha.
void write_row(const Args& a, const Scratch& s, const float* row, float mean_t, float* log_alpha) {
  const Landmarks& l = s.landmarks;
  const F32 mean = set(mean_t), coeff = set(a.alpha_coeff), floor = set(kFloor);
  for (int64_t i = 0; i < repetitions(a); ++i) {
    const int64_t from = i * l.width;
    for_each_vector(l, [&](int64_t at, int64_t c) {
      const F32 alpha = fma(coeff, load(row + at) - mean, load(s.balance + from + c));
      store(s.line + from + c, select(load(l.exists + c), log(max(floor, alpha)), set(-kInfinity)));
    });
    memcpy(log_alpha + i * l.count, s.line + from, size_t(l.count) * sizeof(float));
  }
}

void run_rows(const Args& a, const Range& range, Scratch& s) {
  const bool* keep = mask_of(a.query_mask, range.batch);
  float* log_alpha = const_cast<float*>(row_of(a.log_alpha, range.batch, range.head));
  pack_head(a, range, s);
  for (int64_t r = 0; r < range.rows; r += kTileRows) {
    if (r % kPanel == 0) pack_queries(a, range, r, s);
    form_scores(s.landmarks, s.panel + r % kPanel, s.scores);
    // All rows of the group first, for the long chain of operations of one row to hide behind those of the others.
    float means[kTileRows];
    for (int i = 0; i < kTileRows; ++i) means[i] = form_t(a, s, s.scores + i * kTileColumns);
    for (int i = 0; i < smaller(kTileRows, range.rows - r); ++i) {
      float* to = log_alpha + (range.first + r + i) * a.log_alpha.stride[2];
      if (s.landmarks.existing && (!keep || keep[range.first + r + i])) {
        write_row(a, s, s.scores + i * kTileColumns, means[i], to);
      } else {
        for (int64_t j = 0; j < a.samples; ++j) to[j] = -kInfinity;
      }
    }
  }
}

/// Scores of one query to t, and `own` to dt_c; adds da to dbalance [R, width] where that is wanted.
void form_dt(const Args& a, const Scratch& s, const float* dlog_alpha, float* row, float* dbalance) {
  const Landmarks& l = s.landmarks;
  const F32 mean = set(form_t(a, s, row)), coeff = set(a.alpha_coeff), floor = set(kFloor);
  for (int64_t c = 0; c < l.width; c += kLanes) store(s.own + c, F32{});
  F32 total = {};
  for (int64_t i = 0; i < repetitions(a); ++i) {
    const int64_t from = i * l.width;
    memcpy(s.line + from, dlog_alpha + i * l.count, size_t(l.count) * sizeof(float));
    for_each_vector(l, [&](int64_t at, int64_t c) {
      const F32 alpha = fma(coeff, load(row + at) - mean, load(s.balance + from + c));
      const I32 counts = load(l.exists + c) & (alpha > floor);
      const F32 da = select(counts, load(s.line + from + c) / alpha, F32{});
      store(s.own + c, load(s.own + c) + da);
      total += da;
      if (dbalance) store(dbalance + from + c, load(dbalance + from + c) + da);
    });
  }
  const F32 mean_own = set(reduce_add(total) / float(l.existing));
  for_each_vector(l, [&](int64_t, int64_t c) {
    store(s.own + c, select(load(l.exists + c), coeff * (load(s.own + c) - mean_own), F32{}));
  });
}

/// Calls f(row of t) for the queries of the range that count, with dt in `own`, block by block of kTileColumns queries;
/// rows of other queries become zeros. Calls finish_group(r) behind the kTileRows queries from r on, and
/// finish_block(r) behind the block from r on.
template <class F, class G, class H>
void for_each_query(const Args& a, const Range& range, const Scratch& s, float* dbalance, F&& f, G&& finish_group,
                    H&& finish_block) {
  const Landmarks& l = s.landmarks;
  const bool* keep = mask_of(a.query_mask, range.batch);
  const float* dlog_alpha = row_of(a.dlog_alpha, range.batch, range.head);
  for (int64_t r = 0; r < round_up(range.rows, kTileColumns); ++r) {
    const int64_t in_block = r % kTileColumns;
    if (r % kPanel == 0) pack_queries(a, range, r, s);
    float* row = s.scores + in_block * kTileColumns;
    if (r % kTileRows == 0) form_scores(l, s.panel + r % kPanel, row);
    if (l.existing && r < range.rows && (!keep || keep[range.first + r])) {
      form_dt(a, s, dlog_alpha + (range.first + r) * a.dlog_alpha.stride[2], row, dbalance);
      f(row);
    } else {
      for_each_vector(l, [&](int64_t at, int64_t) { store(row + at, F32{}); });
    }
    if ((r + 1) % kTileRows == 0) finish_group(r + 1 - kTileRows);
    if ((r + 1) % kTileColumns == 0) finish_block(r + 1 - kTileColumns);
  }
}

/// column_sums [width] = sum_n t_nc dt_nc over the piece.
void sum_columns(const Args& a, const Range& piece, Scratch& s, float* column_sums) {
  const Landmarks& l = s.landmarks;
  pack_head(a, piece, s);
  for (int64_t c = 0; c < l.width; c += kLanes) store(column_sums + c, F32{});
  for_each_query(
      a, piece, s, nullptr,
      [&](const float* row) {
        for_each_vector(l, [&](int64_t at, int64_t c) {
          store(column_sums + c, fma(load(row + at), load(s.own + c), load(column_sums + c)));
        });
      },
      [](int64_t) {}, [](int64_t) {});
}

/// A row of t to s dlt.
void form_dlt(const Args& a, const Scratch& s, float* row) {
  const Landmarks& l = s.landmarks;
  const F32 scale = set(a.scale);
  F32 sum = {};
  if (!a.over_queries) {
    for_each_vector(l, [&](int64_t at, int64_t c) { sum = fma(load(row + at), load(s.own + c), sum); });
    sum = set(reduce_add(sum));
  }
  for_each_vector(l, [&](int64_t at, int64_t c) {
    const F32 shift = a.over_queries ? load(s.column_sums + c) : sum;
    store(row + at, load(row + at) * (load(s.own + c) - shift) * scale);
  });
}

/// dq of the piece, and its part of dq_bar [width, pitch] and dbalance [R, width].
void form_gradients(const Args& a, const Range& piece, Scratch& s, float* dq_bar, float* dbalance) {
  const Landmarks& l = s.landmarks;
  const bool* keep = mask_of(a.query_mask, piece.batch);
  pack_head(a, piece, s);
  memset(dq_bar, 0, size_t(l.width * l.pitch) * sizeof(float));
  memset(dbalance, 0, size_t(repetitions(a) * l.width) * sizeof(float));
  for_each_query(
      a, piece, s, dbalance, [&](float* row) { form_dlt(a, s, row); },
      [&](int64_t r) {
        memset(s.dq, 0, size_t(kTileRows * l.pitch) * sizeof(float));
        add_landmarks(l, s.scores + r % kTileColumns * kTileColumns, s.dq);
        for (int64_t i = 0; i < smaller(kTileRows, piece.rows - r); ++i)
          store_row(a.dq, piece.batch, piece.head, piece.first + r + i, s.dq + i * l.pitch, l.dim);
      },
      [&](int64_t r) {
        const int64_t first = piece.first + r, count = smaller(kTileColumns, piece.rows - r);
        pack_split(a.q, piece.batch, piece.head, first, count, keep ? keep + first : nullptr, l.dim, s.row_panels);
        add_rows_to_landmarks(l, s.scores, s.row_panels, count, dq_bar);
      });
}

struct Plan {
  Args args;
  Queue queue;
  int64_t heads, piece_rows, pieces, worker_bytes;  // pieces of the queries of a head
  bool backward;
};

Plan plan(const Queue& queue, const Args& a, bool backward) {
  Plan p = {a, queue, a.batch * a.heads, 0, 0, 0, backward};
  // With many landmarks long pieces, for the packing of the landmarks and the parts of dq_bar to stay small.
  p.piece_rows = backward ? larger(kPieceRows, 4 * round_up(a.landmarks, kTileColumns))
                          : rows_per_task(queue.num_threads, p.heads, a.seq, kMostRows);
  p.pieces = (a.seq + p.piece_rows - 1) / p.piece_rows;
  Arena arena = {};
  lay_out(arena, a, backward);
  p.worker_bytes = arena.used;
  p.queue.num_threads = int32_t(larger(1, smaller(queue.num_threads, p.heads * p.pieces)));
  return p;
}

/// Calls f(task, range, scratch) for each piece of each head.
template <class F>
void for_each_piece(const Plan& p, char* memory, F&& f) {
  core::parallel_for(p.queue, p.heads * p.pieces, [&](int64_t task, int worker) {
    Arena arena = {memory + worker * p.worker_bytes, 0};
    Scratch s = lay_out(arena, p.args, p.backward);
    const int64_t head = task / p.pieces, first = task % p.pieces * p.piece_rows;
    f(task, Range{head / p.args.heads, head % p.args.heads, first, smaller(p.piece_rows, p.args.seq - first)}, s);
  });
}

/// The parts of all pieces.
struct Parts {
  int64_t line, dq_bar_size;  // floats of a piece's dbalance and dq_bar
  float *column_sums, *dbalance, *dq_bar;
  char* memory;  // of the workers
};

Parts lay_out_parts(Arena& arena, const Plan& p) {
  Arena measure = {};
  const Landmarks l = lay_out_landmarks(measure, p.args.landmarks, p.args.dim, kTileColumns, true);
  const int64_t tasks = p.heads * p.pieces;
  Parts parts = {repetitions(p.args) * l.width, l.width * l.pitch, nullptr, nullptr, nullptr, nullptr};
  parts.column_sums = take<float>(arena, tasks * l.width);
  parts.dbalance = take<float>(arena, tasks * parts.line);
  parts.dq_bar = take<float>(arena, tasks * parts.dq_bar_size);
  parts.memory = take<char>(arena, p.queue.num_threads * p.worker_bytes);
  return parts;
}

/// sums[0..size) = the sum over the pieces of a head of their parts [size], in order.
void add_parts(const float* parts, int64_t pieces, int64_t size, float* sums) {
  for (int64_t i = 0; i < size; i += kLanes) {
    F32 sum = {};
    for (int64_t piece = 0; piece < pieces; ++piece) sum += load(parts + piece * size + i);
    store(sums + i, sum);
  }
}

/// dq_bar and dbalance of one head from the parts of its pieces.
void finish_head(const Plan& p, const Parts& parts, int64_t head, Scratch& s) {
  const Args& a = p.args;
  const Landmarks& l = s.landmarks;
  const int64_t b = head / a.heads, h = head % a.heads, size = parts.dq_bar_size;
  for (int64_t c = 0; c < l.count; ++c) {
    for (int64_t d = 0; d < l.pitch; d += kLanes) {
      F32 sum = {};
      const float* from = parts.dq_bar + head * p.pieces * size + c * l.pitch + d;
      for (int64_t piece = 0; piece < p.pieces; ++piece) sum += load(from + piece * size);
      store(s.dq + d, sum);
    }
    store_row(a.dq_bar, b, h, c, s.dq, l.dim);
  }
  add_parts(parts.dbalance + head * p.pieces * parts.line, p.pieces, parts.line, s.line);
  float* dbalance = const_cast<float*>(row_of(a.dbalance, b, h));
  for (int64_t i = 0; i < repetitions(a); ++i)
    memcpy(dbalance + i * l.count, s.line + i * l.width, size_t(l.count) * sizeof(float));
}

const char* supports(const Args& a) { return a.dim > kMaxHeadDim ? kTooWide : nullptr; }

int64_t workspace_bytes(const Queue& queue, const Args& args) {
  const Plan p = plan(queue, args, false);
  return with_alignment({nullptr, p.queue.num_threads * p.worker_bytes});
}

const char* run(const Queue& queue, const Args& args, void* workspace) {
  const Plan p = plan(queue, args, false);
  for_each_piece(p, arena_at(workspace).base,
                 [&](int64_t, const Range& range, Scratch& s) { run_rows(args, range, s); });
  return nullptr;
}

int64_t workspace_bytes_bwd(const Queue& queue, const Args& args) {
  Arena arena = {};
  lay_out_parts(arena, plan(queue, args, true));
  return with_alignment(arena);
}

const char* run_bwd(const Queue& queue, const Args& args, void* workspace) {
  const Plan p = plan(queue, args, true);
  Arena shared = arena_at(workspace);
  const Parts parts = lay_out_parts(shared, p);
  if (args.over_queries) {
    for_each_piece(p, parts.memory, [&](int64_t task, const Range& piece, Scratch& s) {
      sum_columns(args, piece, s, parts.column_sums + task * s.landmarks.width);
    });
  }
  for_each_piece(p, parts.memory, [&](int64_t task, const Range& piece, Scratch& s) {
    const int64_t width = s.landmarks.width, head = task / p.pieces;
    if (args.over_queries) add_parts(parts.column_sums + head * p.pieces * width, p.pieces, width, s.column_sums);
    form_gradients(args, piece, s, parts.dq_bar + task * parts.dq_bar_size, parts.dbalance + task * parts.line);
  });
  core::parallel_for(p.queue, p.heads, [&](int64_t head, int worker) {
    Arena arena = {parts.memory + worker * p.worker_bytes, 0};
    Scratch s = lay_out(arena, args, true);
    finish_head(p, parts, head, s);
  });
  return nullptr;
}

}  // namespace

const Slot<MixtureWeightsArgs> mixture_weights_slot = {supports, workspace_bytes, run};
const Slot<MixtureWeightsArgs> mixture_weights_bwd_slot = {supports, workspace_bytes_bwd, run_bwd};

}  // namespace subquad::cpu::SUBQUAD_ISA
