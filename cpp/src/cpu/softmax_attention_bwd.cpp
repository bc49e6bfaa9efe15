#include "core/parallel.h"
#include "cpu/softmax_gradient.h"
#include "cpu/table.h"

// Pairs are formed in tiles of kTile queries by kTile keys, and each tile is added to the gradients of its queries and
// of its keys:
//
//   x = s q k^T + bias,   p = e^(x - lse),   dx = p (dout v^T - delta),   delta = <dout, out> - dlse
//   dq += dx k,   dk += dx^T q,   dv += p^T dout
//
// A query adds up tiles in the order of the keys, a key in the order of heads and queries. So it does not change a bit
// whether one task owns all gradients of a head (5 products per tile) or, where there are too few heads for the
// threads, queries and keys are owned by tasks of their own (3 and 4 products).

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = SoftmaxAttentionArgs;
using Sweep = SoftmaxSweep;
using Wants = GradientWants;
using Scratch = GradientScratch;
using Tile = GradientTile;

// With head dimensions of 64, what is kept of a block of keys takes a third of a cache of 1 MiB.
constexpr int64_t kMostKeys = 256;
constexpr int64_t kMostQueries = 512;

/// What tasks share: per query, and per query head and key.
struct Shared {
  float* lse;           // [B, H, N]; infinity for queries that are masked or see nothing
  float* delta;         // [B, H, N]
  float* bias_sums[3];  // [B, H, M] of each sweep: sum_n dx; where dkey_bias is wanted
};

/// Queries and keys of one head of keys, and which of their gradients the task owns.
struct Task {
  int64_t batch, head_kv;
  Interval heads, queries, sweeps, keys;  // query heads; keys of each of the sweeps, as far as there are
  bool owns_queries, owns_keys;
};

Wants wants_of(const Args& a, const Sweep& sweep, const Task& task) {
  Wants w;
  w.dq = task.owns_queries && a.dq.data;
  w.dpair_bias = task.owns_queries && sweep.dpair_bias.data;
  w.dk = task.owns_keys && sweep.dk.data;
  w.dv = task.owns_keys && sweep.dv.data && a.dout.data;
  w.sums = task.owns_keys && (sweep.dkey_bias.data || (sweep.dk.data && sweep.key_norm_bias != 0));
  w.dx = w.dq || w.dpair_bias || w.dk || w.sums;
  return w;
}

Scratch lay_out(Arena& arena, const Args& a, int64_t keys, int64_t query_rows) {
  const int64_t unit = padded(a.dim_qk), partner = padded(a.dim_v);
  Scratch s;
  s.k_rows = take<float>(arena, keys * unit), s.k_panels = take<float>(arena, keys * unit);
  s.v_panels = take<float>(arena, keys * partner);
  s.squares = take<float>(arena, keys), s.bias = take<float>(arena, keys);
  s.dk = take<float>(arena, keys * unit), s.dv = take<float>(arena, keys * partner);
  s.sums = take<float>(arena, keys), s.head_sums = take<float>(arena, keys);
  s.seen_by = take<Interval>(arena, keys), s.k_finite = take<bool>(arena, keys / kTile);
  s.q_rows = take<float>(arena, kTile * unit), s.dout_rows = take<float>(arena, kTile * partner);
  s.lse = take<float>(arena, kTile), s.delta = take<float>(arena, kTile);
  s.seen = take<Interval>(arena, kTile);
  s.q_finite = take<bool>(arena, 1), s.dout_finite = take<bool>(arena, 1);
  s.p = take<float>(arena, kTile * kTile), s.dx = take<float>(arena, kTile * kTile);
  s.pair_bias = take<float>(arena, kTile);
  s.dq = take<float>(arena, query_rows * unit);
  return s;
}

