/// Logits of a tile: what the forward kernels of softmax_attention share.
#pragma once
#include "cpu/exp.h"
#include "cpu/tile.h"
#include "cpu/visible.h"

namespace subquad::cpu::SUBQUAD_ISA {

/// The keys [first, first + count) of a sweep, but for their vectors.
struct alignas(64) KeyTile {
  int64_t first, count;
  bool has_bias, has_gaps;
  float bias[kTileColumns];
  int32_t keep[kTileColumns];    // all ones: has an effect. Otherwise it is masked, or its bias is -inf
  bool keep_rows[kTileColumns];  // the same for the packing
};

/// The key mask and bias of the keys from `first` on; false if none of them has an effect.
static inline bool open_tile(const SoftmaxSweep& sweep, int64_t batch, int64_t head_q, int64_t first, KeyTile& tile) {
  const bool* keep = mask_of(sweep.key_mask, batch);
  const float* bias = nullptr;
  if (const Operand& b = sweep.key_bias; b.data)
    bias = static_cast<const float*>(b.data) + batch * b.stride[0] + head_q / sweep.bias_group * b.stride[1];
  tile.first = first, tile.count = smaller(kTileColumns, sweep.seq_k - first);
  tile.has_bias = bias || sweep.key_norm_bias != 0.0f;
  int64_t kept = 0;
  for (int64_t j = 0; j < kTileColumns; ++j) {
    const bool present = j < tile.count && (!keep || keep[first + j]) && (!bias || bias[first + j] != -kInfinity);
    tile.keep[j] = present ? -1 : 0, tile.keep_rows[j] = present;
    tile.bias[j] = present && bias ? bias[first + j] : 0.0f;
    kept += present;
  }
  tile.has_gaps = kept < tile.count;
  return kept > 0;
}

/// Adds c |k|^2 to the biases, from the packed keys of the tile.
static inline void add_norm_bias(const float* panels, int64_t dim, int64_t panel_depth, float c, KeyTile& tile) {
  for (int64_t j = 0; j < tile.count; j += kLanes) {
    const float* column = panels + j / kPanel * kPanel * panel_depth + j % kPanel;
    F32 square = {};
    for (int64_t d = 0; d < dim; ++d, column += kPanel) square = fma(load(column), load(column), square);
    store(tile.bias + j, fma(set(c), square, load(tile.bias + j)));
  }
}

/// What kTileRows rows see of a tile, counted from its first key. Both ends grow with the row.
struct Seen {
  Interval row[kTileRows];
  Interval all;   // of the rows together, in whole vectors and from a panel on
  bool is_whole;  // every row sees every column of `all`
};

/// From the intervals of keys that the rows see in the sweep.
static inline Seen seen_in_tile(const Interval* rows, const KeyTile& tile) {
  Seen seen;
  for (int r = 0; r < kTileRows; ++r)
    seen.row[r] = clipped(rows[r].lo - tile.first, rows[r].hi - tile.first, tile.count);
  const Interval first = seen.row[0], last = seen.row[kTileRows - 1];
  seen.all = {first.lo / kPanel * kPanel, round_up(last.hi, kLanes)};
  seen.is_whole = last.lo <= seen.all.lo && first.hi >= seen.all.hi;
  return seen;
}

/// A vector of a row of pair biases that begins at the first key of the tile; zeros behind its `count` keys.
static inline F32 load_pair_bias(const float* row, int64_t j, int64_t count) {
  return j + kLanes <= count ? load(row + j) : load_part(row + j, larger(0, count - j));
}

/// Products [kTileRows, kTileColumns] to logits within seen.all: plus the key bias, plus the pair bias, whose rows
/// begin at `pair_bias` (or null); -inf for what a row does not see, whatever the product is.
static inline void finish_logits(const KeyTile& tile, const Seen& seen, const float* const* pair_bias, float* scores) {
  for (int64_t j = seen.all.lo; j < seen.all.hi; j += kLanes) {
    const F32 bias = load(tile.bias + j);
    for (int r = 0; r < kTileRows; ++r) {
      float* to = scores + r * kTileColumns + j;
      store(to, load(to) + bias);
      if (pair_bias) store(to, load(to) + load_pair_bias(pair_bias[r], j, tile.count));
    }
    if (seen.is_whole && !tile.has_gaps) continue;
    const I32 keep = load(tile.keep + j), index = lane_index() + int32_t(j);
    for (int r = 0; r < kTileRows; ++r) {
      float* to = scores + r * kTileColumns + j;
      const I32 inside = (index >= int32_t(seen.row[r].lo)) & (index < int32_t(seen.row[r].hi)) & keep;
      store(to, select(inside, load(to), set(-kInfinity)));
    }
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA
