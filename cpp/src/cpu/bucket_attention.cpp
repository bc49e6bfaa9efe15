#include "core/parallel.h"
#include "core/visit.h"
#include "cpu/bucket_ranks.h"
#include "cpu/simd.h"
#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

// Forward and backward are one product: sources add their rows to a table of buckets per hash, targets sum up the rows
// of their buckets. Forward the sources are the keys of a kv head and the targets the queries of its group; backward
// the queries are the sources.

// Hashes that share a pass over the tokens. Their tables are interleaved, [bucket, hash, column]: one base address
// reaches them all, and the additions of one do not wait for those of another.
constexpr int kHashes = 4;
// Columns of a task: wide slices read the codes less often, narrow ones keep the tables of many buckets in the cache.
constexpr int kWide = 32, kNarrow = 16;
constexpr int64_t kWideBuckets = 1024;
// Query rows that a task holds at once. It bounds the scratch memory when many heads share a kv head.
constexpr int64_t kChunkRows = 32768;

struct Plan {
  int64_t group;              // query heads of a kv head
  int64_t chunk, chunks;      // query heads that a task takes at once, and how many times
  int64_t sources, targets;   // tokens of a kv head over all its heads
  int64_t packed, sums;       // rows that a task holds
  int64_t width, slices;      // of the columns
  int64_t buckets;            // of a table
  bool ranked;                // tables are indexed by the ranks of the codes instead of the codes
  int64_t pairs, pairs_once;  // (batch, kv head): all, and those whose ranks exist at the same time
};

Plan make_plan(const Queue& queue, const BucketAttentionArgs& a, bool backward) {
  Plan p = {};
  p.group = a.heads_kv ? a.heads_q / a.heads_kv : 0;
  p.chunk = larger(1, smaller(p.group, kChunkRows / larger(a.seq_q, 1)));
  // Without query heads there is still a gradient to fill with zeros.
  p.chunks = larger(1, (p.group + p.chunk - 1) / p.chunk);
  const int64_t queries = p.group * a.seq_q, chunk_queries = p.chunk * a.seq_q;
  p.sources = backward ? queries : a.seq_k;
  p.targets = backward ? a.seq_k : queries;
  p.packed = backward ? chunk_queries : a.seq_k;
  p.sums = backward ? a.seq_k : chunk_queries;
  // Clearing tables takes time for every bucket and column, ranking the codes for every token: as measured, 1 to 48.
  p.ranked = a.num_buckets * larger(a.dim_v, kNarrow) > 48 * (p.sources + p.targets);
  p.buckets = p.ranked ? p.sources + 1 : a.num_buckets;
  p.width = p.buckets <= kWideBuckets && a.dim_v > kNarrow ? kWide : kNarrow;
  p.slices = (a.dim_v + p.width - 1) / p.width;
  p.pairs = a.batch * a.heads_kv;
  p.pairs_once = p.ranked ? smaller(p.pairs, queue.num_threads) : p.pairs;
  return p;
}

struct Scratch {
  float* tables;     // [worker, bucket, hash, column]
  float* packed;     // [worker, source, column]
  float* sums;       // [worker, target, column]
  uint32_t* maps;    // [worker, entries of a map]
  int32_t* ranks;    // [pair, hash, sources and targets]
  uint32_t* counts;  // [pair, hash]: buckets that have sources
};

Scratch lay_out(Arena& arena, const Queue& queue, const BucketAttentionArgs& a, const Plan& p) {
  const int64_t workers = queue.num_threads, hashes = p.pairs_once * a.num_hashes;
  Scratch s = {};
  s.tables = take<float>(arena, workers * p.buckets * kHashes * p.width);
  s.packed = take<float>(arena, workers * p.packed * p.width);
  s.sums = take<float>(arena, workers * p.sums * p.width);
  if (!p.ranked) return s;
  s.maps = take<uint32_t>(arena, workers << rank_map_bits(p.sources));
  s.ranks = take<int32_t>(arena, hashes * (p.sources + p.targets));
  s.counts = take<uint32_t>(arena, hashes);
  return s;
}

