/// What both passes of linear_attention share: keys packed by chunks, their shifts, and the query rows that meet them.
///
/// Features that are logarithms are held as
///
///   phi_k[m, i] = e^{b_mi} 2^-n_i,   phi_q[n, i] = e^{a_ni} 2^{n_i - r_n}
///
/// with integral n_i above every b_mi so far and r_n above every exponent of the row, so that nothing overflows and the
/// ratio is that of the plain features. All shifts are powers of two: a later key that raises n_i changes no bit of an
/// earlier row, unless something underflows. A row that this may have happened to is done again, with the shifts of
/// the keys that it sees. With key_log_weight every feature of a head has the same n, and the rows have none.
#pragma once
#include "cpu/exp.h"
#include "cpu/linear_product.h"
#include "cpu/unit_row.h"
#include "ops/linear_attention_args.h"

namespace subquad::cpu::SUBQUAD_ISA::linear {

using Args = LinearAttentionArgs;

// Tokens per chunk. In longer ones the scores, half as many per row and feature, would cost more than the products with
// a state of 64 columns; in shorter ones the state would be read too often.
static constexpr int64_t kChunk = kTileColumns;
// The shift of a feature without a key: below all others, and still exact to count with.
static constexpr float kNever = -100000.0f;
// Logarithms beyond this count as infinite.
static constexpr float kLargest = 20000.0f;
// Sums of weights below this may have lost terms to underflow. In a row with shifts of its own they are near 1.
static constexpr float kTooSmall = 0x1p-60f;
// The same for a state, which rows to come shall rarely find too small.
static constexpr float kSmallState = 0x1p-32f;

struct Dims {
  int64_t features, pitch;  // F, and as rows are held
  int64_t dim_v, width;     // E, and rounded up to whole panels
};

static inline Dims dims_of(const Args& a) {
  return {a.dim_features, padded(a.dim_features), a.dim_v, round_up(a.dim_v, kPanel)};
}

static inline bool has_shift(const Args& a) { return a.log_features || a.weighted; }

/// S and z with their shifts; true S = s_i 2^{shift_i}.
struct State {
  float* s;          // panels [width / kPanel][pitch, kPanel]
  float *z, *shift;  // [pitch]
  float mass;        // with key_log_weight: the sum of the weights, in units of 2^shift
  bool empty;        // nothing has come in yet: s and z are zero
};

/// What a chunk of keys of one head brings besides its features.
struct Chunk {
  int64_t first, count;
  bool present[kChunk];  // not masked
  int64_t first_present;
  bool finite;      // no NaN and no infinity among the values
  float* values;    // panels [width / kPanel][kChunk, kPanel]
  float* weighted;  // values by their weight in the state behind the chunk; with a decay, else null
  float* link;      // [kChunk, kChunk]: weight of key m in row t; with a decay, else null
  float* carry;     // [kChunk]: weight of the state in row t; likewise
};

/// Features of the keys of a chunk, and the state that came before in the same shifts.
struct Keys {
  int64_t count;
  float* phi;              // [kChunk, pitch]
  float* transposed;       // panels [kChunk / kPanel][pitch, kPanel]
  float *shift, *z;        // [pitch]; z of the state, scaled
  float* scale;            // [pitch] 2^{shift of the state - shift}
  bool rescaled;           // some scale is not 1
  const float* exponents;  // powers of two that the keys carry, or null
  float factor[kChunk];    // e^{weight} 2^-shift, with key_log_weight
};

/// Query rows against a chunk. `seen` keys of it are seen by the first row, and one more by each next row if `grows`.
struct Span {
  int64_t batch, head, first, count, seen;
  bool grows;
  const float *link, *carry;  // of the first row, the next ones behind it; with a decay, else null
  int64_t seen_by(int64_t r) const { return grows ? seen + r : seen; }
};

/// Room for the rows of a span, up to `capacity`, and what they come to.
struct Rows {
  float *phi, *phi_scaled;  // [capacity, pitch]; scaled: in the shifts of the state
  float* scores;            // [capacity, kChunk], zero for keys that the row does not see
  float* sums;              // [capacity, width]
  float* total;             // [capacity]
  // With a gradient of the decay, else null: scores and the total of the state, without the weights of the decay.
  float *bare_scores, *state_total;
  bool* live;  // [capacity]: the row sees a key, and has a feature
};

static inline const float* row_of(const Operand& x, int64_t b, int64_t h) {
  return x.data ? static_cast<const float*>(x.data) + b * x.stride[0] + h * x.stride[1] : nullptr;
}

static inline F32 ceiling(F32 x) {
  const F32 nearest = round_to_integer(x);
  return nearest < x ? nearest + 1.0f : nearest;
}

/// The power of two of a positive weight; the weight is left in [1, 2).
static inline float split_power(float& weight) {
  float power = 0;
  if (weight < 0x1p-126f) weight *= 0x1p64f, power = -64;
  power += float(int(float_to_bits(weight) >> 23) - 127);
  weight = bits_to_float((float_to_bits(weight) & 0x7fffffu) | 0x3f800000u);
  return power;
}

/// Row `row` of one head as float, behind it `fill`.
static inline void load_features(const Operand& x, int64_t b, int64_t h, int64_t row, const Dims& d, float fill,
                                 float* to) {
  visit_float(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    widen(static_cast<const T*>(x.data) + b * x.stride[0] + h * x.stride[1] + row * x.stride[2], to, d.features);
  });
  for (int64_t i = d.features; i < d.pitch; ++i) to[i] = fill;
}

