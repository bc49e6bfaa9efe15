#include "cpu/linear_trace.h"
#include "cpu/table.h"

// Causal: a task is a key head. It goes forward through the chunks as the forward pass does, for the gradients of the
// queries, and back with the sums over the later rows, for those of keys and values. Shifts and sums of weights of the
// way forward are kept; states are kept at some chunks and found again from there, if the gradient of a decay asks for
// them. Otherwise: the state, then the queries by pieces, which leave the sums over rows, then the keys.

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace linear;

int64_t row_index(const Args& a, const Task& t, const Span& q) {
  return (q.head - t.key_head * t.group) * a.seq_q + q.first;
}

/// Gradients of the queries of a span that has met its keys, and what of it is needed on the way back; `power` has gone
/// from the weight of the state.
void pull_span(const Args& a, Task& t, const Keys& k, const Span& q, Rows& rows, float power) {
  const int64_t at = row_index(a, t, q);
  settle_totals(a, q, rows);
  load_slopes(a, t.scan.d, q, rows.total, t.slopes);
  Slopes slopes = t.slopes;
  slopes.pairs = nullptr;
  float with_state[kChunk];
  pull_rows(a, t.scan, k, q, rows, slopes, with_state);
  memcpy(t.trace.total + at, rows.total, size_t(q.count) * sizeof(float));
  memcpy(t.trace.rho + at, t.slopes.rho, size_t(q.count) * sizeof(float));
  for (int64_t r = 0; r < q.count && q.seen > 0 && fades(a); ++r)
    t.trace.with_state[q.first + r + a.seq_k - a.seq_q] += without_power(set(with_state[r]), set(power))[0];
}

void pull_chunk(const Args& a, Task& t, const Span& q) {
  Scan& s = t.scan;
  meet(a, s, s.keys, q, s.rows);
  const int64_t at = row_index(a, t, q);
  if (t.trace.scores) memcpy(t.trace.scores + at * kChunk, s.rows.scores, size_t(q.count * kChunk) * sizeof(float));
  bool* alone = t.trace.alone + at;
  for (int64_t r = 0; r < q.count; ++r) alone[r] = needs_own_shifts(a, s, q, r);
  // Rows with shifts of their own take no part in this, and are done again.
  for (int64_t r = 0; r < q.count; ++r) s.rows.live[r] &= !alone[r];
  pull_span(a, t, s.keys, q, s.rows, 0);
  for (int64_t r = 0; r < q.count; ++r) {
    if (!alone[r]) continue;
    const Span own = span_alone(a, t.key_head, s, q, r);
    meet(a, s, s.own_keys, own, s.own_rows);
    pull_span(a, t, s.own_keys, own, s.own_rows, s.own_power);
  }
}

void turn_values(const Dims& d, const Chunk& c, Slopes& s) {
  turn(into_panels(c.values, kChunk), c.count, d.dim_v, into_panels(s.values_turned, d.width));
}

void go_forward(const Args& a, Task& t) {
  Scan& s = t.scan;
  s.chunk.first_present = 0;
  for (int64_t head = t.key_head * t.group; head < (t.key_head + 1) * t.group; ++head)
    for_each_span(t.batch, head, 0, smaller(a.seq_q, a.seq_q - a.seq_k), [&](const Span& q) {
      const Keys none = no_keys(s.state);
      meet(a, s, none, q, s.rows);
      pull_span(a, t, none, q, s.rows, 0);
    });
  for (int64_t i = 0; fades(a) && i < a.seq_k; ++i) t.trace.with_state[i] = 0;
  for (int64_t c = 0; c < t.chunks; ++c) {
    if (has_shift(a)) memcpy(t.trace.shifts + c * s.d.pitch, s.state.shift, size_t(s.d.pitch) * sizeof(float));
    if (fades(a) && c % t.stride == 0) keep_state(s.d, s.state, t.trace.far + c / t.stride * state_floats(s.d));
    t.trace.empty[c] = s.state.empty, t.trace.end_alone[c] = false;
    open_chunk(a, t.batch, t.key_head, c * kChunk, s);
    turn_values(s.d, s.chunk, t.slopes);
    for (int64_t head = t.key_head * t.group; head < (t.key_head + 1) * t.group; ++head) {
      const Span q = rows_of_chunk(a, t.batch, head, s.chunk);
      if (q.count > 0) pull_chunk(a, t, q);
    }
    if (c + 1 == t.chunks) break;
    t.trace.end_alone[c] = add_chunk(a, t.batch, t.key_head, s);
  }
}