// Rows of a slice

/// The tokens of a batch item that a mask keeps: only in [begin, end), and there those with keeps(t).
struct Kept {
  const bool* mask;
  int64_t begin, end;
  bool keeps(int64_t t) const { return !mask || mask[t]; }
};

Kept kept_tokens(const Operand& mask, int64_t b, int64_t tokens) {
  Kept kept = {nullptr, 0, tokens};
  if (!mask.data) return kept;
  kept.mask = static_cast<const bool*>(mask.data) + b * mask.stride[0];
  while (kept.begin < kept.end && !kept.mask[kept.end - 1]) --kept.end;
  while (kept.begin < kept.end && !kept.mask[kept.begin]) ++kept.begin;
  return kept;
}

/// Columns [first, first + count) of an array.
struct Slice {
  int64_t first, count;
};

/// Rows of one head, and the columns of a slice in them.
template <class T>
struct Rows {
  T* data;
  int64_t step, tokens;
  T* row(int64_t t) const { return data + t * step; }
  // Slices leave gaps between the pieces of rows, which the hardware's own prefetching does not bridge well.
  template <int Write>
  void prefetch(int64_t t, int64_t count) const {
    constexpr int64_t kAhead = 32, kLine = 64 / sizeof(T);
    for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(row(smaller(t + kAhead, tokens - 1)) + i, Write);
  }
};

template <class T>
Rows<T> rows_of(const Operand& x, int64_t b, int64_t head, int64_t tokens, Slice slice) {
  T* data = static_cast<T*>(x.data) + b * x.stride[0] + head * x.stride[1] + slice.first;
  return {data, x.stride[2], tokens};
}

/// Rows as float, zero behind the last column and for masked tokens: so a masked row may be added like any other.
template <int Width, class T>
void pack_rows(const Rows<T>& x, const Kept& kept, Slice slice, float* packed) {
  for (int64_t t = kept.begin; t < kept.end; ++t) {
    const T* from = x.row(t);
    float* to = packed + t * Width;
    x.template prefetch<0>(t, slice.count);
    if (slice.count == Width && kept.keeps(t)) {
      for (int i = 0; i < Width; i += kLanes) store(to + i, load(from + i));
    } else {
      std::memset(to, 0, Width * sizeof(float));
      if (kept.keeps(t)) widen(from, to, slice.count);
    }
  }
}

/// Rows = scale * sums, zero for masked tokens.
template <int Width, class T>
void write_rows(const float* sums, float scale, const Kept& kept, Slice slice, const Rows<T>& x) {
  for (int64_t t = 0; t < x.tokens; ++t) {
    T* to = x.row(t);
    x.template prefetch<1>(t, slice.count);
    if (t < kept.begin || t >= kept.end || !kept.keeps(t)) {
      std::memset(to, 0, size_t(slice.count) * sizeof(T));
      continue;
    }
    float row[Width];
    for (int i = 0; i < Width; i += kLanes) store(row + i, load(sums + t * Width + i) * set(scale));
    if (slice.count == Width)
      for (int i = 0; i < Width; i += kLanes) store(to + i, load(row + i));
    else
      narrow(row, to, slice.count);
  }
}

// Tables

/// Adds a source's row to its bucket of each hash. A read waits until it is known where the writes before it go, so the
/// buckets of all hashes are read before the first is written.
template <int Width, int Hashes, class Code>
inline void scatter(float* table, const Code* codes, int64_t hash_step, const float* row) {
  float* bucket[Hashes];
  for (int r = 0; r < Hashes; ++r) bucket[r] = table + int64_t(codes[r * hash_step]) * (Hashes * Width) + r * Width;
  for (int i = 0; i < Width; i += kLanes) {
    const F32 x = load(row + i);
    F32 sum[Hashes];
    for (int r = 0; r < Hashes; ++r) sum[r] = load(bucket[r] + i) + x;
    for (int r = 0; r < Hashes; ++r) store(bucket[r] + i, sum[r]);
  }
}