/// e^x 2^-n, zero for logarithms that count as -infinity.
static inline F32 feature_of(F32 x, F32 n) { return select(x < set(-kLargest), F32{}, exp_shifted(x, n)); }

/// Rows [first, first + count) of a head of x as panels [width / kPanel][kChunk, kPanel]; zeros where not present.
/// Returns whether all are finite.
static inline bool pack_values(const Operand& x, int64_t b, int64_t h, int64_t first, int64_t count,
                               const bool* present, int64_t dim, float* panels) {
  U32 largest = {};
  visit_float(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* base = static_cast<const T*>(x.data) + b * x.stride[0] + h * x.stride[1];
    for (int64_t m = 0; m < count; ++m) {
      for (int64_t j = 0; j < dim; j += kPanel) {
        float* to = panels + j * kChunk + m * kPanel;
        const int64_t size = present[m] ? smaller(kPanel, dim - j) : 0;
        widen(base + (first + m) * x.stride[2] + j, to, size);
        memset(to + size, 0, size_t(kPanel - size) * sizeof(float));
        for (int64_t i = 0; i < kPanel; i += kLanes) {
          const U32 magnitude = as_u32(load(to + i)) & set(0x7fffffffu);
          largest = magnitude > largest ? magnitude : largest;
        }
      }
    }
  });
  bool finite = true;
  for (int i = 0; i < kLanes; ++i) finite &= largest[i] < 0x7f800000u;
  return finite;
}

/// Weights of keys and of the state in the rows of the chunk, by the recurrence of the state itself.
static inline void link_rows(const Args& a, const float* decay, Chunk& c) {
  float before = 1;
  for (int64_t t = 0; t < c.count; ++t) {
    const float d = c.present[t] ? decay[(c.first + t) * a.decay.stride[2]] : 1.0f;
    float* row = c.link + t * kChunk;
    if (t == 0) memset(row, 0, size_t(kChunk) * sizeof(float));
    for (int64_t j = 0; t > 0 && j < kChunk; j += kLanes) store(row + j, load(row - kChunk + j) * set(d));
    row[t] = !c.present[t] ? 0.0f : a.gated ? 1.0f - d : 1.0f;
    before *= d, c.carry[t] = before;
  }
}

/// weighted[m] = weights[m] values[m]
static inline void weigh_values(const Dims& d, const Chunk& c, const float* weights) {
  for (int64_t j = 0; j < d.width; j += kPanel)
    for (int64_t m = 0; m < c.count; ++m)
      for (int64_t i = 0; i < kPanel; i += kLanes) {
        const int64_t at = j * kChunk + m * kPanel + i;
        store(c.weighted + at, load(c.values + at) * set(weights[m]));
      }
}

/// The chunk of up to kChunk keys from `first` on of key head h.
static inline void load_chunk(const Args& a, const Dims& d, int64_t b, int64_t h, int64_t first, Chunk& c) {
  const bool* keep = mask_of(a.key_mask, b);
  c.first = first, c.count = smaller(kChunk, a.seq_k - first), c.first_present = c.count;
  for (int64_t m = c.count; m-- > 0;) {
    c.present[m] = !keep || keep[first + m];
    if (c.present[m]) c.first_present = m;
  }
  c.finite = pack_values(a.v, b, h, first, c.count, c.present, d.dim_v, c.values);
  if (a.decay.data) link_rows(a, row_of(a.decay, b, h), c);
}

/// The shifts above `base` and all keys; key m counts 2^exponents[m] times (null: once).
static inline void raise_shifts(const Dims& d, const Chunk& c, const float* base, const float* exponents, Keys& k) {
  for (int64_t i = 0; i < d.pitch; i += kLanes) {
    F32 best = set(-kInfinity);
    for (int64_t m = 0; m < k.count; ++m) {
      if (!c.present[m]) continue;
      const F32 x = min(set(kLargest), load(k.phi + m * d.pitch + i));
      const F32 counted = fma(x, set(kLog2E), set(exponents ? exponents[m] : 0.0f));
      best = max(select(x < set(-kLargest), set(-kInfinity), counted), best);
    }
    store(k.shift + i, max(load(base + i), ceiling(max(best, set(kNever)))));
  }
}

