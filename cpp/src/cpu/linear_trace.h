/// What the backward pass of causal linear_attention carries through the chunks of a key head, and what it makes of it
/// for the gradients of decays.
///
/// The gradient of a decay sums, over all pairs of a row behind it and a key before it, score times push without its
/// own factor. The state before the chunk counts as one more key, and what follows the chunk as one more row.
#pragma once
#include "cpu/linear_slopes.h"

namespace subquad::cpu::SUBQUAD_ISA::linear {

struct Trace {
  float *total, *rho;       // [group, seq_q]: what a row divides by, and -<dout, out> over that
  bool* alone;              // [group, seq_q]: the row has shifts of its own
  float* shifts;            // [chunks, pitch]: of the state before the chunk
  bool *empty, *end_alone;  // [chunks]: no state before the chunk; the state behind it has shifts of its own
  float* scores;            // [group * seq_q + kChunk, kChunk]: so that the way back need not find them again
  float* with_state;        // [seq_k]: sums over the rows of a position of <g, S^T phi> + rho <z, phi>
  float *far, *near;        // states [every kth chunk], [k chunks], each state_floats long
};

struct Task {
  Scan scan;
  Slopes slopes;
  State after;     // dS and dz
  float* factors;  // [pitch]: of a state from behind a chunk to before it
  Trace trace;
  int64_t batch, key_head, group, chunks, stride;
};

static inline bool fades(const Args& a) { return a.ddecay.data != nullptr; }

static inline int64_t state_floats(const Dims& d) { return d.pitch * d.width + 2 * d.pitch + 16; }

static inline Task take_task(Arena& arena, const Args& a) {
  Task t = {};
  const Dims d = dims_of(a);
  t.group = a.heads_q / a.heads_kv, t.chunks = (a.seq_k + kChunk - 1) / kChunk, t.stride = 1;
  while (t.stride * t.stride < t.chunks) ++t.stride;
  t.scan = take_scan(arena, a);
  t.scan.state = take_state(arena, d);
  t.after = take_state(arena, d);
  t.slopes = take_slopes(arena, d, fades(a));
  t.factors = take<float>(arena, d.pitch);
  t.trace.total = take<float>(arena, t.group * a.seq_q);
  t.trace.rho = take<float>(arena, t.group * a.seq_q);
  t.trace.alone = take<bool>(arena, t.group * a.seq_q);
  t.trace.empty = take<bool>(arena, t.chunks);
  t.trace.end_alone = take<bool>(arena, t.chunks);
  if (has_shift(a)) t.trace.shifts = take<float>(arena, t.chunks * d.pitch);
  if (!fades(a)) t.trace.scores = take<float>(arena, (t.group * a.seq_q + kChunk) * kChunk);
  if (!fades(a)) return t;
  t.trace.with_state = take<float>(arena, a.seq_k);
  t.trace.far = take<float>(arena, t.stride * state_floats(d));
  t.trace.near = take<float>(arena, t.stride * state_floats(d));
  Rows* both[] = {&t.scan.rows, &t.scan.own_rows};
  for (Rows* rows : both) {
    rows->bare_scores = take<float>(arena, kChunk * kChunk);
    rows->state_total = take<float>(arena, kChunk);
  }
  return t;
}

static inline void keep_state(const Dims& d, const State& s, float* to) {
  memcpy(to, s.s, size_t(d.pitch * d.width) * sizeof(float)), to += d.pitch * d.width;
  memcpy(to, s.z, size_t(d.pitch) * sizeof(float)), to += d.pitch;
  memcpy(to, s.shift, size_t(d.pitch) * sizeof(float)), to += d.pitch;
  to[0] = s.mass, to[1] = s.empty;
}

static inline void bring_state(const Dims& d, const float* from, State& s) {
  memcpy(s.s, from, size_t(d.pitch * d.width) * sizeof(float)), from += d.pitch * d.width;
  memcpy(s.z, from, size_t(d.pitch) * sizeof(float)), from += d.pitch;
  memcpy(s.shift, from, size_t(d.pitch) * sizeof(float)), from += d.pitch;
  s.mass = from[0], s.empty = from[1] != 0;
}

/// The pairs of what follows the chunk with its keys and with the state before it, without the weights of decays.
static inline void pair_after(const Args& a, Task& t, const Keys& k, float power) {
  const Dims& d = t.scan.d;
  const Chunk& c = t.scan.chunk;
  float *pairs = t.slopes.pairs + kChunk * kChunk, *state = t.slopes.pairs_state;
  memset(t.slopes.pairs, 0, size_t((kChunk + 1) * kChunk) * sizeof(float));
  for (int64_t m = 0; m < c.count; ++m) state[m] = t.trace.with_state[c.first + m];
  for (int64_t m = 0; m < k.count; ++m) {
    float sum = a.normalize ? dot(k.phi + m * d.pitch, t.after.z, d.pitch) : 0.0f;
    for (int64_t j = 0; j < d.dim_v; j += kPanel)
      sum += dot_of(t.slopes.dv + m * d.width + j, c.values + j * kChunk + m * kPanel, smaller(kPanel, d.dim_v - j));
    pairs[m] = k.exponents ? without_power(set(sum), set(k.exponents[m]))[0] : sum;
  }
  float sum = 0;
  for (int64_t i = 0; i < d.features && !t.scan.state.empty; ++i) {
    float feature = a.normalize ? t.scan.state.z[i] * t.after.z[i] : 0.0f;
    for (int64_t j = 0; j < d.dim_v; j += kPanel) {
      const int64_t at = j * d.pitch + i * kPanel;
      feature += dot_of(t.scan.state.s + at, t.after.s + at, smaller(kPanel, d.dim_v - j));
    }
    sum += feature * (k.count > 0 ? k.scale[i] : 1.0f);
  }
  state[kChunk] = without_power(set(sum), set(power))[0];
}

/// Gradients of the decays of a chunk: the pairs on both sides of each, by the weights without it.
static inline void finish_decays(const Args& a, const Task& t) {
  const Chunk& c = t.scan.chunk;
  const float* decay = row_of(a.decay, t.batch, t.key_head);
  const float* pairs = t.slopes.pairs;
  float* before = t.slopes.pairs_state;  // pairs of a row with all that lies before the current key
  const Operand& to = a.ddecay;
  float* out = static_cast<float*>(to.data) + t.batch * to.stride[0] + t.key_head * to.stride[1];
  const auto decay_of = [&](int64_t m) { return c.present[m] ? decay[(c.first + m) * a.decay.stride[2]] : 1.0f; };
  for (int64_t m = 0; m < c.count; ++m) {
    float link = 1, sum = 0, own = 0;
    for (int64_t row = m; row < c.count; ++row) {
      if (row > m) link *= decay_of(row);
      sum += link * before[row], own += link * pairs[row * kChunk + m];
    }
    sum += link * before[kChunk], own += link * pairs[kChunk * kChunk + m];
    out[(c.first + m) * to.stride[2]] = !c.present[m] ? 0.0f : a.gated ? sum - own : sum;
    const float d = decay_of(m), share = c.link[m * kChunk + m];
    for (int64_t row = m + 1; row < c.count; ++row) before[row] = d * before[row] + share * pairs[row * kChunk + m];
    before[kChunk] = d * before[kChunk] + share * pairs[kChunk * kChunk + m];
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA::linear