/// Adds a target's bucket of each hash to its row.
template <int Width, int Hashes, class Code>
inline void gather(const float* table, const Code* codes, int64_t hash_step, float* row) {
  F32 sum[Width / kLanes];
  for (int i = 0; i < Width; i += kLanes) sum[i / kLanes] = load(row + i);
  for (int r = 0; r < Hashes; ++r) {
    const float* bucket = table + int64_t(codes[r * hash_step]) * (Hashes * Width) + r * Width;
    for (int i = 0; i < Width; i += kLanes) sum[i / kLanes] += load(bucket + i);
  }
  for (int i = 0; i < Width; i += kLanes) store(row + i, sum[i / kLanes]);
}

/// A task: a slice of the columns of a (batch, kv head) pair.
template <class Code>
struct Task {
  Sides<Code> codes;
  Kept sources, targets;
  Slice slice;
  float *table, *packed, *sums;
  const uint32_t* counts;  // [R] buckets in use, or null: all
};

/// Every target sees every source. `hash` is the first of `Hashes`.
template <int Width, int Hashes, class Code>
void add_all(const Task<Code>& task, int64_t hash) {
  const CodeRows<Code>&s = task.codes.source, &t = task.codes.target;
  for (int64_t h = 0; h < s.heads; ++h) {
    const Code* codes = s.at(h, hash);
    const float* rows = task.packed + h * s.tokens * Width;
    for (int64_t i = task.sources.begin; i < task.sources.end; ++i)
      scatter<Width, Hashes>(task.table, codes + i, s.hash_step, rows + i * Width);
  }
  for (int64_t h = 0; h < t.heads; ++h) {
    const Code* codes = t.at(h, hash);
    float* rows = task.sums + h * t.tokens * Width;
    for (int64_t i = task.targets.begin; i < task.targets.end; ++i)
      gather<Width, Hashes>(task.table, codes + i, t.hash_step, rows + i * Width);
  }
}

/// Query n sees the keys m <= n + (M - N). Forward from the first token on, target i sees the first i + 1 + (M - N)
/// sources; backward from the last token on, it sees the first i + 1. A source is added just before they need it.
template <int Width, int Hashes, class Code>
void add_causal(const Task<Code>& task, int64_t hash, bool backward) {
  const CodeRows<Code>&s = task.codes.source, &t = task.codes.target;
  const auto in_order = [=](const Kept& kept, int64_t tokens) {
    return backward ? Kept{nullptr, tokens - kept.end, tokens - kept.begin} : kept;
  };
  const Kept sources = in_order(task.sources, s.tokens), targets = in_order(task.targets, t.tokens);
  const int64_t lead = backward ? 1 : 1 + s.tokens - t.tokens;
  int64_t added = sources.begin;
  for (int64_t i = targets.begin; i < targets.end; ++i) {
    for (; added < smaller(i + lead, sources.end); ++added) {
      const int64_t token = backward ? s.tokens - 1 - added : added;
      for (int64_t h = 0; h < s.heads; ++h)
        scatter<Width, Hashes>(task.table, s.at(h, hash) + token, s.hash_step,
                               task.packed + (h * s.tokens + token) * Width);
    }
    const int64_t token = backward ? t.tokens - 1 - i : i;
    for (int64_t h = 0; h < t.heads; ++h)
      gather<Width, Hashes>(task.table, t.at(h, hash) + token, t.hash_step, task.sums + (h * t.tokens + token) * Width);
  }
}

// Passes

struct Pass {
  const BucketAttentionArgs& args;
  bool backward;
  Plan plan;
  Scratch scratch;
};

/// Adds what the sources of `task` give to its targets by `Hashes` hashes.
template <int Width, int Hashes, class Code>
void add_hashes(const Pass& pass, const Task<Code>& task, int64_t hash) {
  int64_t buckets = task.counts ? 0 : pass.plan.buckets;
  for (int r = 0; task.counts && r < Hashes; ++r) buckets = larger(buckets, int64_t(task.counts[hash + r]) + 1);
  std::memset(task.table, 0, size_t(buckets) * Hashes * Width * sizeof(float));
  if (pass.args.causal)
    add_causal<Width, Hashes>(task, hash, pass.backward);
  else
    add_all<Width, Hashes>(task, hash);
}

