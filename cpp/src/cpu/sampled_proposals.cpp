#include "core/parallel.h"
#include "cpu/table.h"
#include "cpu/tile.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = SampledProposalsArgs;

/// Elements of a task: long enough to pay for waking a thread.
constexpr int64_t kTask = 32768;

// Rows are read in random order; asking this many ahead hides the way to the outer caches.
constexpr int64_t kAhead = 8;

template <class T>
const T* rows_of(const Operand& x, int64_t b, int64_t h) {
  return static_cast<const T*>(x.data) + b * x.stride[0] + h * x.stride[1];
}

/// w = q + k + noise_std noise.
template <class Q, class K>
void propose(const Q* q, const K* k, const float* noise, float noise_std, float* w, int64_t dim) {
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    const F32 mean = load(q + i) + load(k + i);
    store(w + i, noise ? fma(set(noise_std), load(noise + i), mean) : mean);
  }
  for (; i < dim; ++i) {
    const float mean = to_float(q[i]) + to_float(k[i]);
    w[i] = noise ? mean + noise_std * noise[i] : mean;
  }
}

/// Samples [first, end) of one row of indices.
template <class Q, class K>
void propose_rows(const Args& a, int64_t b, int64_t h, int64_t s, int64_t first, int64_t end) {
  const int64_t g = h / (a.heads_q / a.heads_kv);
  const Q* q = rows_of<Q>(a.q, b, h);
  const K* k = rows_of<K>(a.k, b, g);
  const int32_t* index = rows_of<int32_t>(a.indices, b, h) + s * a.sample_stride.indices;
  const float* noise = a.noise.data ? rows_of<float>(a.noise, b, h) + s * a.sample_stride.noise : nullptr;
  float* w = const_cast<float*>(rows_of<float>(a.w, b, h)) + s * a.sample_stride.w;
  for (int64_t n = first; n < end; ++n) {
    if (n + kAhead < end && index[n + kAhead] >= 0) prefetch_row(a.k, b, g, index[n + kAhead], a.dim);
    float* to = w + n * a.w.stride[2];
    if (index[n] < 0)
      memset(to, 0, size_t(a.dim) * sizeof(float));
    else
      propose(q + n * a.q.stride[2], k + index[n] * a.k.stride[2], noise ? noise + n * a.noise.stride[2] : nullptr,
              a.noise_std, to, a.dim);
  }
}

const char* run(const Queue& queue, const Args& a, void*) {
  const int64_t rows_a_task = 1 + kTask / (a.dim + 16), pieces = (a.seq_q + rows_a_task - 1) / rows_a_task;
  core::parallel_for(queue, a.batch * a.heads_q * a.samples * pieces, [&](int64_t task, int) {
    const int64_t row = task / pieces, s = row % a.samples, head = row / a.samples;
    const int64_t first = task % pieces * rows_a_task, end = smaller(first + rows_a_task, a.seq_q);
    visit_float(a.q.dtype, [&](auto q) {
      visit_float(a.k.dtype, [&](auto k) {
        propose_rows<decltype(q), decltype(k)>(a, head / a.heads_q, head % a.heads_q, s, first, end);
      });
    });
  });
  return nullptr;
}

/// The samples of each key of one head of keys: those of key m are entries[starts[m] .. starts[m + 1]), each
/// (h in the group, s, n) as one number, ascending.
struct Draws {
  int32_t* starts;   // [M + 1]
  int32_t* entries;  // [group S N]
};

Draws lay_out(Arena& arena, const Args& a, int64_t heads) {
  Draws d;
  d.starts = take<int32_t>(arena, heads * (a.seq_k + 1));
  d.entries = take<int32_t>(arena, heads * (a.heads_q / a.heads_kv) * a.samples * a.seq_q);
  return d;
}

Draws draws_of(const Draws& all, const Args& a, int64_t head) {
  return {all.starts + head * (a.seq_k + 1), all.entries + head * (a.heads_q / a.heads_kv) * a.samples * a.seq_q};
}

/// Calls f(index, entry) from the last entry to the first, without those that drew no key.
template <class F>
void for_each_draw_backwards(const Args& a, int64_t b, int64_t g, F&& f) {
  const int64_t group = a.heads_q / a.heads_kv;
  for (int64_t row = group * a.samples - 1; row >= 0; --row) {
    const int32_t* index =
        rows_of<int32_t>(a.indices, b, g * group + row / a.samples) + row % a.samples * a.sample_stride.indices;
    for (int64_t n = a.seq_q - 1; n >= 0; --n)
      if (index[n] >= 0) f(index[n], int32_t(row * a.seq_q + n));
  }
}

void sort_draws(const Args& a, int64_t b, int64_t g, const Draws& d) {
  memset(d.starts, 0, size_t(a.seq_k + 1) * sizeof(int32_t));
  for_each_draw_backwards(a, b, g, [&](int32_t key, int32_t) { ++d.starts[key]; });
  for (int64_t m = 1; m <= a.seq_k; ++m) d.starts[m] += d.starts[m - 1];
  // The sums are where the entries of a key end; filling from the back moves each to where they begin.
  for_each_draw_backwards(a, b, g, [&](int32_t key, int32_t entry) { d.entries[--d.starts[key]] = entry; });
}

/// sum += factor x.
template <class T>
void add_scaled(const T* x, float factor, float* sum, int64_t dim) {
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) store(sum + i, fma(set(factor), load(x + i), load(sum + i)));
  for (; i < dim; ++i) sum[i] += factor * to_float(x[i]);
}