/// The states before each chunk of the group of chunks that ends with c.
void find_states(const Args& a, Task& t, int64_t c) {
  Scan& s = t.scan;
  const int64_t first = c / t.stride * t.stride;
  bring_state(s.d, t.trace.far + c / t.stride * state_floats(s.d), s.state);
  for (int64_t i = first; i <= c; ++i) {
    keep_state(s.d, s.state, t.trace.near + (i - first) * state_floats(s.d));
    if (i == c) break;
    open_chunk(a, t.batch, t.key_head, i * kChunk, s);
    add_chunk(a, t.batch, t.key_head, s);
  }
}

/// Puts the scan before chunk c again, as far as the way back needs it.
void open_again(const Args& a, Task& t, int64_t c) {
  Scan& s = t.scan;
  if (fades(a)) {
    if (c + 1 == t.chunks || c % t.stride == t.stride - 1) find_states(a, t, c);
    bring_state(s.d, t.trace.near + c % t.stride * state_floats(s.d), s.state);
  } else {
    memset(s.state.z, 0, size_t(s.d.pitch) * sizeof(float));
    s.state.mass = 0, s.state.empty = t.trace.empty[c];
    if (has_shift(a)) memcpy(s.state.shift, t.trace.shifts + c * s.d.pitch, size_t(s.d.pitch) * sizeof(float));
  }
  open_chunk(a, t.batch, t.key_head, c * kChunk, s);
  turn_values(s.d, s.chunk, t.slopes);
  const int64_t last = s.chunk.count - 1;
  if (t.trace.end_alone[c])
    pack_own_keys(a, t.batch, t.key_head, s, s.chunk.count, s.chunk.link + last * kChunk, s.chunk.carry + last);
}

/// What follows the chunk, for its keys; factors for the way of `after` to before the chunk.
void start_chunk(const Args& a, Task& t, bool last, bool own) {
  Scan& s = t.scan;
  const Dims& d = s.d;
  const Keys& k = own ? s.own_keys : s.keys;
  const int64_t end = s.chunk.count - 1;
  const float* weights = own ? s.own_link : s.chunk.link ? s.chunk.link + end * kChunk : nullptr;
  const float carry = own ? s.own_link[kChunk] : s.chunk.link ? s.chunk.carry[end] : 1.0f;
  for (int64_t i = 0; i < d.pitch; i += kLanes) store(t.factors + i, load(k.scale + i) * carry);
  if (last) {
    memset(t.slopes.dphi, 0, size_t(kChunk * d.pitch) * sizeof(float));
    memset(t.slopes.dv, 0, size_t(kChunk * d.width) * sizeof(float));
  } else if (k.count > 0) {
    start_keys(a, d, s.chunk, k, weights, t.after, t.slopes);
  }
  if (fades(a)) pair_after(a, t, k, own ? s.own_power : 0);
  for (int64_t m = 0; weights && m < k.count; ++m) scale_row(t.slopes.dv + m * d.width, d.width, weights[m]);
  if (!own) return;
  turn(into_panels(t.slopes.dphi, d.pitch), d.pitch, round_up(k.count, kLanes), into_rows(t.slopes.extra, d.pitch));
  for (int64_t m = 0; m < k.count; ++m) finish_key(a, d, k, m, t.slopes.extra + m * d.pitch);
  memset(t.slopes.dphi, 0, size_t(kChunk * d.pitch) * sizeof(float));
}

