#include "cpu/feature_map.h"

#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = FeatureMapArgs;

// Packing a tile of tokens is little next to its products; 512 tokens keep a thread busy for some 100 us.
constexpr int64_t kMostTokens = 512;

struct Scratch {
  float* rows;         // [kPanel, pitch]
  float* columns;      // [kTile / kPanel, pitch, kPanel], the transposed tokens of a tile
  float* products;     // [kTileRows, kTile]
  float* half_square;  // [kTile]
};

Scratch lay_out(Arena& arena, const Args& a) {
  const int64_t pitch = padded(a.dim);
  Scratch s;
  s.rows = take<float>(arena, kPanel * pitch);
  s.columns = take<float>(arena, kTile * pitch);
  s.products = take<float>(arena, kTileRows * kTile);
  s.half_square = take<float>(arena, kTile);
  return s;
}

void pack_tokens(const Args& a, const Tokens& tokens, const Scratch& s) {
  const int64_t pitch = padded(a.dim);
  for (int64_t first = 0; first < tokens.count; first += kPanel) {
    gather_tokens(a.x, tokens, first, a.dim, s.rows, pitch);
    for (int64_t r = 0; r < kPanel; ++r)
      s.half_square[first + r] = 0.5f * a.scale * dot(s.rows + r * pitch, s.rows + r * pitch, pitch);
    transpose_rows(s.rows, pitch, s.columns + first * pitch);
  }
  if (!a.log_factor.data) return;
  float* out = static_cast<float*>(a.log_factor.data);
  for (int64_t i = 0; i < tokens.count; ++i)
    out[offset_of(a.log_factor, tokens, i)] = tokens.keep[i] ? s.half_square[i] : -kInfinity;
}

template <class T>
inline void store_some(T* to, F32 x, int64_t count) {
  if (count >= kLanes)
    store(to, x);
  else
    store_part(to, x, count);
}

/// One row of a tile of products to features first, ..., first + columns - 1 of `out`.
template <class M, class T>
inline void write_features(M map, const float* products, float half_square, const Factors& by, int64_t columns,
                           int64_t num_features, T* out) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    const FeaturePair y = features_of(map, load(products + j), set(half_square), by);
    store_some(out + j, y.first, columns - j);
    if (M::two) store_some(out + num_features + j, y.second, columns - j);
  }
}

/// The features of masked tokens: 0, or its logarithm.
template <class T>
void fill_masked(const Args& a, const Tokens& tokens, T* out) {
  for (int64_t i = 0; i < tokens.count; ++i) {
    if (tokens.keep[i]) continue;
    T* row = out + offset_of(a.out, tokens, i);
    for (int64_t j = 0; j < a.feature_dim; ++j) from_float(a.log ? -kInfinity : 0.0f, row + j);
  }
}

template <class M, class T>
void map_tile(M map, T*, const Args& a, const PackedProjection& packed, int64_t block, const Tokens& tokens,
              const Scratch& s) {
  const int64_t pitch = padded(a.dim);
  const Factors by = factors_of(a);
  T* out = static_cast<T*>(a.out.data);
  for (int64_t tile = 0; tile < feature_tiles(a); ++tile) {
    const int64_t first = tile * kTile, columns = smaller(kTile, a.num_features - first);
    const float* projection = columns_of(packed, a, block, tile);
    for (int64_t r = 0; r < tokens.count; r += kTileRows) {
      const float* x = s.columns + r / kPanel * (kPanel * pitch) + r % kPanel;
      product_of_panels(x, projection, a.dim, pitch, s.products, columns);
      for (int64_t i = r; i < smaller(r + kTileRows, tokens.count); ++i)
        if (tokens.keep[i])
          write_features(map, s.products + (i - r) * kTile, s.half_square[i], by, columns, a.num_features,
                         out + offset_of(a.out, tokens, i) + first);
    }
  }
  fill_masked(a, tokens, out);
}

void map_tokens(const Args& a, const PackedProjection& packed, int64_t block, int64_t begin, int64_t end,
                const Scratch& s) {
  Tokens tokens;
  for (int64_t first = begin; first < end; first += kTile) {
    find_tokens(a, block, first, smaller(kTile, end - first), tokens);
    pack_tokens(a, tokens, s);
    visit_float(a.out.dtype, [&](auto tag) {
      visit_map(a, [&](auto map) { map_tile(map, static_cast<decltype(tag)*>(nullptr), a, packed, block, tokens, s); });
    });
  }
}

struct Plan {
  Queue queue;
  int64_t task_tokens, tasks, worker_bytes;  // tasks of each row block
  PackedProjection packed;
};

Plan plan(const Queue& queue, const Args& a, Arena& arena) {
  const int64_t tokens = tokens_of_block(a);
  Plan p = {queue, rows_per_task(queue.num_threads, a.projection_heads, tokens, kMostTokens), 0, 0, {}};
  p.tasks = (tokens + p.task_tokens - 1) / p.task_tokens;
  const int64_t most = larger(a.projection_heads * larger(p.tasks, feature_tiles(a)), 1);
  p.queue.num_threads = int32_t(smaller(queue.num_threads, most));
  Arena worker = {};
  lay_out(worker, a);
  p.worker_bytes = worker.used;
  p.packed = take_projection(arena, a, true, false);
  return p;
}

/// x + 1 where x > 0, else e^x: no products.
void map_elements(const Queue& queue, const Args& a) {
  const int64_t tokens = tokens_of_block(a), task_tokens = elements_task(a);
  core::parallel_for(queue, (tokens + task_tokens - 1) / task_tokens, [&](int64_t task, int) {
    const int64_t end = smaller((task + 1) * task_tokens, tokens);
    alignas(64) float row[kMaxHeadDim];
    Tokens t;
    for (int64_t first = task * task_tokens; first < end; first += kTile) {
      find_tokens(a, 0, first, smaller(kTile, end - first), t);
      for (int64_t i = 0; i < t.count; ++i) {
        load_row(a.x, t, i, row, a.dim);
        for (int64_t d = 0; d < a.dim; d += kLanes) {
          const F32 x = load(row + d);
          const F32 y = select(x > F32{}, x + set(1.0f), exp(x));
          store(row + d, t.keep[i] ? y : F32{});
        }
        store_row(a.out, t.b[i], t.h[i], t.n[i], row, a.dim);
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
  if (a.features == Features::elu) {
    map_elements(queue, a);
    return nullptr;
  }
  Arena arena = arena_at(workspace);
  const Plan p = plan(queue, a, arena);
  const auto scratch = [&](int worker) {
    Arena own = {arena.base + arena.used + worker * p.worker_bytes, 0};
    return lay_out(own, a);
  };
  pack_projection(p.queue, a, p.packed, [&](int worker) { return scratch(worker).rows; });
  const int64_t tokens = tokens_of_block(a);
  core::parallel_for(p.queue, a.projection_heads * p.tasks, [&](int64_t task, int worker) {
    const int64_t block = task / p.tasks, begin = task % p.tasks * p.task_tokens;
    map_tokens(a, p.packed, block, begin, smaller(begin + p.task_tokens, tokens), scratch(worker));
  });
  return nullptr;
}

}  // namespace

const Slot<FeatureMapArgs> feature_map_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
