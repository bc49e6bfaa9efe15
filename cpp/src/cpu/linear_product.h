/// Products of small matrices whose left factor is read one element at a time, for both passes of linear_attention:
///
///   C[r, c] = sum_d A[r, d] B[d, c],   added to C, or to C with its rows scaled
///
/// Each element of C is a fixed chain of fused multiply-adds in the order of d, cut every kDepth steps, so its bits do
/// not depend on how rows are grouped, and zeros at the end of a row of A change none.
#pragma once
#include "cpu/tile.h"

namespace subquad::cpu::SUBQUAD_ISA::linear {

// A panel of B of this depth (32 KiB with AVX-512) stays in the L1 cache while all rows of A pass by.
static constexpr int64_t kDepth = 256;

/// A: element (r, d) is data[r * row_step + d / piece * piece_step + d % piece].
struct Left {
  const float* data;
  int64_t row_step, piece, piece_step;
};

/// Rows behind each other.
static inline Left rows_of(const float* rows, int64_t pitch) { return {rows, pitch, int64_t(1) << 40, 0}; }

/// Panels [count, kPanel] behind each other, each with kPanel columns of A.
static inline Left panels_of(const float* panels, int64_t count) { return {panels, kPanel, kPanel, count * kPanel}; }

/// B: panels [depth, kPanel], of which each has kPanel columns.
struct Right {
  const float* data;
  int64_t panel_step;
};

/// C: element (r, c) is data[r * row_step + c / kPanel * panel_step + c % kPanel].
struct Target {
  float* data;
  int64_t row_step, panel_step;
};

static inline Target into_rows(float* rows, int64_t pitch) { return {rows, pitch, kPanel}; }
static inline Target into_panels(float* panels, int64_t count) { return {panels, kPanel, count * kPanel}; }

enum class Into { set, add, scaled };

template <Into mode, int Vectors>
static inline void tile_of(const Left& a, const float* panel, int64_t depth, float* c, int64_t c_step,
                           const float* scale) {
  F32 sum[kTileRows][Vectors] = {};
  const int64_t step = a.row_step;
  for (const float* piece = a.data; depth > 0; depth -= a.piece, piece += a.piece_step) {
    const float *end = piece + smaller(depth, a.piece), *at = piece;
    for (; at < end; ++at, panel += kPanel) {
      F32 b[Vectors];
      for (int v = 0; v < Vectors; ++v) b[v] = load(panel + v * kLanes);
      for (int r = 0; r < kTileRows; ++r) {
        const F32 element = set(at[r * step]);
        for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(element, b[v], sum[r][v]);
      }
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      float* to = c + r * c_step + v * kLanes;
      if constexpr (mode == Into::set) store(to, sum[r][v]);
      if constexpr (mode == Into::add) store(to, load(to) + sum[r][v]);
      if constexpr (mode == Into::scaled) store(to, fma(load(to), set(scale[r]), sum[r][v]));
    }
  }
}

template <Into mode>
static inline void block_of(const Left& a, int64_t rows, const Right& b, int64_t depth, int64_t columns,
                            const Target& c, const float* scale) {
  for (int64_t j = 0; j < columns; j += kPanel) {
    const float* panel = b.data + j / kPanel * b.panel_step;
    float* to = c.data + j / kPanel * c.panel_step;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const Left part = {a.data + r * a.row_step, a.row_step, a.piece, a.piece_step};
      const float* factors = mode == Into::scaled ? scale + r : nullptr;
      if (columns - j > kLanes)
        tile_of<mode, kPanelVectors>(part, panel, depth, to + r * c.row_step, c.row_step, factors);
      else
        tile_of<mode, 1>(part, panel, depth, to + r * c.row_step, c.row_step, factors);
    }
  }
}

/// `rows` of C (rounded up to kTileRows), `columns` of it (rounded up to whole vectors); `scale` for Into::scaled, one
/// factor per row of C.
template <Into mode>
static inline void product(const Left& a, int64_t rows, const Right& b, int64_t depth, int64_t columns, const Target& c,
                           const float* scale = nullptr) {
  block_of<mode>(a, rows, b, smaller(depth, kDepth), columns, c, scale);
  for (int64_t d = kDepth; d < depth; d += kDepth) {
    const Left part = {a.data + d / a.piece * a.piece_step + d % a.piece, a.row_step, a.piece, a.piece_step};
    block_of<Into::add>(part, rows, {b.data + d * kPanel, b.panel_step}, smaller(depth - d, kDepth), columns, c,
                        nullptr);
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA::linear