/// Keys [first, first + count) of a sweep against the packed queries of a tile.
void visit_queries(const Tile& queries, int64_t first, int64_t count, float* dq) {
  const bool* keep = mask_of(queries.sweep.key_mask, queries.batch);
  const Interval* seen = queries.s.seen;
  for (int64_t at = 0; at < count; at += kTile) {
    Tile t = queries;
    t.key = first + at, t.keys = smaller(kTile, count - at), t.at = at;
    const Interval any = within({seen[0].lo, seen[round_up(t.queries, kTileRows) - 1].hi}, t.key, t.keys);
    if (any.lo >= any.hi || !any_kept(keep, t.key, t.keys)) continue;
    form_pairs(t);
    add_pairs(t, dq);
  }
}

/// Writes the gradients of keys [first, first + count) once all queries that see them were visited.
void store_keys(const Args& a, const Sweep& sweep, const Task& task, int64_t first, int64_t count, const Scratch& s) {
  const int64_t unit = padded(a.dim_qk), partner = padded(a.dim_v);
  for (int64_t j = 0; j < count; ++j) {
    float *dk = s.dk + j * unit, *dv = s.dv + j * partner;
    const float* k = s.k_rows + j * unit;
    if (const float along = 2 * sweep.key_norm_bias * s.sums[j]; along != 0)
      for (int64_t d = 0; d < unit; d += kLanes) store(dk + d, fma(set(along), load(k + d), load(dk + d)));
    if (sweep.dk.data) store_row(sweep.dk, task.batch, task.head_kv, first + j, dk, a.dim_qk);
    if (sweep.dv.data) store_row(sweep.dv, task.batch, task.head_kv, first + j, dv, a.dim_v);
  }
}

/// The queries of the task against keys [first, first + count) of a sweep.
void run_keys(const Args& a, int64_t index, const Task& task, int64_t first, int64_t count, const Shared& shared,
              const Scratch& s) {
  const Sweep& sweep = a.sweeps[index];
  const Wants wants = wants_of(a, sweep, task);
  const int64_t rows = round_up(task.queries.hi - task.queries.lo, kTile);
  const int64_t begin = rows_seeing(sweep.rule, first, a.seq_q).lo / kTile * kTile;
  const int64_t end = smaller(task.queries.hi, rows_seeing(sweep.rule, first + count - 1, a.seq_q).hi);
  pack_keys(a, sweep, task.batch, task.head_kv, first, count, s);
  clear(s.pair_bias, kTile);
  for (int64_t head = task.heads.lo; (wants.dx || wants.dv) && head < task.heads.hi; ++head) {
    add_key_bias(sweep, task.batch, head, first, count, s);
    for (int64_t query = larger(task.queries.lo, begin); query < end; query += kTile) {
      const int64_t queries = smaller(kTile, task.queries.hi - query);
      const int64_t row = (task.batch * a.heads_q + head) * a.seq_q + query;
      if (!pack_queries(a, sweep, shared.lse + row, shared.delta + row, task.batch, head, query, queries, s)) continue;
      visit_queries({a, sweep, s, wants, task.batch, head, query, queries, 0, 0, 0}, first, count,
                    s.dq + ((head - task.heads.lo) * rows + query - task.queries.lo) * padded(a.dim_qk));
    }
    if (!wants.sums) continue;
    for (int64_t j = 0; j < count; ++j) s.sums[j] += s.head_sums[j];
    if (sweep.dkey_bias.data)
      memcpy(shared.bias_sums[index] + (task.batch * a.heads_q + head) * sweep.seq_k + first, s.head_sums,
             size_t(count) * sizeof(float));
  }
  if (task.owns_keys) store_keys(a, sweep, task, first, count, s);
}

