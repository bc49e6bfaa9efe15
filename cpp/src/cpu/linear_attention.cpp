#include "cpu/linear_scan.h"
#include "cpu/table.h"

// Causal: a task is a key head; it goes through the keys by chunks, and through the query rows that end in each chunk.
// Otherwise: pieces of the keys are summed on their own and then added up in order, and the rows of all queries follow.

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace linear;

void run_span(const Args& a, const Scan& s, const Keys& k, const Span& q, Rows& rows) {
  const Dims& d = s.d;
  meet(a, s, k, q, rows);
  sum_rows(d, s.state, s.chunk, k, q, rows);
  for (int64_t r = 0; r < q.count; ++r) {
    float* row = rows.sums + r * d.width;
    const float total = rows.total[r];
    if (!rows.live[r] || (a.normalize && total == 0))
      memset(row, 0, size_t(d.width) * sizeof(float));
    else if (a.normalize)
      divide_row(row, d.width, total);
    store_row(a.out, q.batch, q.head, q.first + r, row, d.dim_v);
  }
}

void store_state(const Args& a, const Dims& d, int64_t b, int64_t h, const State& s) {
  if (!a.new_s.data) return;
  float *to = state_row(a.new_s, b, h), *z = state_row(a.new_z, b, h);
  for (int64_t i = 0; i < d.features; ++i) {
    for (int64_t j = 0; j < d.dim_v; j += kPanel)
      memcpy(to + i * a.new_s.stride[2] + j, s.s + j * d.pitch + i * kPanel,
             size_t(smaller(kPanel, d.dim_v - j)) * sizeof(float));
    z[i] = s.z[i];
  }
  float* shift = has_shift(a) ? state_row(a.new_shift, b, h) : nullptr;
  for (int64_t i = 0; shift && i < d.features; ++i)
    shift[i] = s.shift[i] == kNever ? -kInfinity : float(s.shift[i] * kLn2);
}

/// Rows that come before the first key: they see the state that came in.
void run_early_rows(const Args& a, int64_t b, int64_t key_head, Scan& s) {
  const int64_t group = a.heads_q / a.heads_kv;
  const Keys none = no_keys(s.state);
  s.chunk.first_present = 0;
  for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
    for_each_span(b, head, 0, smaller(a.seq_q, a.seq_q - a.seq_k),
                  [&](const Span& q) { run_span(a, s, none, q, s.rows); });
}

void run_chunk(const Args& a, int64_t b, int64_t key_head, int64_t first, Scan& s) {
  open_chunk(a, b, key_head, first, s);
  const int64_t group = a.heads_q / a.heads_kv;
  for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
    const Span q = rows_of_chunk(a, b, head, s.chunk);
    if (q.count == 0) break;
    run_span(a, s, s.keys, q, s.rows);
    for (int64_t r = 0; r < q.count; ++r) {
      if (!needs_own_shifts(a, s, q, r)) continue;
      const Span own = span_alone(a, key_head, s, q, r);
      run_span(a, s, s.own_keys, own, s.own_rows);
    }
  }
  if (first + kChunk >= a.seq_k && !a.new_s.data) return;
  add_chunk(a, b, key_head, s);
}

void run_head(const Args& a, int64_t b, int64_t h, char* memory) {
  Arena arena = {memory, 0};
  Scan s = take_scan(arena, a);
  s.state = take_state(arena, s.d);
  load_state(a, s.d, b, h, s.state);
  run_early_rows(a, b, h, s);
  for (int64_t m = 0; m < a.seq_k && (a.seq_q > 0 || a.new_s.data); m += kChunk) run_chunk(a, b, h, m, s);
  store_state(a, s.d, b, h, s.state);
}

constexpr int64_t kTaskRows = 4 * kChunk;

struct Plan {
  int64_t blocks;  // of query rows of a head, where the pass is not causal
  int64_t states_bytes, worker_bytes;
  Queue queue;
};

Plan plan_of(const Queue& queue, const Args& a) {
  Plan p = {};
  const int64_t key_heads = a.batch * a.heads_kv, pieces = pieces_of(a.seq_k).count;
  p.blocks = (a.seq_q + kTaskRows - 1) / kTaskRows;
  const int64_t tasks = a.causal ? key_heads : larger(key_heads * pieces, a.batch * a.heads_q * p.blocks);
  p.queue = queue;
  p.queue.num_threads = int32_t(larger(1, smaller(queue.num_threads, tasks)));
  Arena scan = {};
  take_scan(scan, a);
  p.worker_bytes = scan.used + (a.causal ? state_bytes(a) : 0);
  p.states_bytes = a.causal ? 0 : key_heads * pieces * state_bytes(a);
  return p;
}

void run_causal(const Args& a, const Plan& p, char* memory) {
  core::parallel_for(p.queue, a.batch * a.heads_kv, [&](int64_t head, int worker) {
    run_head(a, head / a.heads_kv, head % a.heads_kv, memory + worker * p.worker_bytes);
  });
}

void run_everywhere(const Args& a, const Plan& p, char* base) {
  char* memory = base + p.states_bytes;
  sum_all_keys(p.queue, a, base, memory, p.worker_bytes);
  const int64_t group = larger(1, a.heads_q / larger(1, a.heads_kv)), pieces = pieces_of(a.seq_k).count;
  core::parallel_for(p.queue, a.batch * a.heads_q * p.blocks, [&](int64_t task, int worker) {
    const int64_t head = task / p.blocks, first = task % p.blocks * kTaskRows, b = head / a.heads_q;
    Arena arena = {memory + worker * p.worker_bytes, 0};
    Scan s = scan_of_state(a, state_at(a, base, head / group * pieces), arena);
    for_each_span(b, head % a.heads_q, first, smaller(a.seq_q, first + kTaskRows),
                  [&](const Span& q) { run_span(a, s, no_keys(s.state), q, s.rows); });
  });
}

const char* supports(const Args&) { return nullptr; }

int64_t workspace_bytes(const Queue& queue, const Args& a) {
  const Plan p = plan_of(queue, a);
  return with_alignment({nullptr, p.states_bytes + p.queue.num_threads * p.worker_bytes});
}

const char* run(const Queue& queue, const Args& a, void* workspace) {
  const Plan p = plan_of(queue, a);
  (a.causal ? run_causal : run_everywhere)(a, p, arena_at(workspace).base);
  return nullptr;
}

}  // namespace

const Slot<LinearAttentionArgs> linear_attention_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
