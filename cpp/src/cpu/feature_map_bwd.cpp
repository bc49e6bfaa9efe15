#include "cpu/feature_map.h"
#include "cpu/table.h"

// Tile by tile of tokens and features: the products are computed again, turned with dout into the gradient of the
// products (the weights), and those are multiplied with the rows of the projection (into dx) and, transposed, with the
// tokens (into dprojection). The tokens of a row block are cut into pieces whose number depends on shapes only; each
// piece sums its own dprojection, and the sums of the pieces are added in order.

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = FeatureMapArgs;

struct Pieces {
  int64_t tokens, count, rows;  // tokens of a piece, pieces of a row block, rows of a sum of dprojection
};

/// Some 64 pieces in all feed many threads; their sums take at most 64 MiB (or one piece for each row block).
Pieces cut_tokens(const Args& a) {
  const int64_t tokens = tokens_of_block(a), blocks = larger(a.projection_heads, 1);
  const int64_t rows = feature_tiles(a) * kTile, room = (int64_t(1) << 24) / (blocks * rows * padded(a.dim));
  const int64_t wanted = larger(1, smaller((63 + blocks) / blocks, room));
  const int64_t piece = larger(256, round_up((tokens + wanted - 1) / wanted, kTile));
  return {piece, (tokens + piece - 1) / piece, rows};
}

struct Scratch {
  float* rows;         // [kPanel, pitch]
  float* columns;      // [kTile / kPanel, pitch, kPanel], the transposed tokens of a tile
  float* tokens;       // [panels, kTile, kPanel], the same tokens as rows
  float* products;     // [kTileRows, kTile]
  float* weights;      // [kTile, kTile], the gradient of the products, by tokens
  float* dx;           // [kTile, pitch]
  float* sums;         // [kTile, kLanes]: sums over the features of the gradient of the logarithms
  float* half_square;  // [kTile]
};

Scratch lay_out(Arena& arena, const Args& a) {
  const int64_t pitch = padded(a.dim);
  Scratch s;
  s.rows = take<float>(arena, kPanel * pitch);
  s.columns = take<float>(arena, kTile * pitch);
  s.tokens = take<float>(arena, kTile * panels_pitch(pitch));
  s.products = take<float>(arena, kTileRows * kTile);
  s.weights = take<float>(arena, kTile * kTile);
  s.dx = take<float>(arena, kTile * pitch);
  s.sums = take<float>(arena, kTile * kLanes);
  s.half_square = take<float>(arena, kTile);
  return s;
}