/// sum += dw of sample (s, n) + scale score x[row], x being the other side of the pair.
void add_sample(const Args& a, int64_t b, int64_t h, int64_t s, int64_t n, const Operand& x, int64_t x_head,
                int64_t row, float* sum) {
  const float* dw = rows_of<float>(a.dw, b, h) + s * a.sample_stride.dw + n * a.dw.stride[2];
  add_scaled(dw, 1.0f, sum, a.dim);
  if (!a.score.data) return;
  const float score = rows_of<float>(a.score, b, h)[s * a.sample_stride.score + n * a.score.stride[2]];
  visit_float(x.dtype, [&](auto tag) {
    add_scaled(rows_of<decltype(tag)>(x, b, x_head) + row * x.stride[2], a.scale * score, sum, a.dim);
  });
}

void query_gradients(const Args& a, int64_t b, int64_t h, int64_t first, int64_t end) {
  const int64_t g = h / (a.heads_q / a.heads_kv);
  const int32_t* index = rows_of<int32_t>(a.indices, b, h);
  for (int64_t n = first; n < end; ++n) {
    alignas(64) float sum[kMaxHeadDim];
    memset(sum, 0, size_t(a.dim) * sizeof(float));
    for (int64_t s = 0; s < a.samples; ++s) {
      const int32_t key = index[s * a.sample_stride.indices + n];
      const int32_t ahead = n + kAhead < end ? index[s * a.sample_stride.indices + n + kAhead] : -1;
      if (ahead >= 0 && a.score.data) prefetch_row(a.k, b, g, ahead, a.dim);
      if (key >= 0) add_sample(a, b, h, s, n, a.k, g, key, sum);
    }
    store_row(a.dq, b, h, n, sum, a.dim);
  }
}

struct Sample {
  int64_t h, s, n;
};

Sample sample_of(const Args& a, int64_t g, int32_t entry) {
  // Divisions of 32 bits take a third of the time of those of 64.
  const uint32_t seq = uint32_t(a.seq_q), samples = uint32_t(a.samples), row = uint32_t(entry) / seq;
  return {g * (a.heads_q / a.heads_kv) + row / samples, row % samples, uint32_t(entry) % seq};
}

/// Inlined by force, as prefetch is.
__attribute__((always_inline)) inline void prefetch_sample(const Args& a, int64_t b, const Sample& x) {
  Operand dw = a.dw;
  dw.data = const_cast<float*>(rows_of<float>(a.dw, b, x.h)) + x.s * a.sample_stride.dw;
  prefetch_row(dw, 0, 0, x.n, a.dim);
  if (a.score.data) prefetch_row(a.q, b, x.h, x.n, a.dim);
}

void key_gradients(const Args& a, int64_t b, int64_t g, int64_t first, int64_t end, const Draws& d) {
  for (int64_t m = first; m < end; ++m) {
    alignas(64) float sum[kMaxHeadDim];
    memset(sum, 0, size_t(a.dim) * sizeof(float));
    for (int32_t i = d.starts[m]; i < d.starts[m + 1]; ++i) {
      if (i + kAhead < d.starts[end]) prefetch_sample(a, b, sample_of(a, g, d.entries[i + kAhead]));
      const Sample x = sample_of(a, g, d.entries[i]);
      add_sample(a, b, x.h, x.s, x.n, a.q, x.h, x.n, sum);
    }
    store_row(a.dk, b, g, m, sum, a.dim);
  }
}

const char* run_bwd(const Queue& queue, const Args& a, void* workspace) {
  const int64_t heads = a.batch * a.heads_kv;
  Arena arena = arena_at(workspace);
  const Draws all = lay_out(arena, a, heads);
  core::parallel_for(queue, heads, [&](int64_t head, int) {
    sort_draws(a, head / a.heads_kv, head % a.heads_kv, draws_of(all, a, head));
  });
  const int64_t rows_a_task = 1 + kTask / (a.dim + 16);
  const int64_t query_pieces = (a.seq_q + rows_a_task - 1) / rows_a_task;
  const int64_t key_pieces = (a.seq_k + rows_a_task - 1) / rows_a_task;
  const int64_t key_tasks = heads * key_pieces;
  core::parallel_for(queue, key_tasks + a.batch * a.heads_q * query_pieces, [&](int64_t task, int) {
    const bool keys = task < key_tasks;
    const int64_t pieces = keys ? key_pieces : query_pieces, of_batch = keys ? a.heads_kv : a.heads_q;
    const int64_t index = keys ? task : task - key_tasks, head = index / pieces;
    const int64_t b = head / of_batch, h = head % of_batch, first = index % pieces * rows_a_task;
    if (keys)
      key_gradients(a, b, h, first, smaller(first + rows_a_task, a.seq_k), draws_of(all, a, head));
    else
      query_gradients(a, b, h, first, smaller(first + rows_a_task, a.seq_q));
  });
  return nullptr;
}

const char* supports(const Args& a) { return a.dim > kMaxHeadDim ? kTooWide : nullptr; }

const char* supports_bwd(const Args& a) {
  const bool many = a.heads_q / a.heads_kv * a.samples * a.seq_q > INT32_MAX || a.seq_k > INT32_MAX;
  return many ? "more than 2^31 - 1 keys or samples of one head" : supports(a);
}

int64_t workspace_bytes(const Queue&, const Args&) { return 0; }

int64_t workspace_bytes_bwd(const Queue&, const Args& a) {
  Arena arena = {};
  lay_out(arena, a, a.batch * a.heads_kv);
  return with_alignment(arena);
}

}  // namespace

const Slot<SampledProposalsArgs> sampled_proposals_slot = {supports, workspace_bytes, run};
const Slot<SampledProposalsArgs> sampled_proposals_bwd_slot = {supports_bwd, workspace_bytes_bwd, run_bwd};

}  // namespace subquad::cpu::SUBQUAD_ISA
