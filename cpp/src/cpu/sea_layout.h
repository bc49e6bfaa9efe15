/// What the encoder of sea_estimate leaves for the decoder: the rows of the row linear, and the tokens they stand for.
///
/// Row t of an item belongs to its t-th valid token, t in [0, counts[b]), and holds [C, w] floats: output j of the row
/// linear of head h is element h (C / H) w + j. Causal items have kHistory rows in front, t in [-kHistory, 0): rows1 of
/// the state that came in, or zeros. The encoder writes all of these, row_scale, mix and the states s, z and count; of
/// probs it writes the zeros of masked tokens. The decoder writes the probs of valid tokens, and the states rows1 (the
/// last kHistory rows, history included) and rows2.
#pragma once
#include "ops/sea_estimate_args.h"

namespace subquad::cpu::SUBQUAD_ISA::sea {

/// Rows before the present one that a convolution of the causal decoder reaches.
static constexpr int64_t kHistory = 4;

/// Of every LayerNorm.
static constexpr float kNormEpsilon = 1e-5f;

struct SeaRows {
  float* rows;         // [B, history + N, C, w]
  int32_t* counts;     // [B] valid tokens
  int32_t* positions;  // [B, N] the token of each rank below counts[b]; null without a mask
};

static inline int64_t history_of(const SeaEstimateArgs& a) { return a.is_causal ? kHistory : 0; }

/// Floats of a row.
static inline int64_t row_size(const SeaEstimateArgs& a) { return a.channels * a.width; }

/// Row t of item b, t in [-history, counts[b]); rows of an item lie behind each other.
static inline float* row_at(const SeaEstimateArgs& a, const SeaRows& r, int64_t b, int64_t t) {
  const int64_t history = history_of(a);
  return r.rows + (b * (history + a.seq) + history + t) * row_size(a);
}

/// The token of rank t of item b.
static inline int64_t token_of(const SeaEstimateArgs& a, const SeaRows& r, int64_t b, int64_t t) {
  return r.positions ? r.positions[b * a.seq + t] : t;
}

static inline SeaRows take_sea_rows(Arena& arena, const SeaEstimateArgs& a) {
  SeaRows r = {};
  r.rows = take<float>(arena, a.batch * (history_of(a) + a.seq) * row_size(a));
  r.counts = take<int32_t>(arena, a.batch);
  if (a.key_mask.data) r.positions = take<int32_t>(arena, a.batch * a.seq);
  return r;
}

}  // namespace subquad::cpu::SUBQUAD_ISA::sea
