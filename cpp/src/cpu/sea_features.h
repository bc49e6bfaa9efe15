/// Features of the keys of sea_estimate, chunk by chunk, and the sums over keys that linear attention needs.
///
/// Of keys are summed S = sum_t phi(k_t) [P_t | v_t]^T and z = sum_t phi(k_t). The features of the bidirectional pass
/// are held as e^{x - top} with the largest x so far; their epsilon is added behind all sums, from a last feature of 1.
#pragma once
#include "cpu/exp.h"
#include "cpu/sea_layout.h"
#include "cpu/sea_weights.h"

namespace subquad::cpu::SUBQUAD_ISA::sea {

// Tokens per chunk: more would raise the share of the triangular part, fewer would read the packed weights more often.
static constexpr int64_t kChunk = kTileColumns;
static constexpr float kReluEpsilon = 1e-3f, kExpEpsilon = 1e-4f;

struct State {
  float* s;    // panels [width_pitch / kPanel][feature_rows, kPanel]
  float* z;    // [sum_pitch], zero behind the features
  float* top;  // bidirectional: the largest exponent of a feature
};

/// Tokens [first, first + count) of one head, by rank.
struct Chunk {
  int64_t b, h, first, count;
};

/// What a worker holds of a chunk of keys.
struct Keys {
  float* rows;    // [kPanel, dim_pitch], then one row [width_pitch]
  float* norms;   // [kChunk] |k|^2 / (2 d^1/2)
  float* panels;  // [kChunk / kPanel][dim_pitch, kPanel], the keys transposed
  float* phi;     // [kChunk / kPanel][feature_rows, kPanel], their features
  float* values;  // panels [width_pitch / kPanel][kChunk, kPanel] of [P | v]
  float* scale;   // [feature_rows] what the sums so far are to be multiplied by
  State sum;      // of this chunk
  bool finite;    // no NaN and no infinity among the values
};

static inline State take_state(Arena& arena, const Dims& d) {
  State s = {};
  s.s = take<float>(arena, d.width_pitch * d.feature_rows);
  s.z = take<float>(arena, d.sum_pitch);
  s.top = take<float>(arena, 1);
  return s;
}

static inline int64_t state_bytes(const Dims& d) {
  Arena arena = {};
  take_state(arena, d);
  return arena.used;
}

static inline State state_at(const Dims& d, char* states, int64_t index) {
  Arena arena = {states + index * state_bytes(d), 0};
  return take_state(arena, d);
}

static inline Keys take_keys(Arena& arena, const Dims& d) {
  Keys k = {};
  k.rows = take<float>(arena, larger(kPanel * d.dim_pitch, d.width_pitch));
  k.norms = take<float>(arena, kChunk);
  k.panels = take<float>(arena, kChunk * d.dim_pitch);
  k.phi = take<float>(arena, kChunk * d.feature_rows);
  k.values = take<float>(arena, kChunk * d.width_pitch);
  k.scale = take<float>(arena, d.feature_rows);
  k.sum = take_state(arena, d);
  return k;
}

static inline void clear_state(const Dims& d, State& s) {
  memset(s.s, 0, size_t(d.width_pitch * d.feature_rows) * sizeof(float));
  memset(s.z, 0, size_t(d.sum_pitch) * sizeof(float));
  *s.top = -kInfinity;
}

static inline void copy_state(const Dims& d, const State& from, State& to) {
  memcpy(to.s, from.s, size_t(d.width_pitch * d.feature_rows) * sizeof(float));
  memcpy(to.z, from.z, size_t(d.sum_pitch) * sizeof(float));
  *to.top = *from.top;
}

static inline void add_state(const Dims& d, const State& from, State& to) {
  add_row(from.s, to.s, d.width_pitch * d.feature_rows);
  add_row(from.z, to.z, d.sum_pitch);
}

/// The state that came in, or zeros.
static inline void load_state(const Args& a, const Dims& d, int64_t b, int64_t h, State& s) {
  clear_state(d, s);
  if (!a.state.s.data) return;
  const float *from = element<float>(a.state.s, b, h), *z = element<float>(a.state.z, b, h);
  for (int64_t i = 0; i < d.features; ++i) {
    for (int64_t j = 0; j < d.width; j += kPanel)
      widen(from + i * a.state.s.stride[2] + j, s.s + j * d.feature_rows + i * kPanel, smaller(kPanel, d.width - j));
    s.z[i] = z[i];
  }
}

static inline void store_state(const Args& a, const Dims& d, int64_t b, int64_t h, const State& s) {
  if (!a.new_state.s.data) return;
  float *to = element<float>(a.new_state.s, b, h), *z = element<float>(a.new_state.z, b, h);
  for (int64_t i = 0; i < d.features; ++i) {
    for (int64_t j = 0; j < d.width; j += kPanel)
      widen(s.s + j * d.feature_rows + i * kPanel, to + i * a.new_state.s.stride[2] + j, smaller(kPanel, d.width - j));
    z[i] = s.z[i];
  }
}

/// Calls f(row as T*, index in the chunk) for the tokens of a chunk.
template <class F>
static inline void for_each_token(const Args& a, const SeaRows& r, const Operand& x, const Chunk& c, F&& f) {
  visit_float(x.dtype, [&](auto tag) {
    const auto* base = element<const decltype(tag)>(x, c.b, c.h);
    for (int64_t i = 0; i < c.count; ++i) f(base + token_of(a, r, c.b, c.first + i) * x.stride[2], i);
  });
}

/// 1 / (2 d^1/2): what |x|^2 is multiplied by in the exponents of the features.
static inline float norm_factor(const Dims& d) { return float(feature_scale(d) * feature_scale(d) / 2); }

/// The keys of a chunk as transposed panels, zeros behind them; with the norms of the exponential features.
static inline void pack_keys(const Args& a, const Dims& d, const SeaRows& r, const Chunk& c, Keys& k) {
  const float factor = norm_factor(d);
  const auto finish = [&](int64_t first, int64_t count) {
    memset(k.rows + count * d.dim_pitch, 0, size_t((kPanel - count) * d.dim_pitch) * sizeof(float));
    transpose_rows(k.rows, d.dim_pitch, k.panels + first * d.dim_pitch);
  };
  for_each_token(a, r, a.k, c, [&](const auto* from, int64_t i) {
    float* row = k.rows + i % kPanel * d.dim_pitch;
    widen_padded(from, row, d.dim);
    if (!a.is_causal) k.norms[i] = dot(row, row, d.dim_pitch) * factor;
    if ((i + 1) % kPanel == 0) finish(i + 1 - kPanel, kPanel);
  });
  if (c.count % kPanel) finish(c.count / kPanel * kPanel, c.count % kPanel);
  for (int64_t i = c.count; !a.is_causal && i < kChunk; ++i) k.norms[i] = 0;
}

/// The row of the identity matrix interpolated at t (d - 1) / (n - 1).
static inline void interpolate_identity(int64_t t, int64_t n, int64_t dim, float* row) {
  memset(row, 0, size_t(dim) * sizeof(float));
  const int64_t steps = larger(1, n - 1), at = t * (dim - 1) / steps, rest = t * (dim - 1) % steps;
  row[at] = float(double(steps - rest) / double(steps));
  if (rest) row[at + 1] = float(double(rest) / double(steps));
}

/// [P | v] of a chunk as panels.
static inline void pack_values(const Args& a, const Dims& d, const SeaRows& r, const Chunk& c, Keys& k) {
  float* row = k.rows;
  const int64_t before = a.state.count.data ? *element<int32_t>(a.state.count, c.b) : 0;
  U32 largest = {};
  memset(row, 0, size_t(d.width_pitch) * sizeof(float));
  for_each_token(a, r, a.v, c, [&](const auto* from, int64_t i) {
    if (a.is_causal)
      widen(element<float>(a.weights.position, before + c.first + i), row, d.dim);
    else
      interpolate_identity(c.first + i, r.counts[c.b], d.dim, row);
    widen(from, row + d.dim, d.dim);
    for (int64_t j = 0; j < d.width_pitch; j += kLanes) {
      const F32 x = load(row + j);
      store(k.values + j / kPanel * (kChunk * kPanel) + i * kPanel + j % kPanel, x);
      const U32 magnitude = as_u32(x) & set(0x7fffffffu);
      largest = magnitude > largest ? magnitude : largest;
    }
  });
  k.finite = !any(largest >= set(0x7f800000u));
}

/// phi = relu(u) + epsilon from u in place, and the sum over the tokens; zero for those behind the chunk.
static inline void relu_keys(const Dims& d, int64_t count, Keys& k) {
  for (int64_t i = 0; i < d.features; ++i) {
    F32 sum = {};
    for (int64_t t = 0; t < count; t += kLanes) {
      float* at = k.phi + t / kPanel * (d.feature_rows * kPanel) + i * kPanel + t % kPanel;
      const F32 phi = max(F32{}, load(at)) + kReluEpsilon;
      const F32 kept = select(lanes_below(count - t), phi, F32{});
      store(at, kept);
      sum += kept;
    }
    k.sum.z[i] = reduce_add(sum);
  }
  for (int64_t i = d.features; i < d.sum_pitch; ++i) k.sum.z[i] = 0;
}

/// phi = e^{u - norm - top} in place, and 1 as the last feature. Raises the top of `total`, the largest u so far, and
/// leaves in k.scale what that does to its sums.
static inline void exp_keys(const Dims& d, int64_t count, State& total, Keys& k) {
  F32 largest = set(-kInfinity);
  const auto for_each = [&](auto&& f) {
    for (int64_t i = 0; i < d.features; ++i)
      for (int64_t t = 0; t < count; t += kLanes)
        f(k.phi + t / kPanel * (d.feature_rows * kPanel) + i * kPanel + t % kPanel, i, t);
  };
  for_each([&](float* at, int64_t, int64_t t) {
    const F32 u = load(at);
    store(at, u - load(k.norms + t));
    largest = max(select(lanes_below(count - t), u, set(-kInfinity)), largest);
  });
  const float top = reduce_max(largest) > *total.top ? reduce_max(largest) : *total.top;
  const float factor = top == *total.top ? 1.0f : exp(*total.top - top);
  for (int64_t i = 0; i < d.feature_rows; ++i) k.scale[i] = i < d.features ? factor : 1.0f;
  *total.top = top;
  memset(k.sum.z, 0, size_t(d.sum_pitch) * sizeof(float));
  for_each([&](float* at, int64_t i, int64_t t) {
    const F32 phi = select(lanes_below(count - t), exp(load(at) - top), F32{});
    store(at, phi);
    k.sum.z[i] += reduce_add(phi);
  });
}

/// Features and values of a chunk of keys.
static inline void load_keys(const Args& a, const Dims& d, const Weights& w, const SeaRows& r, const Chunk& c,
                             State& total, Keys& k) {
  pack_keys(a, d, r, c, k);
  linear::product<linear::Into::set>(linear::rows_of(w.projection_rows, d.dim_pitch), d.feature_rows,
                                     {k.panels, d.dim_pitch * kPanel}, d.dim, c.count,
                                     linear::into_panels(k.phi, d.feature_rows));
  pack_values(a, d, r, c, k);
  if (a.is_causal) return relu_keys(d, c.count, k);
  exp_keys(d, c.count, total, k);
  for (int64_t t = 0; t < c.count; ++t)
    k.phi[t / kPanel * (d.feature_rows * kPanel) + d.features * kPanel + t % kPanel] = 1;
  k.sum.z[d.features] = float(c.count);
}

/// S of the chunk alone, in k.sum.
static inline void sum_keys(const Dims& d, int64_t count, Keys& k) {
  linear::product<linear::Into::set>(linear::panels_of(k.phi, d.feature_rows), d.feature_rows,
                                     {k.values, kChunk * kPanel}, count, d.width_pitch,
                                     linear::into_panels(k.sum.s, d.feature_rows));
}

/// Bidirectional: takes the chunk into `total`, whose sums follow its top.
static inline void add_scaled_keys(const Dims& d, int64_t count, const Keys& k, State& total) {
  linear::product<linear::Into::scaled>(linear::panels_of(k.phi, d.feature_rows), d.feature_rows,
                                        {k.values, kChunk * kPanel}, count, d.width_pitch,
                                        linear::into_panels(total.s, d.feature_rows), k.scale);
  for (int64_t i = 0; i <= d.features; ++i) total.z[i] = total.z[i] * k.scale[i] + k.sum.z[i];
}

/// Bidirectional: takes the sums of other keys into `total`.
static inline void merge_state(const Dims& d, const State& from, State& total) {
  const float top = *from.top > *total.top ? *from.top : *total.top;
  const float own = top == *total.top ? 1.0f : exp(*total.top - top);
  const float other = top == *from.top ? 1.0f : exp(*from.top - top);
  for (int64_t i = 0; i <= d.features; ++i) {
    const float keep = i < d.features ? own : 1.0f, take = i < d.features ? other : 1.0f;
    total.z[i] = total.z[i] * keep + from.z[i] * take;
    for (int64_t j = 0; j < d.width_pitch; j += kLanes) {
      const int64_t at = j / kPanel * (d.feature_rows * kPanel) + i * kPanel + j % kPanel;
      store(total.s + at, load(total.s + at) * keep + load(from.s + at) * take);
    }
  }
  *total.top = top;
}

/// Bidirectional, behind all sums: the epsilon of every feature of every key.
static inline void add_epsilon(const Dims& d, State& total) {
  for (int64_t i = 0; i < d.features; ++i) {
    total.z[i] += kExpEpsilon * total.z[d.features];
    for (int64_t j = 0; j < d.width_pitch; j += kLanes) {
      float* panel = total.s + j / kPanel * (d.feature_rows * kPanel) + j % kPanel;
      const F32 ones = load(panel + d.features * kPanel);
      store(panel + i * kPanel, fma(set(kExpEpsilon), ones, load(panel + i * kPanel)));
    }
  }
  total.z[d.features] = 0;
}

}  // namespace subquad::cpu::SUBQUAD_ISA::sea