/// The rows of one head that end in the chunk, for its keys and for the chunks before; returns whether some row has
/// shifts of its own.
bool push_chunk(const Args& a, Task& t, const Span& q, bool first_head, bool has_extra) {
  Scan& s = t.scan;
  const int64_t at = row_index(a, t, q);
  Rows rows = s.rows;
  if (t.trace.scores) {
    load_rows(a, s.d, s.keys, q, !s.state.empty, s.chunk.first_present, rows);
    rows.scores = t.trace.scores + at * kChunk;
  } else {
    meet(a, s, s.keys, q, rows);
  }
  bool any = false;
  float total[kChunk];
  for (int64_t r = 0; r < q.count; ++r) {
    total[r] = t.trace.alone[at + r] ? 0.0f : t.trace.total[at + r];
    any |= t.trace.alone[at + r];
  }
  load_slopes(a, s.d, q, total, t.slopes);
  for (int64_t r = 0; r < q.count; ++r) t.slopes.rho[r] = t.trace.alone[at + r] ? 0.0f : t.trace.rho[at + r];
  if (s.keys.count > 0) push_rows(s.d, s.keys, q, rows, t.slopes);
  add_slopes(s.d, s.keys.rescaled, q, rows, first_head ? t.factors : nullptr, s.keys.count > 0, t.slopes, t.after);
  if (any && !has_extra) memset(t.slopes.extra, 0, size_t(kChunk * s.d.pitch) * sizeof(float));
  for (int64_t r = 0; any && r < q.count; ++r) {
    if (!t.trace.alone[at + r]) continue;
    const Span own = span_alone(a, t.key_head, s, q, r);
    meet(a, s, s.own_keys, own, s.own_rows);
    load_slopes(a, s.d, own, t.trace.total + at + r, t.slopes);
    t.slopes.rho[0] = t.trace.rho[at + r];
    push_alone(a, s.d, s.chunk, s.own_keys, own, s.own_rows, t.slopes);
    add_slopes(s.d, s.own_keys.rescaled, own, s.own_rows, nullptr, false, t.slopes, t.after);
  }
  return any || has_extra;
}

void go_back(const Args& a, Task& t) {
  Scan& s = t.scan;
  clear_state(s.d, t.after);
  for (int64_t c = t.chunks - 1; c >= 0; --c) {
    open_again(a, t, c);
    bool has_extra = t.trace.end_alone[c], first = true;
    start_chunk(a, t, c + 1 == t.chunks, has_extra);
    for (int64_t head = t.key_head * t.group; head < (t.key_head + 1) * t.group; ++head) {
      const Span q = rows_of_chunk(a, t.batch, head, s.chunk);
      if (q.count == 0) break;
      has_extra = push_chunk(a, t, q, first, has_extra), first = false;
    }
    if (first) {
      // No row ends in this chunk, but the state passes through it.
      for (int64_t i = 0; i < s.d.pitch; ++i) {
        t.after.z[i] *= t.factors[i];
        for (int64_t j = 0; j < s.d.width; j += kPanel)
          scale_row(t.after.s + j * s.d.pitch + i * kPanel, kPanel, t.factors[i]);
      }
    }
    finish_keys(a, s.d, t.batch, t.key_head, s.chunk, s.keys, has_extra, t.slopes);
    if (fades(a)) finish_decays(a, t);
  }
}

void run_head(const Args& a, int64_t b, int64_t key_head, char* memory) {
  Arena arena = {memory, 0};
  Task t = take_task(arena, a);
  t.batch = b, t.key_head = key_head;
  load_state(a, t.scan.d, b, key_head, t.scan.state);
  go_forward(a, t);
  go_back(a, t);
}

struct Plan {
  int64_t states_bytes, worker_bytes;
  Queue queue;
};

/// The sums over rows of the pieces of each query head lie behind the states of the keys.
Plan plan_of(const Queue& queue, const Args& a) {
  Plan p = {};
  const int64_t key_heads = a.batch * a.heads_kv, key_pieces = pieces_of(a.seq_k).count;
  const int64_t row_pieces = larger(key_heads, a.batch * a.heads_q * pieces_of(a.seq_q).count);
  p.queue = queue;
  Arena worker = {};
  if (a.causal && key_heads > 0) {
    take_task(worker, a);
  } else if (!a.causal) {
    take_scan(worker, a), take_slopes(worker, dims_of(a), false);
    p.states_bytes = (key_heads * key_pieces + row_pieces) * state_bytes(a);
  }
  p.worker_bytes = worker.used;
  const int64_t blocks = key_heads * ((a.seq_k + kPiece - 1) / kPiece);
  const int64_t tasks = a.causal ? key_heads : larger(larger(key_heads * key_pieces, row_pieces), blocks);
  p.queue.num_threads = int32_t(larger(1, smaller(queue.num_threads, tasks)));
  return p;
}