/// Zeros where tiles will not write, or not before they add.
void start_queries(const Args& a, const Task& task, const Scratch& s) {
  const int64_t rows = task.queries.hi - task.queries.lo, heads = task.heads.hi - task.heads.lo;
  clear(s.dq, heads * round_up(rows, kTile) * padded(a.dim_qk));
  for (int64_t i = task.sweeps.lo; i < task.sweeps.hi; ++i) {
    const Operand& bias = a.sweeps[i].dpair_bias;
    for (int64_t head = task.heads.lo; bias.data && head < task.heads.hi; ++head)
      for (int64_t n = task.queries.lo; n < task.queries.hi; ++n)
        clear(row_of_pairs(bias, task.batch, head, n, 0), a.sweeps[i].seq_k);
  }
}

/// Writes dq.
void store_queries(const Args& a, const Task& task, const Scratch& s) {
  const int64_t unit = padded(a.dim_qk), rows = round_up(task.queries.hi - task.queries.lo, kTile);
  for (int64_t head = task.heads.lo; a.dq.data && head < task.heads.hi; ++head) {
    for (int64_t n = task.queries.lo; n < task.queries.hi; ++n) {
      float* dq = s.dq + ((head - task.heads.lo) * rows + n - task.queries.lo) * unit;
      scale_row(dq, unit, a.scale);
      store_row(a.dq, task.batch, head, n, dq, a.dim_qk);
    }
  }
}

void run_task(const Args& a, const Task& task, int64_t key_rows, const Shared& shared, const Scratch& s) {
  if (task.owns_queries) start_queries(a, task, s);
  for (int64_t i = task.sweeps.lo; i < task.sweeps.hi; ++i) {
    const VisibleRule& rule = a.sweeps[i].rule;
    int64_t begin = task.keys.lo, end = smaller(task.keys.hi, a.sweeps[i].seq_k);
    // Keys that another task writes need not be packed where none of the queries sees them.
    if (!task.owns_keys) {
      begin = keys_seen(rule, task.queries.lo, end).lo / kTile * kTile;
      end = keys_seen(rule, task.queries.hi - 1, end).hi;
    }
    for (int64_t first = begin; first < end; first += key_rows)
      run_keys(a, i, task, first, smaller(key_rows, end - first), shared, s);
  }
  if (task.owns_queries) store_queries(a, task, s);
}

// The list of tasks

struct Plan {
  Queue queue;
  bool joint;  // a task owns a head of keys and its query heads, else queries or keys
  int64_t query_rows, query_blocks, query_tasks, key_rows, key_blocks[3], tasks, dq_rows, worker_bytes;
};

Plan plan(Queue queue, const Args& a) {
  bool query_side = a.dq.data, key_side = false;
  int64_t longest = 0;
  for (int i = 0; i < a.num_sweeps; ++i) {
    const Sweep& sweep = a.sweeps[i];
    query_side |= sweep.dpair_bias.data != nullptr;
    key_side |= sweep.dk.data || sweep.dv.data || sweep.dkey_bias.data;
    longest = larger(longest, sweep.seq_k);
  }
  Plan p = {};
  const int64_t heads = a.batch * a.heads_kv, threads = queue.num_threads;
  // 5 products per tile on as many threads as there are heads, or 7 on all threads.
  p.joint = query_side && key_side && (heads + threads - 1) / threads * threads * 5 <= heads * 7;
  p.key_rows = round_up(rows_per_task(p.joint ? 1 : queue.num_threads, heads, longest, kMostKeys), kTile);
  p.query_rows = round_up(rows_per_task(queue.num_threads, a.batch * a.heads_q, a.seq_q, kMostQueries), kTile);
  p.query_blocks = (a.seq_q + p.query_rows - 1) / p.query_rows;
  p.query_tasks = query_side ? a.batch * a.heads_q * p.query_blocks : 0;
  p.tasks = p.query_tasks;
  for (int i = 0; key_side && i < a.num_sweeps; ++i) {
    p.key_blocks[i] = (a.sweeps[i].seq_k + p.key_rows - 1) / p.key_rows;
    p.tasks += heads * p.key_blocks[i];
  }
  p.dq_rows = query_side ? p.query_rows : 0;
  if (p.joint) p.tasks = heads, p.dq_rows = heads > 0 ? a.heads_q / a.heads_kv * round_up(a.seq_q, kTile) : 0;
  p.queue = queue;
  p.queue.num_threads = int32_t(larger(1, smaller(threads, p.tasks)));
  Arena arena = {};
  lay_out(arena, a, p.key_rows, p.dq_rows);
  p.worker_bytes = arena.used;
  return p;
}

