/// Gradients of linear_attention, chunk by chunk. With out_n = sums_n / total_n,
///
///   g_n = dout_n / total_n,   rho_n = -<dout_n, out_n> / total_n,   push[n, m] = <g_n, v_m> + rho_n
///   dphi_q[n] = S g_n + rho_n z,   dphi_k[m] = dS v_m + dz,   dv_m = dS^T phi_k[m]
///
/// with dS and dz the sums of phi_q[n] g_n^T and rho_n phi_q[n] over the rows that see the key. Inside a chunk the sums
/// go over pairs, by scores and pushes. Gradients of features are held transposed, for their other factors are at hand
/// that way. Shifts are constants, and phi dphi, the gradient of a logarithm, does not depend on them.
#pragma once
#include "cpu/linear_scan.h"

namespace subquad::cpu::SUBQUAD_ISA::linear {

/// What a worker holds besides a scan.
struct Slopes {
  float *g, *rho;                 // [kChunk, width], [kChunk]
  float* g_panels;                // g as panels [width / kPanel][kChunk, kPanel], by the weight of the state in its row
  float* g_turned;                // panels [kChunk / kPanel][width, kPanel]: the transpose of g
  float* values_turned;           // of the values of the chunk
  float *pushes, *pushes_turned;  // [kChunk, kChunk] and panels [kChunk / kPanel][kChunk, kPanel]
  float* dphi;                    // panels [kChunk / kPanel][pitch, kPanel]
  float* rows;                    // [kChunk, pitch]
  float* phi_turned;              // panels [kChunk / kPanel][pitch, kPanel]
  float* dv;                      // [kChunk, width]
  float* extra;                   // [kChunk, pitch]: of features, from rows and states with shifts of their own
  float* pairs;        // [kChunk + 1, kChunk]: sums of score times push; with a gradient of the decay, else null
  float* pairs_state;  // [kChunk + 1]: of the rows with the state; behind each, what follows the chunk
};

static inline Slopes take_slopes(Arena& arena, const Dims& d, bool fades) {
  Slopes s = {};
  s.g = take<float>(arena, kChunk * d.width);
  s.rho = take<float>(arena, kChunk);
  s.g_panels = take<float>(arena, kChunk * d.width);
  s.g_turned = take<float>(arena, kChunk * d.width);
  s.values_turned = take<float>(arena, kChunk * d.width);
  s.pushes = take<float>(arena, kChunk * kChunk);
  s.pushes_turned = take<float>(arena, kChunk * kChunk);
  s.dphi = take<float>(arena, kChunk * d.pitch);
  s.rows = take<float>(arena, kChunk * d.pitch);
  s.phi_turned = take<float>(arena, kChunk * d.pitch);
  s.dv = take<float>(arena, kChunk * d.width);
  s.extra = take<float>(arena, kChunk * d.pitch);
  if (fades) {
    s.pairs = take<float>(arena, (kChunk + 1) * kChunk);
    s.pairs_state = take<float>(arena, kChunk + 1);
  }
  return s;
}

static inline float* element(const Target& x, int64_t r, int64_t c) {
  return x.data + r * x.row_step + c / kPanel * x.panel_step + c % kPanel;
}

/// to[c, r] = from[r, c], rounded up to whole blocks of kLanes.
static inline void turn(const Target& from, int64_t rows, int64_t columns, const Target& to) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      F32 x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = load(element(from, r + i, c));
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(element(to, c + i, r), x[i]);
    }
}

