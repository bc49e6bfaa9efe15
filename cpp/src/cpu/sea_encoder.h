/// The encoder of sea_estimate for a chunk of tokens of one head: linear attention, MLP, scaler, row linear.
#pragma once
#include "cpu/erf.h"
#include "cpu/sea_features.h"

namespace subquad::cpu::SUBQUAD_ISA::sea {

static constexpr float kSumEpsilon = 1e-6f;

/// What a worker holds of the rows of a chunk.
struct Rows {
  float* queries;    // [kChunk, dim_pitch]
  float* phi;        // [kChunk, feature_pitch]
  float* scores;     // [kChunk, kChunk], causal only
  float* inputs;     // [kChunk, input_pitch]: [C | v]
  float* hidden;     // [kChunk, width_pitch]
  float* outputs;    // [kChunk, output_pitch]
  float* sums;       // [feature_pitch] z with its epsilon
  float* totals;     // [kChunk]
  float* scaler[2];  // [kChunk] logits of row_scale and mix
};

static inline Rows take_rows(Arena& arena, const Args& a, const Dims& d) {
  Rows r = {};
  r.queries = take<float>(arena, kChunk * d.dim_pitch);
  r.phi = take<float>(arena, kChunk * d.feature_pitch);
  r.scores = take<float>(arena, a.is_causal ? kChunk * kChunk : 0);
  r.inputs = take<float>(arena, kChunk * d.input_pitch);
  r.hidden = take<float>(arena, kChunk * d.width_pitch);
  r.outputs = take<float>(arena, kChunk * d.output_pitch);
  r.sums = take<float>(arena, d.sum_pitch);
  r.totals = take<float>(arena, kChunk);
  for (float*& logits : r.scaler) logits = take<float>(arena, kChunk);
  return r;
}

/// e^{u - norm - largest u} + epsilon, of the features of a query.
static inline void exp_query(const Dims& d, float norm, float* row) {
  F32 largest = set(-kInfinity);
  for (int64_t i = 0; i < d.features; i += kLanes)
    largest = max(select(lanes_below(d.features - i), load(row + i), set(-kInfinity)), largest);
  const float top = reduce_max(largest) + norm;
  for (int64_t i = 0; i < d.feature_pitch; i += kLanes) store(row + i, exp(load(row + i) - top) + kExpEpsilon);
}

static inline void load_queries(const Args& a, const Dims& d, const Weights& w, const SeaRows& r, const Chunk& c,
                                Rows& rows) {
  for_each_token(a, r, a.q, c,
                 [&](const auto* from, int64_t i) { widen_padded(from, rows.queries + i * d.dim_pitch, d.dim); });
  linear::product<linear::Into::set>(linear::rows_of(rows.queries, d.dim_pitch), c.count, right_of(w.projection), d.dim,
                                     d.feature_pitch, linear::into_rows(rows.phi, d.feature_pitch));
  const int64_t size = c.count * d.feature_pitch;
  if (a.is_causal)
    for (int64_t i = 0; i < size; i += kLanes) store(rows.phi + i, max(F32{}, load(rows.phi + i)) + kReluEpsilon);
  else
    for (int64_t i = 0; i < c.count; ++i) {
      const float* query = rows.queries + i * d.dim_pitch;
      exp_query(d, dot(query, query, d.dim_pitch) * norm_factor(d), rows.phi + i * d.feature_pitch);
    }
}

/// Scores of a group of rows, zero for the keys that a row does not see; their sum joins the denominator.
static inline void mask_scores(int64_t group, Rows& rows) {
  const int64_t reach = round_up(group + kTileRows, kPanel);
  for (int64_t t = group; t < group + kTileRows; ++t) {
    float* row = rows.scores + t * kChunk;
    F32 sum = {};
    for (int64_t j = 0; j < reach; j += kLanes) {
      const F32 x = select(lane_index() + int32_t(j) <= int32_t(t), load(row + j), F32{});
      store(row + j, x);
      sum += x;
    }
    rows.totals[t] += reduce_add(sum);
  }
}

/// Adds the values of the chunk to the sums of its rows: each row sees those up to its own.
static inline void add_seen(const Dims& d, int64_t count, const Keys& k, Rows& rows) {
  const int64_t end = round_up(count, kTileRows);
  for (int64_t j = 0; j < count; j += kPanel)
    linear::product<linear::Into::set>(linear::rows_of(rows.phi + j * d.feature_pitch, d.feature_pitch), end - j,
                                       {k.phi + j * d.feature_rows, 0}, d.features, kPanel,
                                       linear::into_rows(rows.scores + j * kChunk + j, kChunk));
  for (int64_t group = 0; group < end; group += kTileRows) {
    mask_scores(group, rows);
    const float* scores = rows.scores + group * kChunk;
    float* to = rows.inputs + group * d.input_pitch;
    // Zeros at the end of a row of scores change no bit, but a value that is not finite must not meet them.
    if (k.finite) {
      linear::product<linear::Into::add>(linear::rows_of(scores, kChunk), kTileRows, {k.values, kChunk * kPanel},
                                         smaller(group + kTileRows, count), d.width,
                                         linear::into_rows(to, d.input_pitch));
      continue;
    }
    for (int64_t i = 0; i < smaller(kTileRows, count - group); ++i)
      add_weighted_row(scores + i * kChunk, k.values, group + i + 1, to + i * d.input_pitch, d.width);
  }
}

/// C, the numerator over the denominator, in the inputs of the encoder.
static inline void attend(const Args& a, const Dims& d, int64_t count, const State& state, const Keys& k, Rows& rows) {
  linear::product<linear::Into::set>(linear::rows_of(rows.phi, d.feature_pitch), count,
                                     {state.s, d.feature_rows * kPanel}, d.features, d.width,
                                     linear::into_rows(rows.inputs, d.input_pitch));
  memset(rows.sums, 0, size_t(d.feature_pitch) * sizeof(float));
  for (int64_t i = 0; i < d.features; ++i) rows.sums[i] = state.z[i] + (a.is_causal ? kSumEpsilon : 0.0f);
  for (int64_t t = 0; t < count; ++t) rows.totals[t] = dot(rows.phi + t * d.feature_pitch, rows.sums, d.feature_pitch);
  if (a.is_causal) add_seen(d, count, k, rows);
  for (int64_t t = 0; t < count; ++t) scale_row(rows.inputs + t * d.input_pitch, d.width, 1.0f / rows.totals[t]);
}

/// One hidden row: bias, LayerNorm, GELU, and the logits of the scaler.
static inline void activate(const Dims& d, const Weights& w, float* row, float* row_scale, float* mix) {
  F32 sum[kPanelVectors] = {}, square[kPanelVectors] = {}, scale[kPanelVectors] = {}, blend[kPanelVectors] = {};
  const auto for_each = [&](auto&& f) {
    for (int64_t j = 0; j < d.width_pitch; j += kPanel)
      for (int i = 0; i < kPanelVectors; ++i) f(j + i * kLanes, i);
  };
  for_each([&](int64_t j, int i) {
    const F32 x = load(row + j) + load(w.encoder_bias + j);
    store(row + j, x);
    sum[i] += x;
  });
  const float mean = reduce_add(sum[0] + sum[1]) / float(d.width);
  for_each([&](int64_t j, int i) {
    const F32 x = (load(row + j) - mean) * load(w.width_mask + j);
    store(row + j, x);
    square[i] = fma(x, x, square[i]);
  });
  const float rate = 1.0f / sqrt(reduce_add(square[0] + square[1]) / float(d.width) + kNormEpsilon);
  for (int64_t j = 0; j < d.width_pitch; j += kPanel) {
    F32 y[kPanelVectors], cdf[kPanelVectors];
    for (int i = 0; i < kPanelVectors; ++i) {
      const int64_t at = j + i * kLanes;
      cdf[i] = y[i] = fma(load(row + at) * rate, load(w.norm_weight + at), load(w.norm_bias + at));
    }
    normal_cdf(cdf);
    for (int i = 0; i < kPanelVectors; ++i) {
      const int64_t at = j + i * kLanes;
      const F32 z = y[i] * cdf[i];
      store(row + at, z);
      scale[i] = fma(z, load(w.scaler + at), scale[i]);
      blend[i] = fma(z, load(w.scaler + d.width_pitch + at), blend[i]);
    }
  }
  *row_scale = reduce_add(scale[0] + scale[1]), *mix = reduce_add(blend[0] + blend[1]);
}

/// Sigmoids of the logits, to the tokens of a chunk.
static inline void store_sigmoid(const Args& a, const SeaRows& r, const Chunk& c, float* logits, float bias,
                                 const Operand& to) {
  for (int64_t t = 0; t < c.count; t += kLanes)
    store(logits + t, set(1.0f) / (set(1.0f) + exp(-(load(logits + t) + bias))));
  float* base = element<float>(to, c.b, c.h);
  for (int64_t t = 0; t < c.count; ++t) base[token_of(a, r, c.b, c.first + t) * to.stride[2]] = logits[t];
}

/// LayerNorm of one channel's columns, with the bias of the row linear.
static inline void norm_columns(const Args& a, const float* row, const float* bias, float* to) {
  const int64_t width = a.width;
  const auto for_each = [&](auto&& f) {
    for (int64_t j = 0; j < width; j += kLanes) f(j, lanes_below(width - j), load(row + j) + load(bias + j));
  };
  F32 sum = {}, square = {};
  for_each([&](int64_t, I32 within, F32 x) { sum += select(within, x, F32{}); });
  const float mean = reduce_add(sum) / float(width);
  for_each([&](int64_t, I32 within, F32 x) {
    const F32 centred = select(within, x - mean, F32{});
    square = fma(centred, centred, square);
  });
  const float rate = 1.0f / sqrt(reduce_add(square) / float(width) + kNormEpsilon);
  const float *weight = element<float>(a.weights.row_norm_weight), *shift = element<float>(a.weights.row_norm_bias);
  for_each([&](int64_t j, I32, F32 x) {
    const int64_t size = width - j;
    if (size >= kLanes) return store(to + j, fma((x - mean) * rate, load(weight + j), load(shift + j)));
    store_part(to + j, fma((x - mean) * rate, load_part(weight + j, size), load_part(shift + j, size)), size);
  });
}

/// The rows that the decoder reads.
static inline void store_outputs(const Args& a, const Dims& d, const Weights& w, const SeaRows& r, const Chunk& c,
                                 const Rows& rows) {
  for (int64_t t = 0; t < c.count; ++t) {
    const float* row = rows.outputs + t * d.output_pitch;
    float* to = row_at(a, r, c.b, c.first + t) + c.h * d.outputs;
    for (int64_t s = 0; a.is_causal && s < a.splits; ++s)
      norm_columns(a, row + s * a.width, w.row_bias + s * a.width, to + s * a.width);
    for (int64_t j = 0; !a.is_causal && j < d.outputs; j += kLanes) {
      const F32 x = load(row + j) + load(w.row_bias + j);
      if (j + kLanes <= d.outputs)
        store(to + j, x);
      else
        store_part(to + j, x, d.outputs - j);
    }
  }
}

/// The rows of a chunk against a state and, if causal, the keys of the chunk itself.
static inline void encode(const Args& a, const Dims& d, const Weights& w, const SeaRows& r, const Chunk& c,
                          const State& state, const Keys& k, Rows& rows) {
  load_queries(a, d, w, r, c, rows);
  attend(a, d, c.count, state, k, rows);
  for_each_token(a, r, a.v, c,
                 [&](const auto* from, int64_t i) { widen(from, rows.inputs + i * d.input_pitch + d.width, d.dim); });
  linear::product<linear::Into::set>(linear::rows_of(rows.inputs, d.input_pitch), c.count, right_of(w.encoder),
                                     d.inputs, d.width_pitch, linear::into_rows(rows.hidden, d.width_pitch));
  for (int64_t t = 0; t < c.count; ++t)
    activate(d, w, rows.hidden + t * d.width_pitch, rows.scaler[0] + t, rows.scaler[1] + t);
  linear::product<linear::Into::set>(linear::rows_of(rows.hidden, d.width_pitch), c.count, right_of(w.row), d.width,
                                     d.outputs, linear::into_rows(rows.outputs, d.output_pitch));
  store_outputs(a, d, w, r, c, rows);
  const float* bias = element<float>(a.weights.scaler_bias);
  store_sigmoid(a, r, c, rows.scaler[0], bias[0], a.row_scale);
  store_sigmoid(a, r, c, rows.scaler[1], bias[1], a.mix);
}

}  // namespace subquad::cpu::SUBQUAD_ISA::sea