Task task_at(const Args& a, const Plan& p, int64_t index) {
  const int64_t group = a.heads_kv > 0 ? a.heads_q / a.heads_kv : 0;
  constexpr int64_t kEnd = INT64_MAX;
  if (p.joint) {
    const int64_t kv = index % a.heads_kv;
    return {
        index / a.heads_kv, kv, {kv * group, (kv + 1) * group}, {0, a.seq_q}, {0, a.num_sweeps}, {0, kEnd}, true, true};
  }
  if (index < p.query_tasks) {
    // Of causal queries the last see most, of keys the first are seen by most: they begin.
    const int64_t head = index / p.query_blocks, block = p.query_blocks - 1 - index % p.query_blocks;
    const int64_t first = block * p.query_rows, h = head % a.heads_q;
    return {head / a.heads_q,  h / group, {h, h + 1}, {first, smaller(first + p.query_rows, a.seq_q)},
            {0, a.num_sweeps}, {0, kEnd}, true,       false};
  }
  index -= p.query_tasks;
  int64_t sweep = 0;
  for (; index >= a.batch * a.heads_kv * p.key_blocks[sweep]; ++sweep)
    index -= a.batch * a.heads_kv * p.key_blocks[sweep];
  const int64_t head = index / p.key_blocks[sweep], first = index % p.key_blocks[sweep] * p.key_rows;
  const int64_t kv = head % a.heads_kv;
  return {head / a.heads_kv,
          kv,
          {kv * group, (kv + 1) * group},
          {0, a.seq_q},
          {sweep, sweep + 1},
          {first, first + p.key_rows},
          false,
          true};
}

/// <dout, out> of kPanel queries from `first` on, by the same chain of operations as <dout, v>: where one key has all
/// the weight, the two cancel exactly.
void multiply_out(const Args& a, int64_t batch, int64_t head, int64_t first, int64_t count, const Scratch& s,
                  float* products) {
  const int64_t partner = padded(a.dim_v);
  const bool* keep = mask_of(a.query_mask, batch);
  float *dout = s.dv, *out = s.v_panels;  // [partner, kPanel], free as yet
  gather_rows(a.dout, batch, head, first, count, keep, a.dim_v, s.dout_rows, partner);
  transpose_rows(s.dout_rows, partner, dout);
  gather_rows(a.out, batch, head, first, count, keep, a.dim_v, s.dout_rows, partner);
  transpose_rows(s.dout_rows, partner, out);
  for (int64_t r = 0; r < kPanel; r += kLanes) {
    F32 total = {};
    for (int64_t begin = 0; begin < a.dim_v; begin += kDepthPiece) {
      F32 sum = {};
      for (int64_t d = begin; d < smaller(begin + kDepthPiece, a.dim_v); ++d)
        sum = fma(load(dout + d * kPanel + r), load(out + d * kPanel + r), sum);
      total = begin == 0 ? sum : total + sum;
    }
    store(products + r, total);
  }
}