static inline bool all_finite(const float* rows, int64_t size) {
  U32 largest = {};
  for (int64_t i = 0; i < size; i += kLanes) {
    const U32 magnitude = as_u32(load(rows + i)) & set(0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  bool finite = true;
  for (int i = 0; i < kLanes; ++i) finite &= largest[i] < 0x7f800000u;
  return finite;
}

static inline float dot_of(const float* a, const float* b, int64_t size) {
  F32 sum = {};
  for (int64_t i = 0; i < size; i += kLanes) sum = fma(load(a + i), load(b + i), sum);
  return reduce_add(sum);
}

/// x 2^-n; 0 for a weight of 0, whose exponent is -infinity.
static inline F32 without_power(F32 x, F32 n) { return select(n > set(kNever), scale_by_power(x, -n), F32{}); }

/// row[0..size) += sum of weights[i * step] times the rows [first, end) of x, as one chain.
static inline void add_rows(const float* weights, int64_t step, const float* x, int64_t pitch, int64_t first,
                            int64_t end, float* row, int64_t size) {
  for (int64_t j = 0; j < size; j += kLanes) {
    F32 sum = {};
    for (int64_t i = first; i < end; ++i) sum = fma(set(weights[i * step]), load(x + i * pitch + j), sum);
    store(row + j, load(row + j) + sum);
  }
}

/// g of the rows of a span from the sums of weights that they divide by; zero rows where that is 0.
static inline void load_slopes(const Args& a, const Dims& d, const Span& q, const float* total, Slopes& s) {
  for (int64_t r = 0; r < q.count; ++r) {
    float* row = s.g + r * d.width;
    memset(row, 0, size_t(d.width) * sizeof(float));
    if (total[r] == 0) continue;
    visit_float(a.dout.dtype, [&](auto tag) {
      using T = decltype(tag);
      const Operand& x = a.dout;
      widen(static_cast<const T*>(x.data) + q.batch * x.stride[0] + q.head * x.stride[1] + (q.first + r) * x.stride[2],
            row, d.dim_v);
    });
    if (a.normalize) divide_row(row, d.width, total[r]);
  }
  const int64_t rest = round_up(q.count, kPanel) - q.count;
  memset(s.g + q.count * d.width, 0, size_t(rest * d.width) * sizeof(float));
  memset(s.rho + q.count, 0, size_t(kChunk - q.count) * sizeof(float));
}

/// total becomes what a row divides by: 1 for plain sums, 0 for rows that see nothing.
static inline void settle_totals(const Args& a, const Span& q, Rows& rows) {
  for (int64_t r = 0; r < q.count; ++r) rows.total[r] = !rows.live[r] ? 0.0f : a.normalize ? rows.total[r] : 1.0f;
}

/// g as panels, by the weights of the state in the rows (null: 1).
static inline void pack_slopes(const Dims& d, const Span& q, const float* carry, Slopes& s) {
  for (int64_t r = 0; r < q.count; ++r)
    for (int64_t j = 0; j < d.width; j += kLanes)
      store(element(into_panels(s.g_panels, kChunk), r, j), load(s.g + r * d.width + j) * set(carry ? carry[r] : 1.0f));
}

/// <g_n, v_m> for the rows of a span and the keys that they see; anything for the others.
static inline void meet_values(const Dims& d, const Keys& k, const Span& q, const Slopes& s, const Target& to) {
  const int64_t count = round_up(q.count, kTileRows);
  for (int64_t j = 0; j < k.count; j += kPanel) {
    int64_t r = 0;
    while (r < count && seen_by_group(k, q, r) <= j) r += kTileRows;
    product<Into::set>(rows_of(s.g + r * d.width, d.width), count - r, {s.values_turned + j * d.width, 0}, d.dim_v,
                       kPanel, {element(to, r, j), to.row_step, to.panel_step});
  }
}

/// Makes pushes of them, by the weights of the keys; zero on keys that the row does not see. Adds the pairs where these
/// are wanted.
static inline void find_pushes(const Keys& k, const Span& q, const Rows& rows, const Slopes& s, const Target& to) {
  for (int64_t r = 0; r < q.count; ++r) {
    const I32 seen = set(int32_t(q.seen_by(r)));
    for (int64_t j = 0; j < round_up(k.count, kPanel); j += kLanes) {
      float* at = element(to, r, j);
      const I32 visible = lane_index() + int32_t(j) < seen;
      F32 x = select(visible, load(at) + s.rho[r], F32{});
      if (s.pairs && rows.bare_scores) {
        float* pair = s.pairs + (q.seen_by(r) - 1) * kChunk + j;
        F32 score = select(visible, load(rows.bare_scores + r * kChunk + j), F32{});
        if (k.exponents) score = without_power(score, load(k.exponents + j));
        store(pair, fma(score, x, load(pair)));
      }
      if (q.link) x = select(visible, x * load(q.link + (q.grows ? r * kChunk : 0) + j), F32{});
      store(at, x);
    }
  }
}

/// S g of the rows of a span, as rows in the shifts of the state.
static inline void pull_state(const Scan& c, const Span& q, Slopes& s) {
  const Dims& d = c.d;
  const int64_t panels = round_up(q.count, kPanel);
  turn(into_rows(s.g, d.width), panels, d.dim_v, into_panels(s.g_turned, d.width));
  product<Into::set>(panels_of(c.state.s, d.pitch), d.pitch, {s.g_turned, d.width * kPanel}, d.dim_v, panels,
                     into_panels(s.dphi, d.pitch));
  turn(into_panels(s.dphi, d.pitch), d.pitch, panels, into_rows(s.rows, d.pitch));
}

/// Adds the pushes of the keys of the chunk to rows that come from the state.
static inline void pull_keys(const Dims& d, const Keys& k, const Span& q, Slopes& s) {
  const int64_t panels = round_up(q.count, kPanel);
  const bool whole = all_finite(k.phi, k.count * d.pitch);
  if (whole) {
    turn(into_rows(s.pushes, kChunk), panels, round_up(k.count, kLanes), into_panels(s.pushes_turned, kChunk));
    for (int64_t r = 0; r < q.count; r += kPanel) {
      const int64_t depth = smaller(q.seen_by(smaller(r + kPanel, q.count) - 1), k.count);
      product<Into::set>(panels_of(k.transposed, d.pitch), d.pitch, {s.pushes_turned + r * kChunk, 0}, depth, kPanel,
                         into_panels(s.dphi + r * d.pitch, d.pitch));
    }
    turn(into_panels(s.dphi, d.pitch), d.pitch, panels, into_rows(s.phi_turned, d.pitch));
  }
  for (int64_t r = 0; r < q.count; ++r) {
    float *row = s.rows + r * d.pitch, *keys = s.phi_turned + r * d.pitch;
    if (!whole) {
      // A key that is not finite must not meet the zeros of rows that do not see it.
      memset(keys, 0, size_t(d.pitch) * sizeof(float));
      add_rows(s.pushes + r * kChunk, 1, k.phi, d.pitch, 0, smaller(q.seen_by(r), k.count), keys, d.pitch);
    }
    for (int64_t i = 0; i < d.pitch; i += kLanes) store(row + i, fma(load(row + i), load(k.scale + i), load(keys + i)));
  }
}

/// Gradients of the features of the rows of a span, whose g and scores have been found; finds rho on the way, for
/// <dout, out> is what the rows get from state and keys without it. `with_state`: <g, S^T phi> + rho <z, phi> of each
/// row, without the weight of the state; or null.
static inline void pull_rows(const Args& a, const Scan& c, const Keys& k, const Span& q, const Rows& rows, Slopes& s,
                             float* with_state) {
  const Dims& d = c.d;
  if (c.state.empty)
    memset(s.rows, 0, size_t(q.count * d.pitch) * sizeof(float));
  else
    pull_state(c, q, s);
  if (k.count > 0) meet_values(d, k, q, s, into_rows(s.pushes, kChunk));
  for (int64_t r = 0; r < q.count; ++r) {
    float* row = s.rows + r * d.pitch;
    const float* phi = (k.rescaled ? rows.phi_scaled : rows.phi) + r * d.pitch;
    const float bare = c.state.empty ? 0.0f : dot(phi, row, d.pitch), carry = q.carry ? q.carry[r] : 1.0f;
    F32 along = {};
    for (int64_t j = 0; j < smaller(q.seen_by(r), k.count); j += kLanes) {
      const I32 visible = lane_index() + int32_t(j) < int32_t(q.seen_by(r));
      const F32 sum = fma(load(rows.scores + r * kChunk + j), load(s.pushes + r * kChunk + j), along);
      along = select(visible, sum, along);
    }
    s.rho[r] = a.normalize ? -(bare * carry + reduce_add(along)) / rows.total[r] : 0.0f;
    if (!rows.live[r] || rows.total[r] == 0) s.rho[r] = 0;
    if (with_state) with_state[r] = bare + (rows.state_total ? s.rho[r] * rows.state_total[r] : 0.0f);
    if (q.carry) scale_row(row, d.pitch, carry);
  }
  if (k.count > 0) {
    find_pushes(k, q, rows, s, into_rows(s.pushes, kChunk));
    pull_keys(d, k, q, s);
  }
  for (int64_t r = 0; r < q.count; ++r) {
    float* row = s.rows + r * d.pitch;
    const F32 of_z = set(s.rho[r] * (q.carry ? q.carry[r] : 1.0f));
    for (int64_t i = 0; i < d.pitch && a.normalize && !c.state.empty; i += kLanes)
      store(row + i, fma(of_z, load(k.z + i), load(row + i)));
    for (int64_t i = 0; i < d.pitch && a.log_features; i += kLanes)
      store(row + i, load(row + i) * load(rows.phi + r * d.pitch + i));
    if (!rows.live[r]) memset(row, 0, size_t(d.pitch) * sizeof(float));
    store_row(a.dfq, q.batch, q.head, q.first + r, row, d.features);
  }
}

/// Takes the rows of a span into dphi and dv of the keys that they see. The slopes of the rows have been loaded.
static inline void push_rows(const Dims& d, const Keys& k, const Span& q, const Rows& rows, Slopes& s) {
  const Target pushes = into_panels(s.pushes, kChunk), scores = into_rows(rows.scores, kChunk);
  meet_values(d, k, q, s, pushes);
  find_pushes(k, q, rows, s, pushes);
  turn(scores, q.count, round_up(k.count, kLanes), into_panels(s.pushes_turned, kChunk));
  turn(into_rows(rows.phi, d.pitch), q.count, d.pitch, into_panels(s.phi_turned, d.pitch));
  pack_slopes(d, q, nullptr, s);
  const bool whole = all_finite(rows.phi, q.count * d.pitch) && all_finite(s.g, q.count * d.width) &&
                     all_finite(s.rho, round_up(q.count, kLanes));
  for (int64_t j = 0; j < k.count; j += kPanel) {
    const int64_t first = larger(0, j + 1 - q.seen) / kPanel * kPanel, depth = q.count - first;
    if (whole && depth > 0) {
      product<Into::add>(panels_of(s.phi_turned + first * d.pitch, d.pitch), d.pitch,
                         {s.pushes + j * kChunk + first * kPanel, 0}, depth, kPanel,
                         into_panels(s.dphi + j * d.pitch, d.pitch));
      product<Into::add>(panels_of(s.pushes_turned + first * kChunk + j * kPanel, kChunk), smaller(kPanel, k.count - j),
                         {s.g_panels + first * kPanel, kChunk * kPanel}, depth, d.dim_v,
                         into_rows(s.dv + j * d.width, d.width));
    }
    // A row that is not finite must not meet the zeros of keys that it does not see.
    for (int64_t m = j; !whole && m < smaller(j + kPanel, k.count); ++m) {
      const int64_t from = smaller(q.count, larger(0, m + 1 - q.seen));
      memset(s.rows, 0, size_t(d.pitch) * sizeof(float));
      add_rows(element(pushes, 0, m), kPanel, rows.phi, d.pitch, from, q.count, s.rows, d.pitch);
      for (int64_t i = 0; i < d.pitch; ++i) *element(into_panels(s.dphi, d.pitch), i, m) += s.rows[i];
      add_rows(rows.scores + m, kChunk, s.g, d.width, from, q.count, s.dv + m * d.width, round_up(d.dim_v, kLanes));
    }
  }
}

/// Takes one row with shifts of its own into the gradients of the keys that it sees.
static inline void push_alone(const Args& a, const Dims& d, const Chunk& c, const Keys& k, const Span& q,
                              const Rows& rows, Slopes& s) {
  meet_values(d, k, q, s, into_rows(s.pushes, kChunk));
  find_pushes(k, q, rows, s, into_rows(s.pushes, kChunk));
  for (int64_t m = 0; m < k.count; ++m) {
    if (!c.present[m]) continue;
    float* extra = s.extra + m * d.pitch;
    const F32 push = set(s.pushes[m] * (a.log_features ? 1.0f : k.factor[m]));
    for (int64_t i = 0; i < d.pitch; i += kLanes) {
      const F32 own = a.log_features ? load(k.phi + m * d.pitch + i) : set(1.0f);
      store(extra + i, fma(push * own, load(rows.phi + i), load(extra + i)));
    }
    add_rows(rows.scores + m, 1, s.g, d.width, 0, 1, s.dv + m * d.width, round_up(d.dim_v, kLanes));
  }
}

/// state = factors state + the rows of a span, in the shifts of the state before the chunk; no factors: 1. `pushed`:
/// the same rows have just been pushed, and what that turned is still there.
static inline void add_slopes(const Dims& d, bool rescaled, const Span& q, const Rows& rows, const float* factors,
                              bool pushed, Slopes& s, State& state) {
  float* phi = rescaled ? rows.phi_scaled : rows.phi;
  if (rescaled || !pushed) turn(into_rows(phi, d.pitch), q.count, d.pitch, into_panels(s.phi_turned, d.pitch));
  if (q.carry || !pushed) pack_slopes(d, q, q.carry, s);
  const Left left = panels_of(s.phi_turned, d.pitch);
  const Right right = {s.g_panels, kChunk * kPanel};
  if (factors)
    product<Into::scaled>(left, d.pitch, right, q.count, d.dim_v, into_panels(state.s, d.pitch), factors);
  else
    product<Into::add>(left, d.pitch, right, q.count, d.dim_v, into_panels(state.s, d.pitch));
  for (int64_t i = 0; i < d.pitch; i += kLanes) {
    F32 sum = {};
    for (int64_t r = 0; r < q.count; ++r)
      sum = fma(load(phi + r * d.pitch + i), set(s.rho[r] * (q.carry ? q.carry[r] : 1.0f)), sum);
    store(state.z + i, fma(load(state.z + i), factors ? load(factors + i) : set(1.0f), sum));
  }
}

/// dphi and dv of the keys from what follows the chunk; `weights` are those of the keys behind the chunk (null: 1).
static inline void start_keys(const Args& a, const Dims& d, const Chunk& c, const Keys& k, const float* weights,
                              const State& after, Slopes& s) {
  if (weights) weigh_values(d, c, weights);
  const Target values = into_panels(weights ? c.weighted : c.values, kChunk), dphi = into_panels(s.dphi, d.pitch);
  turn(values, k.count, d.dim_v, into_panels(s.g_turned, d.width));
  product<Into::set>(panels_of(after.s, d.pitch), d.pitch, {s.g_turned, d.width * kPanel}, d.dim_v,
                     round_up(k.count, kPanel), dphi);
  for (int64_t m = 0; a.normalize && m < k.count; m += kLanes) {
    const F32 w = weights ? load(weights + m) : set(1.0f);
    for (int64_t i = 0; i < d.pitch; ++i)
      store(element(dphi, i, m), fma(set(after.z[i]), w, load(element(dphi, i, m))));
  }
  product<Into::set>(rows_of(k.phi, d.pitch), k.count, {after.s, d.pitch * kPanel}, d.features, d.dim_v,
                     into_rows(s.dv, d.width));
}

/// Row m of dphi as features: gradients of the logarithms, or of what key_log_weight multiplies.
static inline void finish_key(const Args& a, const Dims& d, const Keys& k, int64_t m, float* row) {
  if (a.weighted) scale_row(row, d.pitch, k.factor[m]);
  for (int64_t i = 0; i < d.pitch && a.log_features; i += kLanes)
    store(row + i, load(row + i) * load(k.phi + m * d.pitch + i));
}

/// Writes the gradients of the keys of a chunk.
static inline void finish_keys(const Args& a, const Dims& d, int64_t b, int64_t h, const Chunk& c, const Keys& k,
                               bool has_extra, Slopes& s) {
  turn(into_panels(s.dphi, d.pitch), d.pitch, round_up(k.count, kLanes), into_rows(s.rows, d.pitch));
  for (int64_t m = 0; m < c.count; ++m) {
    float *row = s.rows + m * d.pitch, *dv = s.dv + m * d.width, dweight = 0;
    if (c.present[m]) {
      finish_key(a, d, k, m, row);
      for (int64_t i = 0; i < d.pitch && has_extra; i += kLanes)
        store(row + i, load(row + i) + load(s.extra + m * d.pitch + i));
    } else {
      memset(row, 0, size_t(d.pitch) * sizeof(float));
      memset(dv, 0, size_t(d.width) * sizeof(float));
    }
    store_row(a.dfk, b, h, c.first + m, row, d.features);
    store_row(a.dv, b, h, c.first + m, dv, d.dim_v);
    if (!a.dkey_log_weight.data) continue;
    if (c.present[m]) {
      load_features(a.fk, b, h, c.first + m, d, 0, s.phi_turned);
      dweight = dot(s.phi_turned, row, d.pitch);
    }
    const Operand& to = a.dkey_log_weight;
    static_cast<float*>(to.data)[b * to.stride[0] + h * to.stride[1] + (c.first + m) * to.stride[2]] = dweight;
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA::linear
