/// Query rows of linear_attention against the state and a chunk of keys.
#pragma once
#include "cpu/linear_chunk.h"

namespace subquad::cpu::SUBQUAD_ISA::linear {

/// Everything that a worker holds while it goes through the keys of one head.
struct Scan {
  Dims d;
  State state;
  Chunk chunk;
  Keys keys, own_keys;  // own_*: for a row that needs shifts of its own
  Rows rows, own_rows;
  float *base, *own_link, *exponents, *mass;
  float own_power;  // power of two that has gone from the weight of the state to own_keys
};

static inline Rows take_rows(Arena& arena, const Dims& d, int64_t capacity, bool shifted) {
  Rows r = {};
  r.phi = take<float>(arena, capacity * d.pitch);
  r.phi_scaled = shifted ? take<float>(arena, capacity * d.pitch) : r.phi;
  r.scores = take<float>(arena, capacity * kChunk);
  r.sums = take<float>(arena, capacity * d.width);
  r.total = take<float>(arena, capacity);
  r.live = take<bool>(arena, capacity);
  return r;
}

static inline Keys take_keys(Arena& arena, const Dims& d) {
  Keys k = {};
  k.phi = take<float>(arena, kChunk * d.pitch);
  k.transposed = take<float>(arena, kChunk * d.pitch);
  k.shift = take<float>(arena, d.pitch);
  k.z = take<float>(arena, d.pitch);
  k.scale = take<float>(arena, d.pitch);
  return k;
}

static inline State take_state(Arena& arena, const Dims& d) {
  State s = {};
  s.s = take<float>(arena, d.pitch * d.width);
  s.z = take<float>(arena, d.pitch);
  s.shift = take<float>(arena, d.pitch);
  return s;
}

/// All but the state.
static inline Scan take_scan(Arena& arena, const Args& a) {
  Scan s = {};
  const bool shifted = has_shift(a), own = shifted && a.causal;
  s.d = dims_of(a);
  s.chunk.values = take<float>(arena, kChunk * s.d.width);
  if (a.decay.data) {
    s.chunk.weighted = take<float>(arena, kChunk * s.d.width);
    s.chunk.link = take<float>(arena, kChunk * kChunk);
    s.chunk.carry = take<float>(arena, kChunk);
  }
  s.keys = take_keys(arena, s.d);
  s.rows = take_rows(arena, s.d, kChunk, shifted);
  if (!own) return s;
  s.own_keys = take_keys(arena, s.d);
  s.own_rows = take_rows(arena, s.d, kTileRows, true);
  s.base = take<float>(arena, s.d.pitch);
  s.own_link = take<float>(arena, kChunk + 1);
  s.exponents = take<float>(arena, kChunk);
  s.mass = take<float>(arena, kChunk);
  return s;
}

static inline void clear_state(const Dims& d, State& s) {
  memset(s.s, 0, size_t(d.pitch * d.width) * sizeof(float));
  for (int64_t i = 0; i < d.pitch; ++i) s.z[i] = 0, s.shift[i] = kNever;
  s.mass = 0, s.empty = true;
}

/// One row of logarithms to features, in the shifts of the keys and one of its own; false if all of them are -infinity.
static inline bool shift_row(float* row, const float* shift, int64_t size) {
  F32 best = set(-kInfinity), largest = best;
  for (int64_t i = 0; i < size; i += kLanes) {
    const F32 x = min(set(kLargest), load(row + i));
    largest = max(x, largest);
    best = max(fma(x, set(kLog2E), load(shift + i)), best);
  }
  const bool live = !(reduce_max(largest) < -kLargest);
  const F32 top = live ? ceiling(set(reduce_max(best))) : F32{};
  for (int64_t i = 0; i < size; i += kLanes) store(row + i, feature_of(load(row + i), top - load(shift + i)));
  return live;
}

static inline void load_rows(const Args& a, const Dims& d, const Keys& k, const Span& q, bool any_key, int64_t first,
                             Rows& rows) {
  for (int64_t r = 0; r < q.count; ++r) {
    float *row = rows.phi + r * d.pitch, *scaled = rows.phi_scaled + r * d.pitch;
    load_features(a.fq, q.batch, q.head, q.first + r, d, a.log_features ? -kInfinity : 0.0f, row);
    rows.live[r] = any_key || q.seen_by(r) > first;
    if (a.log_features) rows.live[r] &= shift_row(row, k.shift, d.pitch);
    if (!rows.live[r]) memset(row, 0, size_t(d.pitch) * sizeof(float));
    for (int64_t i = 0; k.rescaled && i < d.pitch; i += kLanes) store(scaled + i, load(row + i) * load(k.scale + i));
  }
  const int64_t rest = round_up(q.count, kTileRows) - q.count;
  memset(rows.phi + q.count * d.pitch, 0, size_t(rest * d.pitch) * sizeof(float));
  if (k.rescaled) memset(rows.phi_scaled + q.count * d.pitch, 0, size_t(rest * d.pitch) * sizeof(float));
}

/// Keys of the chunk that a group of kTileRows rows sees together.
static inline int64_t seen_by_group(const Keys& k, const Span& q, int64_t group) {
  return smaller(q.seen_by(smaller(group + kTileRows, q.count) - 1), k.count);
}

/// Scores of the rows of a group, by their weight and zero where not seen; and their sum.
static inline void weigh_scores(const Keys& k, const Span& q, int64_t group, Rows& rows) {
  const int64_t reach = round_up(k.count, kPanel);
  for (int64_t r = group; r < group + kTileRows; ++r) {
    float* row = rows.scores + r * kChunk;
    const I32 seen = set(int32_t(r < q.count ? q.seen_by(r) : 0));
    F32 sum = {};
    for (int64_t j = 0; j < reach; j += kLanes) {
      F32 x = load(row + j);
      if (rows.bare_scores) store(rows.bare_scores + r * kChunk + j, x);
      if (q.link && r < q.count) x = x * load(q.link + (q.grows ? r * kChunk : 0) + j);
      x = select(lane_index() + int32_t(j) < seen, x, F32{});
      store(row + j, x);
      sum += x;
    }
    if (r < q.count) rows.total[r] += reduce_add(sum);
  }
}

/// The scores of all rows, and the sums of weights, with those of the state.
static inline void score_rows(const Args& a, const Dims& d, const State& state, const Keys& k, const Span& q,
                              Rows& rows) {
  for (int64_t r = 0; r < q.count; ++r) {
    const bool counts = a.normalize && !state.empty;
    rows.total[r] = counts ? dot(rows.phi + r * d.pitch, k.z, d.pitch) : 0.0f;
    if (rows.state_total) rows.state_total[r] = rows.total[r];
    if (counts && q.carry) rows.total[r] *= q.carry[r];
  }
  const int64_t count = round_up(q.count, kTileRows);
  for (int64_t j = 0; j < k.count; j += kPanel) {
    int64_t r = 0;
    while (r < count && seen_by_group(k, q, r) <= j) r += kTileRows;
    product<Into::set>(rows_of(rows.phi + r * d.pitch, d.pitch), count - r, {k.transposed + j * d.pitch, 0}, d.features,
                       kPanel, into_rows(rows.scores + r * kChunk + j, kChunk));
  }
  for (int64_t r = 0; k.count > 0 && r < count; r += kTileRows) weigh_scores(k, q, r, rows);
}

/// c[0..width) += sum over the first `count` values by their scores, and no look at the others.
static inline void add_values(const float* scores, const float* values, int64_t count, float* c, int64_t width) {
  for (int64_t j = 0; count > 0 && j < width; j += kLanes) {
    const float* column = values + j / kPanel * (kChunk * kPanel) + j % kPanel;
    F32 sum = {};
    for (int64_t m = 0; m < count; ++m) sum = fma(set(scores[m]), load(column + m * kPanel), sum);
    store(c + j, load(c + j) + sum);
  }
}

static inline void sum_rows(const Dims& d, const State& state, const Chunk& c, const Keys& k, const Span& q,
                            Rows& rows) {
  const int64_t count = round_up(q.count, kTileRows);
  if (state.empty) {
    memset(rows.sums, 0, size_t(count * d.width) * sizeof(float));
  } else {
    product<Into::set>(rows_of(k.rescaled ? rows.phi_scaled : rows.phi, d.pitch), count, {state.s, d.pitch * kPanel},
                       d.features, d.dim_v, into_rows(rows.sums, d.width));
    for (int64_t r = 0; q.carry && r < q.count; ++r) scale_row(rows.sums + r * d.width, d.width, q.carry[r]);
  }
  // Zeros at the end of a row of scores change no bit, but a value that is not finite must not meet them.
  for (int64_t r = 0; k.count > 0 && r < count; r += kTileRows) {
    if (c.finite)
      product<Into::add>(rows_of(rows.scores + r * kChunk, kChunk), kTileRows, {c.values, kChunk * kPanel},
                         seen_by_group(k, q, r), d.dim_v, into_rows(rows.sums + r * d.width, d.width));
    for (int64_t i = r; !c.finite && i < smaller(r + kTileRows, q.count); ++i)
      add_values(rows.scores + i * kChunk, c.values, smaller(q.seen_by(i), k.count), rows.sums + i * d.width, d.width);
  }
}

/// phi_q, scores and sums of weights for the rows of a span against `k`.
static inline void meet(const Args& a, const Scan& s, const Keys& k, const Span& q, Rows& rows) {
  load_rows(a, s.d, k, q, !s.state.empty, s.chunk.first_present, rows);
  score_rows(a, s.d, s.state, k, q, rows);
}

/// With key_log_weight: what the weights of the keys that a row sees add up to, signs of features aside.
static inline void sum_masses(const Scan& s, float* mass) {
  const float before = s.state.empty ? 0.0f : s.state.mass * s.keys.scale[0];
  float sum = before;
  for (int64_t t = 0; t < s.chunk.count; ++t) {
    if (s.chunk.link) {
      sum = before * s.chunk.carry[t];
      for (int64_t m = 0; m <= t; ++m) sum += s.keys.factor[m] * s.chunk.link[t * kChunk + m];
    } else {
      sum += s.keys.factor[t];
    }
    mass[t] = sum;
  }
}

/// Packs the first `seen` keys of the chunk in shifts of their own: above them and the state, by the weights that they
/// have in the row `link` and that the state has, `carry` (null: 1). Powers of two go from the weights to the features;
/// what is left is in own_link, and behind it that of the state.
static inline void pack_own_keys(const Args& a, int64_t b, int64_t key_head, Scan& s, int64_t seen, const float* link,
                                 const float* carry) {
  float power = s.state.empty ? kNever : 0.0f;
  for (int64_t m = 0; m < kChunk; ++m) s.exponents[m] = 0;
  if (link) {
    memcpy(s.own_link, link, kChunk * sizeof(float));
    s.own_link[kChunk] = *carry;
    power = *carry > 0 && !s.state.empty ? split_power(s.own_link[kChunk]) : kNever;
    for (int64_t m = 0; m < kChunk; ++m) s.exponents[m] = s.own_link[m] > 0 ? split_power(s.own_link[m]) : -kInfinity;
  }
  s.own_power = power;
  for (int64_t i = 0; i < s.d.pitch; i += kLanes)
    store(s.base + i, power == kNever ? set(kNever) : load(s.state.shift + i) + power);
  pack_keys(a, s.d, b, key_head, s.chunk, seen, s.state, s.base, s.exponents, s.own_keys);
}

/// Whether the shifts of the chunk may have made weights of row r underflow.
static inline bool needs_own_shifts(const Args& a, const Scan& s, const Span& q, int64_t r) {
  if (!has_shift(a) || !q.grows || !s.rows.live[r]) return false;
  return (a.log_features ? s.rows.total[r] : s.mass[q.seen_by(r) - 1]) < kTooSmall;
}

/// Packs the keys that row r of a span sees in shifts of its own; returns a span of that row alone.
static inline Span span_alone(const Args& a, int64_t key_head, Scan& s, const Span& q, int64_t r) {
  const int64_t seen = q.seen_by(r);
  pack_own_keys(a, q.batch, key_head, s, seen, q.link ? q.link + r * kChunk : nullptr, q.carry ? q.carry + r : nullptr);
  const float *link = q.link ? s.own_link : nullptr, *carry = q.link ? s.own_link + kChunk : nullptr;
  return {q.batch, q.head, q.first + r, 1, seen, false, link, carry};
}

/// Whether a decay has left so little of a feature at the end of the chunk that keys to come could underflow beside it.
static inline bool end_needs_own_shifts(const Args& a, const Scan& s) {
  if (!has_shift(a) || !s.chunk.link) return false;
  if (a.weighted) return s.mass[s.chunk.count - 1] < kSmallState;
  bool small = false;
  for (int64_t i = 0; i < s.d.features; ++i) small |= s.keys.z[i] < kSmallState && s.keys.shift[i] > kNever;
  return small;
}

/// Takes the chunk into the state; returns whether it took shifts of its own.
static inline bool add_chunk(const Args& a, int64_t b, int64_t key_head, Scan& s) {
  if (s.keys.count == 0) return false;
  const int64_t last = s.chunk.count - 1;
  const float* weights = s.chunk.link ? s.chunk.link + last * kChunk : nullptr;
  const float* carry = s.chunk.link ? s.chunk.carry + last : nullptr;
  sum_keys(s.d, weights, carry ? *carry : 1.0f, s.keys);
  Keys* keys = &s.keys;
  if (end_needs_own_shifts(a, s)) {
    pack_own_keys(a, b, key_head, s, s.chunk.count, weights, carry);
    keys = &s.own_keys, weights = s.own_link, carry = s.own_link + kChunk;
    sum_keys(s.d, weights, *carry, s.own_keys);
  }
  if (a.weighted) {
    float mass = s.state.empty ? 0.0f : s.state.mass * keys->scale[0] * (carry ? *carry : 1.0f);
    for (int64_t m = 0; m <= last; ++m) mass += keys->factor[m] * (weights ? weights[m] : 1.0f);
    s.state.mass = mass;
  }
  add_keys(a, s.d, s.chunk, weights, carry ? *carry : 1.0f, *keys, s.state);
  return keys == &s.own_keys;
}

/// No keys: the rows meet the state alone.
static inline Keys no_keys(const State& s) {
  Keys k = {};
  k.shift = s.shift, k.z = s.z;
  return k;
}

}  // namespace subquad::cpu::SUBQUAD_ISA::linear