/// The query heads of one chunk. Forward they are all that the task has to do, backward a part of its sources.
template <int Width, class Code>
void run_chunk(const Pass& pass, Task<Code> task, int64_t pair, int64_t chunk) {
  const BucketAttentionArgs& a = pass.args;
  const Plan& p = pass.plan;
  const int64_t b = pair / a.heads_kv, head_kv = pair % a.heads_kv, first = chunk * p.chunk;
  const int64_t source_head = pass.backward ? head_kv * p.group + first : head_kv;
  const int64_t target_head = pass.backward ? head_kv : head_kv * p.group + first;
  CodeRows<Code>&s = task.codes.source, &t = task.codes.target;
  CodeRows<Code>& queries = pass.backward ? s : t;
  queries.codes = queries.at(first, 0);
  queries.heads = smaller(p.chunk, p.group - first);
  for (int64_t h = 0; h < s.heads; ++h)
    visit_float(a.rows.dtype, [&](auto tag) {
      const auto rows = rows_of<decltype(tag)>(a.rows, b, source_head + h, s.tokens, task.slice);
      pack_rows<Width>(rows, task.sources, task.slice, task.packed + h * s.tokens * Width);
    });
  if (!pass.backward || chunk == 0) std::memset(task.sums, 0, size_t(t.heads * t.tokens * Width) * sizeof(float));
  int64_t hash = 0;
  for (; hash + kHashes <= a.num_hashes; hash += kHashes) add_hashes<Width, kHashes>(pass, task, hash);
  for (; hash < a.num_hashes; ++hash) add_hashes<Width, 1>(pass, task, hash);
  if (pass.backward && chunk + 1 < p.chunks) return;
  for (int64_t h = 0; h < t.heads; ++h)
    visit_float(a.out.dtype, [&](auto tag) {
      const auto rows = rows_of<decltype(tag)>(a.out, b, target_head + h, t.tokens, task.slice);
      write_rows<Width>(task.sums + h * t.tokens * Width, a.scale, task.targets, task.slice, rows);
    });
}

/// Part `index` of a pair: forward a slice of one chunk of query heads, backward a slice of all of them in turn.
template <class Code>
void run_task(const Pass& pass, const Sides<Code>& codes, const uint32_t* counts, int64_t pair, int64_t index,
              int worker) {
  const BucketAttentionArgs& a = pass.args;
  const Plan& p = pass.plan;
  const Scratch& scratch = pass.scratch;
  const int64_t b = pair / a.heads_kv, column = index % p.slices * p.width;
  const Kept keys = kept_tokens(a.key_mask, b, a.seq_k), queries = kept_tokens(a.query_mask, b, a.seq_q);
  const Task<Code> task = {codes,
                           pass.backward ? queries : keys,
                           pass.backward ? keys : queries,
                           {column, smaller(p.width, a.dim_v - column)},
                           scratch.tables + worker * p.buckets * kHashes * p.width,
                           scratch.packed + worker * p.packed * p.width,
                           scratch.sums + worker * p.sums * p.width,
                           counts};
  const int64_t begin = pass.backward ? 0 : index / p.slices, end = pass.backward ? p.chunks : begin + 1;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    if (task.slice.count > kNarrow)
      run_chunk<kWide>(pass, task, pair, chunk);
    else
      run_chunk<kNarrow>(pass, task, pair, chunk);
  }
}

template <class Code>
CodeRows<Code> code_rows(const Operand& codes, int64_t b, int64_t head, int64_t heads, int64_t tokens) {
  const Code* first = static_cast<const Code*>(codes.data) + b * codes.stride[0] + head * codes.stride[1];
  return {first, codes.stride[1], codes.stride[2], heads, tokens};
}