template <class T>
inline F32 load_some(const T* from, int64_t count) {
  if (count >= kLanes) return load(from);
  float lane[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lane[i] = to_float(from[i]);
  return load(lane);
}

void pack_tokens(const Args& a, const Tokens& tokens, const Scratch& s) {
  const int64_t pitch = padded(a.dim);
  for (int64_t first = 0; first < tokens.count; first += kPanel) {
    gather_tokens(a.x, tokens, first, a.dim, s.rows, pitch);
    for (int64_t r = 0; r < kPanel; ++r)
      s.half_square[first + r] = 0.5f * a.scale * dot(s.rows + r * pitch, s.rows + r * pitch, pitch);
    transpose_rows(s.rows, pitch, s.columns + first * pitch);
    split_rows(s.rows, pitch, first, s.tokens);
  }
}

/// The gradient of <w_i, x~> for one row of a tile, and what it adds to that of -|x~|^2 / 2.
template <class M, class T>
inline void weigh_row(M map, const T* dout, const float* products, float half_square, const Factors& by,
                      int64_t columns, int64_t num_features, float* weights, float* sums) {
  F32 sum = load(sums);
  for (int64_t j = 0; j < kTile; j += kLanes) {
    const int64_t count = larger(0, smaller(columns - j, kLanes));
    const F32 d = load_some(dout + j, count);
    const F32 d2 = M::two ? load_some(dout + num_features + j, count) : F32{};
    if constexpr (M::log) {
      store(weights + j, d - d2);
      sum += d + d2;
      continue;
    }
    const F32 p = load(products + j);
    if constexpr (M::features == Features::relu) {
      store(weights + j, select(p <= F32{}, F32{}, d));
      continue;
    }
    const FeaturePair y = features_of(map, p, set(half_square), by);
    if constexpr (M::exponential) {
      const F32 first = d * y.first, second = d2 * y.second;
      store(weights + j, first - second);
      sum += first + second;
    } else {
      store(weights + j, d * y.second - d2 * y.first);
    }
  }
  store(sums, sum);
}

/// Weights of all tokens of the tile and features of one tile; those of masked tokens, and behind the last, are zero.
template <class M, class T>
void weigh_tile(M map, T*, const Args& a, const float* projection, const Tokens& tokens, int64_t first,
                const Scratch& s) {
  const int64_t pitch = padded(a.dim), columns = smaller(kTile, a.num_features - first);
  const Factors by = factors_of(a);
  const T* dout = static_cast<const T*>(a.dout.data) + first;
  for (int64_t r = 0; r < tokens.count; r += kTileRows) {
    const float* x = s.columns + r / kPanel * (kPanel * pitch) + r % kPanel;
    if (!M::log) product_of_panels(x, projection, a.dim, pitch, s.products, kTile);
    for (int64_t i = r; i < r + kTileRows; ++i) {
      if (tokens.keep[i])
        weigh_row(map, dout + offset_of(a.dout, tokens, i), s.products + (i - r) * kTile, s.half_square[i], by, columns,
                  a.num_features, s.weights + i * kTile, s.sums + i * kLanes);
      else
        memset(s.weights + i * kTile, 0, size_t(kTile) * sizeof(float));
    }
  }
}

/// dx = sqrt(s) (weights W) + c s x, with c the gradient of |x~|^2 / 2.
void finish_tokens(const Args& a, const Tokens& tokens, const Scratch& s) {
  const int64_t pitch = padded(a.dim);
  const float root = factors_of(a).root;
  const float* dlog_factor = static_cast<const float*>(a.dlog_factor.data);
  const bool exponential = a.features == Features::positive || a.features == Features::hyperbolic;
  for (int64_t i = 0; i < tokens.count; ++i) {
    float* dx = s.dx + i * pitch;
    scale_row(dx, pitch, root);
    if (exponential || dlog_factor) {
      float c = exponential ? -reduce_add(load(s.sums + i * kLanes)) : 0.0f;
      if (!exponential && tokens.keep[i]) c = dlog_factor[offset_of(a.dlog_factor, tokens, i)];
      for (int64_t d = 0; d < pitch; d += kLanes) {
        const F32 x = load(s.tokens + d / kPanel * (kTile * kPanel) + i * kPanel + d % kPanel);
        store(dx + d, fma(set(c * a.scale), x, load(dx + d)));
      }
    }
    store_row(a.dx, tokens.b[i], tokens.h[i], tokens.n[i], dx, a.dim);
  }
}

/// One tile of tokens against all features; `dprojection` is the sum of the piece, or null.
void visit_tokens(const Args& a, const PackedProjection& packed, int64_t block, const Tokens& tokens, const Scratch& s,
                  float* dprojection) {
  const int64_t pitch = padded(a.dim);
  pack_tokens(a, tokens, s);
  memset(s.dx, 0, size_t(kTile * pitch) * sizeof(float));
  memset(s.sums, 0, size_t(kTile * kLanes) * sizeof(float));
  for (int64_t tile = 0; tile < feature_tiles(a); ++tile) {
    const int64_t first = tile * kTile, columns = smaller(kTile, a.num_features - first);
    const float* projection = packed.columns ? columns_of(packed, a, block, tile) : nullptr;
    visit_float(a.dout.dtype, [&](auto tag) {
      visit_map(
          a, [&](auto map) { weigh_tile(map, static_cast<decltype(tag)*>(nullptr), a, projection, tokens, first, s); });
    });
    if (packed.rows)
      for (int64_t r = 0; r < tokens.count; r += kTileRows)
        add_weighted_rows(s.weights + r * kTile, rows_of(packed, a, block, tile), columns, s.dx + r * pitch, pitch,
                          pitch);
    if (dprojection)
      for (int64_t i = 0; i < columns; i += kTileRows)
        tile_product<true, 1, kTile>(s.weights + i, s.tokens, kTile, tokens.count, dprojection + (first + i) * pitch,
                                     pitch, pitch);
  }
  if (a.dx.data) finish_tokens(a, tokens, s);
}

struct Plan {
  Queue queue;
  Pieces pieces;
  int64_t worker_bytes;
  PackedProjection packed;
  float* sums;  // [Hp, pieces, rows, pitch], null without dprojection
};

Plan plan(const Queue& queue, const Args& a, Arena& arena) {
  Plan p = {queue, cut_tokens(a), 0, {}, nullptr};
  const int64_t most = a.projection_heads * larger(p.pieces.count, a.num_features);
  p.queue.num_threads = int32_t(larger(1, smaller(queue.num_threads, most)));
  Arena worker = {};
  lay_out(worker, a);
  p.worker_bytes = worker.used;
  p.packed = take_projection(arena, a, !a.log, a.dx.data != nullptr);
  if (a.dprojection.data)
    p.sums = take<float>(arena, a.projection_heads * p.pieces.count * p.pieces.rows * padded(a.dim));
  return p;
}

/// dprojection = sqrt(s) * the sum of the sums of the pieces, in order.
void add_pieces(const Plan& p, const Args& a) {
  const int64_t pitch = padded(a.dim), stride = p.pieces.rows * pitch, task_rows = 1 + 16384 / (pitch + 16);
  const int64_t rows = a.projection_heads * a.num_features;
  const F32 root = set(factors_of(a).root);
  core::parallel_for(p.queue, (rows + task_rows - 1) / task_rows, [&](int64_t task, int) {
    alignas(64) float row[kMaxHeadDim];
    for (int64_t i = task * task_rows; i < smaller((task + 1) * task_rows, rows); ++i) {
      const int64_t block = i / a.num_features, feature = i % a.num_features;
      const float* first = p.sums + block * p.pieces.count * stride + feature * pitch;
      for (int64_t d = 0; d < pitch; d += kLanes) {
        F32 sum = {};
        for (int64_t piece = 0; piece < p.pieces.count; ++piece) sum += load(first + piece * stride + d);
        store(row + d, root * sum);
      }
      store_row(a.dprojection, block, feature, 0, row, a.dim);
    }
  });
}

/// dout where x > 0, else dout e^x.
void elements_gradient(const Queue& queue, const Args& a) {
  const int64_t tokens = tokens_of_block(a), task_tokens = elements_task(a);
  core::parallel_for(queue, (tokens + task_tokens - 1) / task_tokens, [&](int64_t task, int) {
    const int64_t end = smaller((task + 1) * task_tokens, tokens);
    alignas(64) float row[kMaxHeadDim], dout[kMaxHeadDim];
    Tokens t;
    for (int64_t first = task * task_tokens; first < end; first += kTile) {
      find_tokens(a, 0, first, smaller(kTile, end - first), t);
      for (int64_t i = 0; i < t.count; ++i) {
        load_row(a.x, t, i, row, a.dim);
        load_row(a.dout, t, i, dout, a.dim);
        for (int64_t d = 0; d < a.dim; d += kLanes) {
          const F32 x = load(row + d), cotangent = load(dout + d);
          const F32 slope = select(x > F32{}, set(1.0f), exp(x));
          store(row + d, t.keep[i] ? cotangent * slope : F32{});
        }
        store_row(a.dx, t.b[i], t.h[i], t.n[i], row, a.dim);
      }
    }
  });
}

const char* supports(const Args& a) { return a.dim > kMaxHeadDim ? kTooWide : nullptr; }

int64_t workspace_bytes(const Queue& queue, const Args& a) {
  if (a.features == Features::elu) return 0;
  Arena arena = {};
  const Plan p = plan(queue, a, arena);
  return with_alignment({nullptr, arena.used + p.queue.num_threads * p.worker_bytes});
}

const char* run(const Queue& queue, const Args& a, void* workspace) {
  if (!a.dx.data && !a.dprojection.data) return nullptr;
  if (a.features == Features::elu) {
    elements_gradient(queue, a);
    return nullptr;
  }
  Arena arena = arena_at(workspace);
  const Plan p = plan(queue, a, arena);
  const auto scratch = [&](int worker) {
    Arena own = {arena.base + arena.used + worker * p.worker_bytes, 0};
    return lay_out(own, a);
  };
  if (p.packed.columns || p.packed.rows)
    pack_projection(p.queue, a, p.packed, [&](int worker) { return scratch(worker).rows; });
  const int64_t tokens = tokens_of_block(a), sum_size = p.pieces.rows * padded(a.dim);
  core::parallel_for(p.queue, a.projection_heads * p.pieces.count, [&](int64_t task, int worker) {
    const int64_t block = task / p.pieces.count, begin = task % p.pieces.count * p.pieces.tokens;
    float* sum = p.sums ? p.sums + task * sum_size : nullptr;
    if (sum) memset(sum, 0, size_t(sum_size) * sizeof(float));
    Tokens t;
    for (int64_t first = begin; first < smaller(begin + p.pieces.tokens, tokens); first += kTile) {
      find_tokens(a, block, first, smaller(kTile, tokens - first), t);
      visit_tokens(a, p.packed, block, t, scratch(worker), sum);
    }
  });
  if (p.sums) add_pieces(p, a);
  return nullptr;
}

}  // namespace

const Slot<FeatureMapArgs> feature_map_bwd_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
