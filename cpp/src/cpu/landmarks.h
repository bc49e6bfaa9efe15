/// The landmarks of one head, packed as the right factor of products with rows of samples or of queries.
///
/// The scores of some rows with all landmarks lie in tiles of kTileColumns columns behind each other: row r of landmark
/// c at c / kTileColumns * tile_stride + r * kTileColumns + c % kTileColumns. Landmarks that do not exist are rows of
/// zeros here.
#pragma once
#include "cpu/exp.h"
#include "cpu/tile.h"
#include "cpu/unit_row.h"

namespace subquad::cpu::SUBQUAD_ISA {

struct Landmarks {
  int64_t count, dim, pitch;
  int64_t width;        // columns that are formed: count, rounded up to whole vectors and whole rows of a register tile
  int64_t tile_stride;  // floats from one tile of scores to the next
  int64_t existing;     // how many exist
  bool* keep;           // [count]
  int32_t* exists;      // [width], all ones where a landmark exists
  float* panels;        // [width / kPanel][pitch, kPanel]
  float* rows;          // [tiles][pitch / kPanel][kTileColumns, kPanel]; null where not wanted
  float* packing;       // [kPanel, pitch]
};

static inline int64_t tiles_of(const Landmarks& l) { return (l.count + kTileColumns - 1) / kTileColumns; }

/// Floats of scores for `rows` rows.
static inline int64_t scores_size(const Landmarks& l, int64_t rows) { return tiles_of(l) * rows * kTileColumns; }

/// `score_rows`: rows of scores that are held together.
static inline Landmarks lay_out_landmarks(Arena& arena, int64_t count, int64_t dim, int64_t score_rows, bool rows) {
  Landmarks l = {};
  l.count = count, l.dim = dim, l.pitch = padded(dim);
  l.width = round_up(count, larger(kLanes, kTileRows)), l.tile_stride = score_rows * kTileColumns;
  l.keep = take<bool>(arena, count);
  l.exists = take<int32_t>(arena, l.width);
  l.panels = take<float>(arena, round_up(count, kPanel) * l.pitch);
  l.rows = rows ? take<float>(arena, tiles_of(l) * kTileColumns * round_up(l.pitch, kPanel)) : nullptr;
  l.packing = take<float>(arena, kPanel * l.pitch);
  return l;
}

/// Reads which landmarks of item b exist.
static inline void find_existing(Landmarks& l, const Operand& counts, int64_t b) {
  const int32_t* count = counts.data ? static_cast<const int32_t*>(counts.data) + b * counts.stride[0] : nullptr;
  l.existing = 0;
  for (int64_t c = 0; c < l.count; ++c) {
    l.keep[c] = !count || count[c] > 0;
    l.exists[c] = -int32_t(l.keep[c]);
    l.existing += l.keep[c];
  }
  for (int64_t c = l.count; c < l.width; ++c) l.exists[c] = 0;
}

/// Packs the landmarks [first, first + kPanel), whose rows lie in `l.packing`.
static inline void pack_landmarks(const Landmarks& l, int64_t first) {
  transpose_rows(l.packing, l.pitch, l.panels + first * l.pitch);
  if (!l.rows) return;
  float* tile = l.rows + first / kTileColumns * (kTileColumns * round_up(l.pitch, kPanel));
  split_rows(l.packing, l.pitch, first % kTileColumns, tile);
}

/// Calls f(offset in a row of scores, c) for each vector of landmarks.
template <class F>
static inline void for_each_vector(const Landmarks& l, F&& f) {
  for (int64_t c = 0; c < l.width; c += kLanes) f(c / kTileColumns * l.tile_stride + c % kTileColumns, c);
}

static inline int64_t columns_of_tile(const Landmarks& l, int64_t tile) {
  return smaller(kTileColumns, l.width - tile * kTileColumns);
}

/// Scores of kTileRows rows, at column `a` of a transposed panel, with all landmarks.
static inline void form_scores(const Landmarks& l, const float* a, float* scores) {
  for (int64_t t = 0; t < tiles_of(l); ++t)
    product_of_panels(a, l.panels + t * kTileColumns * l.pitch, l.dim, l.pitch, scores + t * l.tile_stride,
                      columns_of_tile(l, t));
}

/// sums [kTileRows, pitch] += weights times landmarks.
static inline void add_landmarks(const Landmarks& l, const float* weights, float* sums) {
  const int64_t tile_size = kTileColumns * round_up(l.pitch, kPanel);
  for (int64_t t = 0; t < tiles_of(l); ++t)
    add_weighted_rows(weights + t * l.tile_stride, l.rows + t * tile_size, columns_of_tile(l, t), sums, l.pitch,
                      l.pitch);
}

/// sums [width, pitch] += the transpose of the weights of `count` rows, times these rows, cut into panels.
static inline void add_rows_to_landmarks(const Landmarks& l, const float* weights, const float* rows, int64_t count,
                                         float* sums) {
  for (int64_t c = 0; c < l.width; c += kTileRows)
    tile_product<true, 1, kTileColumns>(weights + c / kTileColumns * l.tile_stride + c % kTileColumns, rows,
                                        kTileColumns, count, sums + c * l.pitch, l.pitch, l.dim);
}

}  // namespace subquad::cpu::SUBQUAD_ISA
