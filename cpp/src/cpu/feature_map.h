/// What the forward and the backward pass of feature_map share: tokens as one axis, the packed projection, the maps.
///
/// The tokens of all heads and batches that meet one row block of the projection form one axis t = (b, head, n), so
/// that tiles are full however short the sequences are.
#pragma once
#include "core/parallel.h"
#include "cpu/exp.h"
#include "cpu/sin_cos.h"
#include "cpu/tile.h"
#include "cpu/unit_row.h"
#include "ops/feature_map_args.h"

namespace subquad::cpu::SUBQUAD_ISA {

/// Tokens, and features, of a tile.
static constexpr int64_t kTile = kTileColumns;

static inline int64_t panels_pitch(int64_t pitch) { return round_up(pitch, kPanel); }
static inline int64_t feature_tiles(const FeatureMapArgs& a) { return (a.num_features + kTile - 1) / kTile; }
static inline int64_t heads_of_block(const FeatureMapArgs& a) {
  return a.projection_heads ? a.heads / a.projection_heads : 0;
}
static inline int64_t tokens_of_block(const FeatureMapArgs& a) { return a.batch * heads_of_block(a) * a.seq; }

/// A tile of consecutive tokens of one row block: where each lies, and whether it is there and not masked.
struct Tokens {
  int64_t count, b[kTile], h[kTile], n[kTile];
  bool keep[kTile];
};

static inline void find_tokens(const FeatureMapArgs& a, int64_t block, int64_t first, int64_t count, Tokens& t) {
  const int64_t heads = heads_of_block(a), head = block * heads;
  t.count = count;
  t.n[0] = first % a.seq, t.h[0] = head + first / a.seq % heads, t.b[0] = first / a.seq / heads;
  for (int64_t i = 1; i < count; ++i) {
    t.n[i] = t.n[i - 1] + 1, t.h[i] = t.h[i - 1], t.b[i] = t.b[i - 1];
    if (t.n[i] == a.seq) t.n[i] = 0, ++t.h[i];
    if (t.h[i] == head + heads) t.h[i] = head, ++t.b[i];
  }
  for (int64_t i = 0; i < kTile; ++i) {
    const bool* mask = i < count ? mask_of(a.mask, t.b[i]) : nullptr;
    t.keep[i] = i < count && (!mask || mask[t.n[i]]);
  }
}

static inline int64_t offset_of(const Operand& x, const Tokens& t, int64_t i) {
  return t.b[i] * x.stride[0] + t.h[i] * x.stride[1] + t.n[i] * x.stride[2];
}

static inline void load_row(const Operand& x, const Tokens& t, int64_t i, float* row, int64_t dim) {
  visit_float(x.dtype, [&](auto tag) {
    widen_padded(static_cast<const decltype(tag)*>(x.data) + offset_of(x, t, i), row, dim);
  });
}

/// Rows first, ..., first + kPanel - 1 of the tile as f32 [kPanel, pitch]; zero for tokens that are not to be kept,
/// whatever they hold.
static inline void gather_tokens(const Operand& x, const Tokens& t, int64_t first, int64_t dim, float* rows,
                                 int64_t pitch) {
  visit_float(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t r = 0; r < kPanel; ++r) {
      const int64_t i = first + r;
      if (t.keep[i]) widen(static_cast<const T*>(x.data) + offset_of(x, t, i), rows + r * pitch, dim);
      const int64_t end = t.keep[i] ? dim : 0;
      memset(rows + r * pitch + end, 0, size_t(pitch - end) * sizeof(float));
    }
  });
}

/// The rows of the projection, packed once for all tokens, kTile features behind each other.
struct PackedProjection {
  float* columns;  // [Hp, tiles, kTile / kPanel, pitch, kPanel]: to multiply tokens with
  float* rows;     // [Hp, tiles, panels, kTile, kPanel]: to be summed with weights; null where not needed
};

static inline PackedProjection take_projection(Arena& arena, const FeatureMapArgs& a, bool columns, bool rows) {
  const int64_t features = a.projection_heads * feature_tiles(a) * kTile, pitch = padded(a.dim);
  PackedProjection packed;
  packed.columns = take<float>(arena, columns * features * pitch);
  packed.rows = take<float>(arena, rows * features * panels_pitch(pitch));
  if (!columns) packed.columns = nullptr;
  if (!rows) packed.rows = nullptr;
  return packed;
}