/// The same with key_log_weight, and the factors of the keys.
static inline void raise_shift(const Args& a, const Dims& d, int64_t b, int64_t h, const Chunk& c, const float* base,
                               const float* exponents, Keys& k) {
  const float* weights = row_of(a.key_log_weight, b, h) + c.first * a.key_log_weight.stride[2];
  const int64_t step = a.key_log_weight.stride[2];
  float shift = base[0];
  for (int64_t m = 0; m < k.count; ++m) {
    const float x = weights[m * step], limited = x > kLargest ? kLargest : x;
    if (!c.present[m] || !(x >= -kLargest)) continue;
    const float above = ceiling(set(limited * kLog2E + (exponents ? exponents[m] : 0.0f)))[0];
    shift = above > shift ? above : shift;
  }
  for (int64_t m = 0; m < k.count; ++m) {
    const float n = shift - (exponents ? exponents[m] : 0.0f);
    k.factor[m] = c.present[m] ? feature_of(set(weights[m * step]), set(n))[0] : 0.0f;
  }
  for (int64_t i = 0; i < d.pitch; i += kLanes) store(k.shift + i, set(shift));
}

static inline void load_keys(const Args& a, const Dims& d, int64_t b, int64_t h, const Chunk& c, Keys& k) {
  const float fill = a.log_features ? -kInfinity : 0.0f;
  for (int64_t m = 0; m < round_up(k.count, kPanel); ++m) {
    if (m < k.count && c.present[m])
      load_features(a.fk, b, h, c.first + m, d, fill, k.phi + m * d.pitch);
    else
      memset(k.phi + m * d.pitch, 0, size_t(d.pitch) * sizeof(float));
  }
}

/// Packs the first `count` keys of the chunk, in shifts above them and `base`, the shifts of the state (which a factor
/// of the state may have lowered). Rows of absent keys are zero.
static inline void pack_keys(const Args& a, const Dims& d, int64_t b, int64_t h, const Chunk& c, int64_t count,
                             const State& state, const float* base, const float* exponents, Keys& k) {
  k.count = count, k.rescaled = false, k.exponents = exponents;
  load_keys(a, d, b, h, c, k);
  if (a.log_features) raise_shifts(d, c, base, exponents, k);
  if (a.weighted) raise_shift(a, d, b, h, c, base, exponents, k);
  for (int64_t m = 0; has_shift(a) && m < count; ++m) {
    if (!c.present[m]) continue;
    float* row = k.phi + m * d.pitch;
    const F32 power = set(exponents ? exponents[m] : 0.0f);
    if (a.log_features)
      for (int64_t i = 0; i < d.pitch; i += kLanes)
        store(row + i, feature_of(load(row + i), load(k.shift + i) - power));
    else
      scale_row(row, d.pitch, k.factor[m]);
  }
  for (int64_t m = 0; m < count; m += kPanel) transpose_rows(k.phi + m * d.pitch, d.pitch, k.transposed + m * d.pitch);
  for (int64_t i = 0; i < d.pitch; i += kLanes) {
    F32 scale = set(1.0f);
    if (has_shift(a)) scale = scale_by_power(scale, load(base + i) - load(k.shift + i));
    store(k.scale + i, scale);
    store(k.z + i, load(state.z + i) * scale);
    k.rescaled |= reduce_max(abs(scale - 1.0f)) != 0;
  }
}

/// z behind the chunk, in place: that of the state times `carry`, and the keys times their weights (null: 1).
static inline void sum_keys(const Dims& d, const float* weights, float carry, Keys& k) {
  for (int64_t i = 0; i < d.pitch; i += kLanes) {
    F32 sum = {};
    for (int64_t m = 0; m < k.count; ++m)
      sum = fma(load(k.phi + m * d.pitch + i), set(weights ? weights[m] : 1.0f), sum);
    store(k.z + i, fma(load(k.z + i), set(carry), sum));
  }
}

/// Takes keys whose z has been summed, with the same weights, into the state.
static inline void add_keys(const Args& a, const Dims& d, const Chunk& c, const float* weights, float carry, Keys& k,
                            State& state) {
  const Left keys = panels_of(k.transposed, d.pitch);
  const Target to = into_panels(state.s, d.pitch);
  if (weights) {
    weigh_values(d, c, weights);
    scale_row(k.scale, d.pitch, carry);
  }
  const Right values = {weights ? c.weighted : c.values, kChunk * kPanel};
  if (k.rescaled || weights)
    product<Into::scaled>(keys, d.pitch, values, k.count, d.dim_v, to, k.scale);
  else
    product<Into::add>(keys, d.pitch, values, k.count, d.dim_v, to);
  memcpy(state.z, k.z, size_t(d.pitch) * sizeof(float));
  if (has_shift(a)) memcpy(state.shift, k.shift, size_t(d.pitch) * sizeof(float));
  state.empty = false;
}

}  // namespace subquad::cpu::SUBQUAD_ISA::linear
