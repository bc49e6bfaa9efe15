/// Weights of the encoder of sea_estimate, packed once per call as the products of cpu/linear_product.h read them.
#pragma once
#include "core/parallel.h"
#include "cpu/linear_product.h"
#include "cpu/unit_row.h"
#include "ops/sea_estimate_args.h"

namespace subquad::cpu::SUBQUAD_ISA::sea {

using Args = SeaEstimateArgs;

/// Widths of the rows that the encoder holds. Rounded up they have room for whole panels.
struct Dims {
  int64_t dim, features, width, inputs;  // d, m, 2d, 3d
  int64_t dim_pitch, feature_pitch, width_pitch, input_pitch;
  int64_t feature_rows;           // features as rows of a product
  int64_t sum_pitch;              // of sums over features
  int64_t outputs, output_pitch;  // of the row linear
};

static inline Dims dims_of(const Args& a) {
  Dims d = {};
  d.dim = a.dim, d.features = a.features, d.width = 2 * a.dim, d.inputs = 3 * a.dim;
  d.dim_pitch = padded(d.dim), d.feature_pitch = round_up(padded(d.features), kPanel);
  d.sum_pitch = d.feature_pitch + kPanel;
  d.width_pitch = round_up(d.width, kPanel), d.input_pitch = round_up(d.inputs, kPanel);
  // One more behind those of the exponential: it is 1, and carries what their epsilon is a multiple of.
  d.feature_rows = round_up(d.features + !a.is_causal, kTileRows);
  d.outputs = a.splits * a.width;
  // Room for a whole vector from any output on.
  d.output_pitch = round_up(d.outputs + kLanes, kPanel);
  return d;
}

/// x W^T for a weight W [outputs, inputs]: panels [outputs / kPanel][pitch, kPanel], zero where W ends.
struct PackedWeight {
  float* panels;
  int64_t pitch;
};

struct Weights {
  PackedWeight projection, encoder, row;
  float* projection_rows;                         // [feature_rows, dim_pitch]
  float *encoder_bias, *norm_weight, *norm_bias;  // [width_pitch], zero behind the width
  float* width_mask;                              // [width_pitch] 1 within the width, 0 behind it
  float* scaler;                                  // [2, width_pitch]
  float* row_bias;                                // [output_pitch]
};

static inline linear::Right right_of(const PackedWeight& w) { return {w.panels, w.pitch * kPanel}; }

static inline PackedWeight take_packed(Arena& arena, int64_t outputs, int64_t inputs) {
  const int64_t pitch = padded(inputs);
  return {take<float>(arena, round_up(outputs, kPanel) * pitch), pitch};
}

static inline Weights take_weights(Arena& arena, const Dims& d) {
  Weights w = {};
  w.projection = take_packed(arena, d.feature_pitch, d.dim);
  w.encoder = take_packed(arena, d.width, d.inputs);
  w.row = take_packed(arena, d.outputs, d.width);
  w.projection_rows = take<float>(arena, d.feature_rows * d.dim_pitch);
  w.encoder_bias = take<float>(arena, d.width_pitch);
  w.norm_weight = take<float>(arena, d.width_pitch);
  w.norm_bias = take<float>(arena, d.width_pitch);
  w.width_mask = take<float>(arena, d.width_pitch);
  w.scaler = take<float>(arena, 2 * d.width_pitch);
  w.row_bias = take<float>(arena, d.output_pitch);
  return w;
}

/// d^-1/4, by a step of Newton's method so that rounding it to float is the only error.
static inline double feature_scale(const Dims& d) {
  const double x = 1.0f / sqrt(sqrt(float(d.dim)));
  return x * (1.25 - 0.25 * double(d.dim) * x * x * x * x);
}

/// One panel of a weight [outputs, inputs].
static inline void pack_panel(const Operand& weight, int64_t outputs, int64_t inputs, int64_t panel, float scale,
                              const PackedWeight& to) {
  const float* from = static_cast<const float*>(weight.data);
  alignas(64) float rows[kPanel * 16];
  for (int64_t k = 0; k < to.pitch; k += 16) {
    const int64_t size = larger(0, smaller(16, inputs - k));
    memset(rows, 0, sizeof rows);
    for (int64_t r = 0; r < smaller(kPanel, outputs - panel * kPanel); ++r) {
      widen(from + (panel * kPanel + r) * weight.stride[0] + k, rows + r * 16, size);
      scale_row(rows + r * 16, 16, scale);
    }
    transpose_rows(rows, 16, to.panels + (panel * to.pitch + k) * kPanel);
  }
}

/// A vector of `size` floats, zeros behind it.
static inline void pack_vector(const float* from, int64_t size, int64_t pitch, float* to) {
  memcpy(to, from, size_t(size) * sizeof(float));
  for (int64_t i = size; i < pitch; ++i) to[i] = 0;
}

static inline void pack_small_weights(const SeaWeightArgs& from, const Dims& d, const Weights& w) {
  const float scale = float(feature_scale(d));
  for (int64_t i = 0; i < d.feature_rows; ++i) {
    float* row = w.projection_rows + i * d.dim_pitch;
    pack_vector(element<float>(from.projection, i), i < d.features ? d.dim : 0, d.dim_pitch, row);
    scale_row(row, d.dim_pitch, scale);
  }
  pack_vector(element<float>(from.encoder_bias), d.width, d.width_pitch, w.encoder_bias);
  pack_vector(element<float>(from.encoder_norm_weight), d.width, d.width_pitch, w.norm_weight);
  pack_vector(element<float>(from.encoder_norm_bias), d.width, d.width_pitch, w.norm_bias);
  for (int64_t i = 0; i < d.width_pitch; ++i) w.width_mask[i] = i < d.width;
  for (int64_t i = 0; i < 2; ++i)
    pack_vector(element<float>(from.scaler_weight, i), d.width, d.width_pitch, w.scaler + i * d.width_pitch);
  pack_vector(element<float>(from.row_bias), d.outputs, d.output_pitch, w.row_bias);
}

static inline void pack_weights(const Queue& queue, const Args& a, const Dims& d, const Weights& w) {
  const int64_t encoder = d.width_pitch / kPanel, row = round_up(d.outputs, kPanel) / kPanel;
  const int64_t projection = d.feature_pitch / kPanel;
  core::parallel_for(queue, encoder + row + projection + 1, [&](int64_t task, int) {
    int64_t panel = task;
    if (panel < encoder) return pack_panel(a.weights.encoder_weight, d.width, d.inputs, panel, 1.0f, w.encoder);
    panel -= encoder;
    if (panel < row) return pack_panel(a.weights.row_weight, d.outputs, d.width, panel, 1.0f, w.row);
    panel -= row;
    if (panel < projection)
      return pack_panel(a.weights.projection, d.features, d.dim, panel, float(feature_scale(d)), w.projection);
    pack_small_weights(a.weights, d, w);
  });
}

}  // namespace subquad::cpu::SUBQUAD_ISA::sea