/// Queries [first, first + count) of one head: what all of their pairs share.
void start_rows(const Args& a, int64_t batch, int64_t head, int64_t first, int64_t count, const Shared& shared,
                const Scratch& s) {
  const bool* keep = mask_of(a.query_mask, batch);
  const int64_t row = (batch * a.heads_q + head) * a.seq_q + first;
  const float* lse = static_cast<const float*>(a.lse.data) + batch * a.lse.stride[0] + head * a.lse.stride[1] + first;
  const float* dlse = static_cast<const float*>(a.dlse.data);
  if (dlse) dlse += batch * a.dlse.stride[0] + head * a.dlse.stride[1] + first;
  float products[kPanel] = {};
  for (int64_t r = 0; r < count; ++r) {
    const int64_t i = r % kPanel;
    if (a.dout.data && i == 0) multiply_out(a, batch, head, first + r, smaller(kPanel, count - r), s, products);
    const bool live = (!keep || keep[first + r]) && lse[r] != -kInfinity;
    shared.lse[row + r] = live ? lse[r] : kInfinity;
    shared.delta[row + r] = !live ? 0.0f : dlse ? products[i] - dlse[r] : products[i];
  }
}

/// dkey_bias of one of its heads: the sums of the query heads that share it, in their order.
void add_bias_sums(const Args& a, const Sweep& sweep, const float* sums, int64_t batch, int64_t bias_head) {
  const Operand& to = sweep.dkey_bias;
  float* row = static_cast<float*>(to.data) + batch * to.stride[0] + bias_head * to.stride[1];
  clear(row, sweep.seq_k);
  const int64_t end = smaller((bias_head + 1) * sweep.bias_group, a.heads_q);
  for (int64_t head = bias_head * sweep.bias_group; head < end; ++head) {
    const float* from = sums + (batch * a.heads_q + head) * sweep.seq_k;
    for (int64_t m = 0; m < sweep.seq_k; ++m) row[m] += from[m];
  }
}

Shared lay_out_shared(Arena& arena, const Args& a) {
  const int64_t rows = a.batch * a.heads_q * a.seq_q;
  Shared s = {};
  s.lse = take<float>(arena, rows), s.delta = take<float>(arena, rows);
  for (int i = 0; i < a.num_sweeps; ++i)
    if (a.sweeps[i].dkey_bias.data) s.bias_sums[i] = take<float>(arena, a.batch * a.heads_q * a.sweeps[i].seq_k);
  return s;
}

const char* supports(const Args& a) { return larger(a.dim_qk, a.dim_v) > kMaxHeadDim ? kTooWide : nullptr; }

int64_t workspace_bytes(const Queue& queue, const Args& a) {
  const Plan p = plan(queue, a);
  Arena arena = {};
  lay_out_shared(arena, a);
  arena.used += p.queue.num_threads * p.worker_bytes;
  return with_alignment(arena);
}

const char* run(const Queue& queue, const Args& a, void* workspace) {
  const Plan p = plan(queue, a);
  Arena arena = arena_at(workspace);
  const Shared shared = lay_out_shared(arena, a);
  const auto scratch_of = [&](int worker) {
    Arena own = {arena.base + arena.used + worker * p.worker_bytes, 0};
    return lay_out(own, a, p.key_rows, p.dq_rows);
  };
  const int64_t tiles = (a.seq_q + kTile - 1) / kTile;
  if (p.tasks > 0)
    core::parallel_for(p.queue, a.batch * a.heads_q * tiles, [&](int64_t index, int worker) {
      const int64_t head = index / tiles, first = index % tiles * kTile;
      start_rows(a, head / a.heads_q, head % a.heads_q, first, smaller(kTile, a.seq_q - first), shared,
                 scratch_of(worker));
    });
  core::parallel_for(p.queue, p.tasks, [&](int64_t index, int worker) {
    run_task(a, task_at(a, p, index), p.key_rows, shared, scratch_of(worker));
  });
  for (int i = 0; i < a.num_sweeps; ++i) {
    const Sweep& sweep = a.sweeps[i];
    const int64_t heads = a.heads_q / sweep.bias_group;
    if (sweep.dkey_bias.data)
      core::parallel_for(p.queue, a.batch * heads, [&](int64_t index, int) {
        add_bias_sums(a, sweep, shared.bias_sums[i], index / heads, index % heads);
      });
  }
  return nullptr;
}

}  // namespace

const Slot<SoftmaxAttentionArgs> softmax_attention_bwd_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