template <class Code>
Sides<Code> codes_of(const Pass& pass, int64_t pair) {
  const BucketAttentionArgs& a = pass.args;
  const int64_t b = pair / a.heads_kv, head_kv = pair % a.heads_kv, group = pass.plan.group;
  const CodeRows<Code> queries = code_rows<Code>(a.codes_q, b, head_kv * group, group, a.seq_q);
  const CodeRows<Code> keys = code_rows<Code>(a.codes_k, b, head_kv, 1, a.seq_k);
  return pass.backward ? Sides<Code>{queries, keys} : Sides<Code>{keys, queries};
}

/// The ranks of a pair, [R, sources and targets].
Sides<int32_t> ranks_of(const Pass& pass, int64_t slot) {
  const BucketAttentionArgs& a = pass.args;
  const Plan& p = pass.plan;
  const int64_t hash_step = p.sources + p.targets, group = p.group;
  const int32_t *source = pass.scratch.ranks + slot * a.num_hashes * hash_step, *target = source + p.sources;
  if (pass.backward) return {{source, a.seq_q, hash_step, group, a.seq_q}, {target, a.seq_k, hash_step, 1, a.seq_k}};
  return {{source, a.seq_k, hash_step, 1, a.seq_k}, {target, a.seq_q, hash_step, group, a.seq_q}};
}

template <class Code>
void run_ranked(const Queue& queue, const Pass& pass, int64_t tasks) {
  const Plan& p = pass.plan;
  const int64_t hashes = pass.args.num_hashes, map_bits = rank_map_bits(p.sources);
  for (int64_t first = 0; first < p.pairs; first += p.pairs_once) {
    const int64_t pairs = smaller(p.pairs_once, p.pairs - first);
    core::parallel_for(queue, pairs * hashes, [&](int64_t i, int worker) {
      int32_t* ranks = pass.scratch.ranks + i * (p.sources + p.targets);
      pass.scratch.counts[i] =
          rank_codes(codes_of<Code>(pass, first + i / hashes), i % hashes, ceil_log2(pass.args.num_buckets),
                     pass.scratch.maps + (int64_t(worker) << map_bits), ranks, ranks + p.sources);
    });
    core::parallel_for(queue, pairs * tasks, [&](int64_t i, int worker) {
      const int64_t slot = i / tasks;
      run_task(pass, ranks_of(pass, slot), pass.scratch.counts + slot * hashes, first + slot, i % tasks, worker);
    });
  }
}

template <class Code>
void run_codes(const Queue& queue, const Pass& pass) {
  const int64_t tasks = pass.plan.slices * (pass.backward ? 1 : pass.plan.chunks);
  if (pass.plan.ranked) return run_ranked<Code>(queue, pass, tasks);
  core::parallel_for(queue, pass.plan.pairs * tasks, [&](int64_t i, int worker) {
    run_task(pass, codes_of<Code>(pass, i / tasks), nullptr, i / tasks, i % tasks, worker);
  });
}

const char* supports(const BucketAttentionArgs& args) { return args.dim_v > kMaxHeadDim ? kTooWide : nullptr; }

template <bool Backward>
int64_t workspace_bytes(const Queue& queue, const BucketAttentionArgs& args) {
  Arena arena = {};
  lay_out(arena, queue, args, make_plan(queue, args, Backward));
  return with_alignment(arena);
}

template <bool Backward>
const char* run(const Queue& queue, const BucketAttentionArgs& args, void* workspace) {
  Arena arena = arena_at(workspace);
  const Plan plan = make_plan(queue, args, Backward);
  const Pass pass = {args, Backward, plan, lay_out(arena, queue, args, plan)};
  if (args.codes_q.dtype == DType::u16)
    run_codes<uint16_t>(queue, pass);
  else
    run_codes<int32_t>(queue, pass);
  return nullptr;
}

}  // namespace

const Slot<BucketAttentionArgs> bucket_attention_slot = {supports, workspace_bytes<false>, run<false>};
const Slot<BucketAttentionArgs> bucket_attention_bwd_slot = {supports, workspace_bytes<true>, run<true>};

}  // namespace subquad::cpu::SUBQUAD_ISA