static inline const float* columns_of(const PackedProjection& p, const FeatureMapArgs& a, int64_t block, int64_t tile) {
  return p.columns + (block * feature_tiles(a) + tile) * kTile * padded(a.dim);
}

static inline const float* rows_of(const PackedProjection& p, const FeatureMapArgs& a, int64_t block, int64_t tile) {
  return p.rows + (block * feature_tiles(a) + tile) * kTile * panels_pitch(padded(a.dim));
}

/// Packs in parallel; `rows(worker)` is room for [kPanel, pitch] floats.
template <class F>
static inline void pack_projection(const Queue& queue, const FeatureMapArgs& a, const PackedProjection& packed,
                                   F&& rows) {
  const int64_t pitch = padded(a.dim), tiles = feature_tiles(a);
  Operand projection = a.projection;
  projection.stride[1] = a.projection.stride[0], projection.stride[2] = a.projection.stride[1];
  core::parallel_for(queue, a.projection_heads * tiles, [&](int64_t task, int worker) {
    const int64_t block = task / tiles, tile = task % tiles;
    float* x = rows(worker);
    for (int64_t r = 0; r < kTile; r += kPanel) {
      const int64_t first = tile * kTile + r, count = larger(0, smaller(kPanel, a.num_features - first));
      gather_rows(projection, 0, block, first, count, nullptr, a.dim, x, pitch);
      if (packed.columns) transpose_rows(x, pitch, const_cast<float*>(columns_of(packed, a, block, tile)) + r * pitch);
      if (packed.rows) split_rows(x, pitch, r, const_cast<float*>(rows_of(packed, a, block, tile)));
    }
  });
}

/// A map with a projection, as features or as logarithms.
template <Features kMap, bool kLogarithms>
struct Map {
  static constexpr Features features = kMap;
  static constexpr bool log = kLogarithms;
  static constexpr bool two = kMap == Features::trig || kMap == Features::hyperbolic;  // F' = 2 F
  static constexpr bool exponential = kMap == Features::positive || kMap == Features::hyperbolic;
};

/// Calls f(Map<...>{}) for that of the arguments.
template <class F>
static inline void visit_map(const FeatureMapArgs& a, F&& f) {
  if (a.features == Features::positive && a.log) f(Map<Features::positive, true>{});
  if (a.features == Features::positive && !a.log) f(Map<Features::positive, false>{});
  if (a.features == Features::hyperbolic && a.log) f(Map<Features::hyperbolic, true>{});
  if (a.features == Features::hyperbolic && !a.log) f(Map<Features::hyperbolic, false>{});
  if (a.features == Features::trig) f(Map<Features::trig, false>{});
  if (a.features == Features::relu) f(Map<Features::relu, false>{});
}

/// What turns products <w_i, x> into features.
struct Factors {
  float root;    // sqrt(s)
  float factor;  // 1 / sqrt(F'), or 1 / sqrt(F) for trig and relu
};

static inline Factors factors_of(const FeatureMapArgs& a) {
  const int64_t count = a.features == Features::hyperbolic ? 2 * a.num_features : a.num_features;
  return {sqrt(a.scale), 1.0f / sqrt(float(count))};
}

struct FeaturePair {
  F32 first, second;
};

/// The features of products p = <w_i, x>, with half_square = |x~|^2 / 2; `second` only where there are two.
template <class M>
static inline FeaturePair features_of(M, F32 p, F32 half_square, const Factors& by) {
  const F32 root = set(by.root), factor = set(by.factor);
  if constexpr (M::exponential) {
    FeaturePair y = {fma(root, p, -half_square), F32{}};
    if (M::two) y.second = fma(-root, p, -half_square);
    if (!M::log) y.first = exp(y.first) * factor;
    if (!M::log && M::two) y.second = exp(y.second) * factor;
    return y;
  } else if constexpr (M::features == Features::trig) {
    const SinCos y = sin_cos(root * p);
    return {y.sin * factor, y.cos * factor};
  } else {
    return {max(F32{}, root * p) + set(1e-3f) * factor, F32{}};
  }
}

/// Tokens of a task of the element-wise map: enough to pay for waking a thread.
static inline int64_t elements_task(const FeatureMapArgs& a) { return 1 + 16384 / (a.dim + 16); }

}  // namespace subquad::cpu::SUBQUAD_ISA