/// The gradients of the queries of a piece, and its sums over rows.
void pull_piece(const Args& a, int64_t b, int64_t head, int64_t first, const State& state, State sum, char* memory) {
  Arena arena = {memory, 0};
  Scan s = scan_of_state(a, state, arena);
  Slopes slopes = take_slopes(arena, s.d, false);
  clear_state(s.d, sum);
  const Keys none = no_keys(s.state);
  for_each_span(b, head, first, smaller(a.seq_q, first + pieces_of(a.seq_q).length), [&](const Span& q) {
    meet(a, s, none, q, s.rows);
    settle_totals(a, q, s.rows);
    load_slopes(a, s.d, q, s.rows.total, slopes);
    pull_rows(a, s, none, q, s.rows, slopes, nullptr);
    add_slopes(s.d, false, q, s.rows, nullptr, false, slopes, sum);
  });
}

/// The gradients of kPiece keys.
void push_piece(const Args& a, int64_t b, int64_t h, int64_t first, const State& state, const State& after,
                char* memory) {
  Arena arena = {memory, 0};
  Scan s = scan_of_state(a, state, arena);
  Slopes slopes = take_slopes(arena, s.d, false);
  for (int64_t m = first; m < smaller(a.seq_k, first + kPiece); m += kChunk) {
    open_chunk(a, b, h, m, s);
    if (s.keys.count > 0) start_keys(a, s.d, s.chunk, s.keys, nullptr, after, slopes);
    finish_keys(a, s.d, b, h, s.chunk, s.keys, false, slopes);
  }
}

void run_everywhere(const Args& a, const Plan& p, char* base) {
  char* memory = base + p.states_bytes;
  sum_all_keys(p.queue, a, base, memory, p.worker_bytes);
  const Pieces keys = pieces_of(a.seq_k), rows = pieces_of(a.seq_q);
  const int64_t key_heads = a.batch * a.heads_kv, group = a.heads_q / larger(1, a.heads_kv);
  const int64_t sums_per_head = larger(1, group * rows.count);
  char* sums = base + key_heads * keys.count * state_bytes(a);
  core::parallel_for(p.queue, a.batch * a.heads_q * rows.count, [&](int64_t task, int worker) {
    const int64_t head = task / rows.count;
    pull_piece(a, head / a.heads_q, head % a.heads_q, task % rows.count * rows.length,
               state_at(a, base, head / group * keys.count), state_at(a, sums, task), memory + worker * p.worker_bytes);
  });
  core::parallel_for(p.queue, key_heads, [&](int64_t head, int) {
    State sum = state_at(a, sums, head * sums_per_head);
    if (group == 0) clear_state(dims_of(a), sum);
    for (int64_t i = 1; i < group * rows.count; ++i)
      add_state(dims_of(a), sum, state_at(a, sums, head * sums_per_head + i));
  });
  const int64_t blocks = (a.seq_k + kPiece - 1) / kPiece;
  core::parallel_for(p.queue, key_heads * blocks, [&](int64_t task, int worker) {
    const int64_t head = task / blocks;
    push_piece(a, head / a.heads_kv, head % a.heads_kv, task % blocks * kPiece, state_at(a, base, head * keys.count),
               state_at(a, sums, head * sums_per_head), memory + worker * p.worker_bytes);
  });
}

const char* supports(const Args&) { return nullptr; }

int64_t workspace_bytes(const Queue& queue, const Args& a) {
  const Plan p = plan_of(queue, a);
  return with_alignment({nullptr, p.states_bytes + p.queue.num_threads * p.worker_bytes});
}

const char* run(const Queue& queue, const Args& a, void* workspace) {
  const Plan p = plan_of(queue, a);
  char* base = arena_at(workspace).base;
  if (!a.causal) run_everywhere(a, p, base);
  core::parallel_for(p.queue, a.causal ? a.batch * a.heads_kv : 0, [&](int64_t head, int worker) {
    run_head(a, head / a.heads_kv, head % a.heads_kv, base + worker * p.worker_bytes);
  });
  return nullptr;
}

}  // namespace

const Slot<LinearAttentionArgs> linear_attention_bwd_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
