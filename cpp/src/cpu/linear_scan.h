/// How the passes of linear_attention are cut: one scan per key head, or pieces of the keys summed on their own.
#pragma once
#include "core/parallel.h"
#include "cpu/linear_rows.h"

namespace subquad::cpu::SUBQUAD_ISA::linear {

static inline float* state_row(const Operand& x, int64_t b, int64_t h) {
  return static_cast<float*>(x.data) + b * x.stride[0] + h * x.stride[1];
}

/// Shifts of our own are whole powers of two, up to the rounding of their logarithm; what another one has beyond the
/// nearest of these goes into the sums.
static inline void absorb_rest(const Dims& d, int64_t i, float exponent, State& s) {
  const float rest = exponent - s.shift[i], magnitude = exponent < 0 ? -exponent : exponent;
  if ((rest < 0 ? -rest : rest) <= magnitude * 0x1p-22f) return;
  const float factor = exp(rest * 0.693147181f);
  s.z[i] *= factor;
  for (int64_t j = 0; j < d.dim_v; j += kPanel) scale_row(s.s + j * d.pitch + i * kPanel, kPanel, factor);
}

/// The state that came in, or none.
static inline void load_state(const Args& a, const Dims& d, int64_t b, int64_t h, State& s) {
  clear_state(d, s);
  if (!a.s.data) return;
  s.empty = false;
  const float *from = state_row(a.s, b, h), *z = state_row(a.z, b, h);
  for (int64_t i = 0; i < d.features; ++i) {
    for (int64_t j = 0; j < d.dim_v; j += kPanel)
      memcpy(s.s + j * d.pitch + i * kPanel, from + i * a.s.stride[2] + j,
             size_t(smaller(kPanel, d.dim_v - j)) * sizeof(float));
    s.z[i] = z[i];
  }
  if (!has_shift(a)) return;
  const float* shift = state_row(a.shift, b, h);
  for (int64_t i = 0; i < d.features; ++i) {
    const bool any = shift[i] >= -2 * kLargest;
    s.shift[i] = any ? round_to_integer(set(shift[i] * kLog2E))[0] : kNever;
    if (!any) continue;
    absorb_rest(d, i, shift[i] * kLog2E, s);
    s.mass = 1;
  }
  for (int64_t i = d.features; i < d.pitch; ++i) s.shift[i] = a.log_features ? kNever : s.shift[0];
}

/// The rows of one query head whose last key lies in the chunk.
static inline Span rows_of_chunk(const Args& a, int64_t b, int64_t head, const Chunk& c) {
  const int64_t offset = a.seq_k - a.seq_q, lo = larger(0, c.first - offset);
  const int64_t hi = larger(lo, smaller(a.seq_q, c.first + c.count - offset)), t = lo + offset - c.first;
  const bool links = c.link && hi > lo;
  return {b, head, lo, hi - lo, t + 1, true, links ? c.link + t * kChunk : nullptr, links ? c.carry + t : nullptr};
}

/// Packs the chunk of keys from `first` on.
static inline void open_chunk(const Args& a, int64_t b, int64_t key_head, int64_t first, Scan& s) {
  load_chunk(a, s.d, b, key_head, first, s.chunk);
  const bool any = s.chunk.first_present < s.chunk.count;
  pack_keys(a, s.d, b, key_head, s.chunk, any ? s.chunk.count : 0, s.state, s.state.shift, nullptr, s.keys);
  if (a.weighted && a.causal) sum_masses(s, s.mass);
}

// Enough tokens for a task to outweigh its state; at most kMostPieces states per head. The pieces depend on the number
// of tokens only, so that the bits do not depend on the number of threads.
static constexpr int64_t kPiece = 1024, kMostPieces = 16;

struct Pieces {
  int64_t length, count;
};

static inline Pieces pieces_of(int64_t tokens) {
  const int64_t length = larger(kPiece, round_up((tokens + kMostPieces - 1) / kMostPieces, kChunk));
  return {length, larger(1, (tokens + length - 1) / length)};
}

static inline int64_t state_bytes(const Args& a) {
  Arena arena = {};
  take_state(arena, dims_of(a));
  return arena.used;
}

static inline State state_at(const Args& a, char* states, int64_t index) {
  Arena arena = {states + index * state_bytes(a), 0};
  return take_state(arena, dims_of(a));
}

/// The state of keys [first, end) alone.
static inline void sum_piece(const Args& a, int64_t b, int64_t h, int64_t first, int64_t end, State& state,
                             void* memory) {
  Arena arena = {static_cast<char*>(memory), 0};
  Scan s = take_scan(arena, a);
  s.state = state;
  clear_state(s.d, s.state);
  for (int64_t m = first; m < end; m += kChunk) {
    if (!any_kept(mask_of(a.key_mask, b), m, smaller(kChunk, end - m))) continue;
    load_chunk(a, s.d, b, h, m, s.chunk);
    pack_keys(a, s.d, b, h, s.chunk, s.chunk.count, s.state, s.state.shift, nullptr, s.keys);
    add_chunk(a, b, h, s);
  }
  // Told by a shift that no key can have, for the flag does not outlive the task.
  s.state.shift[0] = s.state.empty ? 2 * kNever : s.state.shift[0];
}

static inline bool is_empty(const State& s) { return s.shift[0] == 2 * kNever; }

/// sum += part
static inline void add_state(const Dims& d, State& sum, const State& part) {
  for (int64_t i = 0; i < d.pitch; ++i) {
    const float top = sum.shift[i] > part.shift[i] ? sum.shift[i] : part.shift[i];
    const F32 own = scale_by_power(set(1.0f), set(sum.shift[i] - top));
    const F32 other = scale_by_power(set(1.0f), set(part.shift[i] - top));
    sum.shift[i] = top;
    sum.z[i] = sum.z[i] * own[0] + part.z[i] * other[0];
    for (int64_t j = 0; j < d.width; j += kLanes) {
      const int64_t at = j / kPanel * (d.pitch * kPanel) + i * kPanel + j % kPanel;
      store(sum.s + at, load(sum.s + at) * own + load(part.s + at) * other);
    }
  }
}

/// The state of all keys of each head, at `states` with a distance of pieces_of(seq_k).count.
static inline void sum_all_keys(const Queue& queue, const Args& a, char* states, char* memory, int64_t worker_bytes) {
  const Pieces p = pieces_of(a.seq_k);
  const int64_t key_heads = a.batch * a.heads_kv;
  core::parallel_for(queue, key_heads * p.count, [&](int64_t task, int worker) {
    const int64_t head = task / p.count, first = task % p.count * p.length;
    State state = state_at(a, states, task);
    sum_piece(a, head / a.heads_kv, head % a.heads_kv, first, smaller(a.seq_k, first + p.length), state,
              memory + worker * worker_bytes);
  });
  core::parallel_for(queue, p.count > 1 ? key_heads : 0, [&](int64_t head, int) {
    State sum = state_at(a, states, head * p.count);
    for (int64_t i = 1; i < p.count; ++i) add_state(dims_of(a), sum, state_at(a, states, head * p.count + i));
  });
}

/// A scan for rows that see the state alone.
static inline Scan scan_of_state(const Args& a, const State& state, Arena& arena) {
  Scan s = take_scan(arena, a);
  s.state = state;
  s.state.empty = is_empty(state);
  s.chunk.first_present = 0;
  return s;
}

/// Calls f(span) for the rows [first, end) of a head, which see the state alone.
template <class F>
static inline void for_each_span(int64_t b, int64_t head, int64_t first, int64_t end, F&& f) {
  for (int64_t n = first; n < end; n += kChunk)
    f(Span{b, head, n, smaller(kChunk, end - n), 0, false, nullptr, nullptr});
}

}  // namespace subquad::cpu::SUBQUAD_ISA::linear
