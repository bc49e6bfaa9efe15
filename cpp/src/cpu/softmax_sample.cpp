#include "core/parallel.h"
#include "core/philox.h"
#include "cpu/exp.h"
#include "cpu/table.h"
#include "cpu/tile.h"
#include "cpu/unit_row.h"

// A task owns a block of queries and visits the keys tile by tile; a tile is a block of 64 keys of the draw. A query
// keeps the running maximum of its logits, the sum of its weights relative to that maximum, and for each sample the
// weights of the block chosen so far. Those need no maximum: only their ratios count.

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = SoftmaxSampleArgs;

constexpr float kLowest = -__FLT_MAX__;

// Samples that one pass over the keys serves; their chosen weights bound the scratch memory.
constexpr int64_t kMostSamples = 8;
// Packing a tile of keys costs what 30 queries cost. The results do not depend on the number of queries in a task.
constexpr int64_t kMostRows = 512;

struct Scratch {
  float* rows;       // [kPanel, pitch], a panel on its way
  float* queries;    // transposed panels of the block
  float* keys;       // transposed panels of the tile
  float* weights;    // [kTileRows, kTileColumns]
  int32_t* kept;     // [kTileColumns], all ones where the key counts, else 0
  float* largest;    // [block]
  float* sums;       // [block]
  float* uniforms;   // [4, samples, block], of four tiles
  int32_t* chosen;   // [samples, block], the first key of the chosen block or -1
  float* reservoir;  // [samples, block, kTileColumns], its weights
};

struct Plan {
  int64_t block, blocks, samples, passes, tasks, worker_bytes;
};

Scratch lay_out(Arena& arena, const Args& a, int64_t block, int64_t samples) {
  const int64_t pitch = padded(a.dim);
  Scratch s;
  s.rows = take<float>(arena, kPanel * pitch);
  s.queries = take<float>(arena, block * pitch);
  s.keys = take<float>(arena, kTileColumns * pitch);
  s.weights = take<float>(arena, kTileRows * kTileColumns);
  s.kept = take<int32_t>(arena, kTileColumns);
  s.largest = take<float>(arena, block);
  s.sums = take<float>(arena, block);
  s.uniforms = take<float>(arena, 4 * samples * block);
  s.chosen = take<int32_t>(arena, samples * block);
  s.reservoir = take<float>(arena, samples * block * kTileColumns);
  return s;
}

Plan plan(const Queue& queue, const Args& a) {
  Plan p;
  p.block = rows_per_task(queue.num_threads, a.batch * a.heads_q, a.seq_q, kMostRows);
  p.blocks = (a.seq_q + p.block - 1) / p.block;
  p.samples = smaller(a.samples, kMostSamples);
  p.passes = (a.samples + p.samples - 1) / p.samples;
  p.tasks = a.batch * a.heads_q * p.blocks * p.passes;
  Arena arena = {};
  lay_out(arena, a, p.block, p.samples);
  p.worker_bytes = arena.used;
  return p;
}

/// Queries [first, first + rows) of one head and samples [sample, sample + samples).
struct Block {
  int64_t batch, head, first, rows, sample, samples;
  int64_t pitch;  // rows of the block in the scratch
  uint64_t seed;
};

void pack(const Operand& x, int64_t b, int64_t h, int64_t first, int64_t count, const bool* keep, const Args& a,
          float* rows, float* panels, int64_t packed) {
  const int64_t pitch = padded(a.dim);
  for (int64_t r = 0; r < packed; r += kPanel) {
    gather_rows(x, b, h, first + r, count - r, keep, a.dim, rows, pitch);
    transpose_rows(rows, pitch, panels + r * pitch);
  }
}

float uniform_of(uint32_t word) { return float(int32_t(word >> 8)) * 0x1p-24f; }

/// The uniforms of tiles [4 group, 4 group + 4) for all queries of the block.
void draw_uniforms(const Args& a, const Block& block, int64_t group, const Scratch& s) {
  for (int64_t i = 0; i < block.samples; ++i) {
    const uint32_t l = uint32_t(block.head * a.samples + block.sample + i);
    float* to = s.uniforms + i * block.pitch;
    const int64_t step = block.samples * block.pitch;
    for (int64_t r = 0; r < block.rows; ++r) {
      const philox::Words x =
          philox::words(block.seed, uint32_t(block.first + r), uint32_t(group), l, philox::kSamples);
      for (int w = 0; w < 4; ++w) to[w * step + r] = uniform_of(x.w[w]);
    }
  }
}

/// Logits of kTileRows queries to scaled ones, -inf where masked, and the running maxima with them.
template <bool Masked>
void raise_maxima(float* logits, float scale, const int32_t* kept, float* largest) {
  for (int r = 0; r < kTileRows; ++r) {
    F32 top = set(largest[r]);
    for (int j = 0; j < kTileColumns; j += kLanes) {
      float* at = logits + r * kTileColumns + j;
      F32 x = load(at) * set(scale);
      if (Masked) x = select(load(kept + j), x, set(-kInfinity));
      top = max(x, top);
      store(at, x);
    }
    largest[r] = reduce_max(top);
  }
}

/// Scaled logits of kTileRows queries to weights relative to the maxima, and the sum of each row.
void to_weights(float* logits, const float* largest, float* sums) {
  for (int r = 0; r < kTileRows; ++r) {
    F32 sum = {};
    for (int j = 0; j < kTileColumns; j += kLanes) {
      float* at = logits + r * kTileColumns + j;
      const F32 weight = exp(load(at) - set(largest[r]));
      store(at, weight);
      sum += weight;
    }
    sums[r] = reduce_add(sum);
  }
}

/// The queries from row r of the block on, kTileRows of them, against the packed tile of keys from `first` on.
template <bool Masked>
void visit_rows(const Args& a, const Block& block, int64_t r, int64_t first, const Scratch& s) {
  const int64_t pitch = padded(a.dim), panel = r / kPanel * kPanel;
  // What the last tile leaves of earlier products behind its keys is masked.
  product_of_panels(s.queries + panel * pitch + r % kPanel, s.keys, a.dim, pitch, s.weights,
                    smaller(kTileColumns, a.seq_k - first));
  float before[kTileRows], sums[kTileRows];
  memcpy(before, s.largest + r, sizeof before);
  raise_maxima<Masked>(s.weights, a.scale, s.kept, s.largest + r);
  to_weights(s.weights, s.largest + r, sums);
  const float* uniforms = s.uniforms + first / kTileColumns % 4 * block.samples * block.pitch;
  const int64_t end = smaller(r + kTileRows, block.rows);
  for (int64_t row = r; row < end; ++row) {
    const float sum = sums[row - r];
    if (s.largest[row] > before[row - r]) s.sums[row] *= exp(before[row - r] - s.largest[row]);
    s.sums[row] += sum;
    for (int64_t i = 0; i < block.samples; ++i) {
      const int64_t at = i * block.pitch + row;
      if (!(uniforms[at] * s.sums[row] < sum)) continue;
      s.chosen[at] = int32_t(first);
      memcpy(s.reservoir + at * kTileColumns, s.weights + (row - r) * kTileColumns, kTileColumns * sizeof(float));
    }
  }
}

void visit_tile(const Args& a, const Block& block, int64_t first, const Scratch& s) {
  const int64_t count = smaller(kTileColumns, a.seq_k - first), g = block.head / (a.heads_q / a.heads_kv);
  const bool* keep = mask_of(a.key_mask, block.batch);
  pack(a.k, block.batch, g, first, count, keep, a, s.rows, s.keys, round_up(count, kPanel));
  bool masked = false;
  for (int64_t j = 0; j < kTileColumns; ++j) {
    s.kept[j] = j < count && (!keep || keep[first + j]) ? -1 : 0;
    masked |= !s.kept[j];
  }
  for (int64_t r = 0; r < block.rows; r += kTileRows) {
    const int64_t next = first + kTileColumns + r / kTileRows;
    if (next < smaller(first + 2 * kTileColumns, a.seq_k)) prefetch_row(a.k, block.batch, g, next, a.dim);
    if (masked)
      visit_rows<true>(a, block, r, first, s);
    else
      visit_rows<false>(a, block, r, first, s);
  }
}

/// The key of the chosen block at which the cumulative weights pass the share u of their sum.
int32_t pick(const float* weights, float u) {
  // Quarters first: one chain of 64 additions takes longer than what a query costs in a tile.
  constexpr int kQuarter = kTileColumns / 4;
  float sums[4] = {};
  for (int j = 0; j < kQuarter; ++j)
    for (int i = 0; i < 4; ++i) sums[i] += weights[i * kQuarter + j];
  const float bound = u * (((sums[0] + sums[1]) + sums[2]) + sums[3]);
  float sum = 0;
  int quarter = 0, last = -1;
  while (quarter < 3 && sum + sums[quarter] <= bound) sum += sums[quarter++];
  for (int j = quarter * kQuarter; j < (quarter + 1) * kQuarter; ++j) {
    sum += weights[j];
    if (weights[j] > 0) last = j;
    if (bound < sum) break;
  }
  // Subnormal weights may round the bound up to their sum.
  for (int j = 0; last < 0 && j < kTileColumns; ++j)
    if (weights[j] > 0) last = j;
  return last;
}

void finish(const Args& a, const Block& block, const Scratch& s) {
  const int64_t tiles = (a.seq_k + kTileColumns - 1) / kTileColumns;
  for (int64_t i = 0; i < block.samples; ++i) {
    const int64_t sample = block.sample + i;
    int32_t* to = static_cast<int32_t*>(a.indices.data) + block.batch * a.indices.stride[0] +
                  block.head * a.indices.stride[1] + sample * a.indices.stride[2];
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t at = i * block.pitch + r, n = block.first + r;
      int32_t key = s.chosen[at];
      if (key >= 0) {
        const philox::Words x = philox::words(block.seed, uint32_t(n), uint32_t(tiles / 4),
                                              uint32_t(block.head * a.samples + sample), philox::kSamples);
        key += pick(s.reservoir + at * kTileColumns, uniform_of(x.w[tiles % 4]));
      }
      to[n * a.indices.stride[3]] = key;
    }
  }
}

void run_block(const Args& a, const Block& block, const Scratch& s) {
  pack(a.q, block.batch, block.head, block.first, block.rows, nullptr, a, s.rows, s.queries,
       round_up(block.rows, kPanel));
  for (int64_t r = 0; r < block.pitch; ++r) s.largest[r] = kLowest, s.sums[r] = 0;
  for (int64_t i = 0; i < block.samples * block.pitch; ++i) s.chosen[i] = -1;
  const bool* keep = mask_of(a.key_mask, block.batch);
  int64_t drawn = -1;
  for (int64_t first = 0; first < a.seq_k; first += kTileColumns) {
    if (!any_kept(keep, first, smaller(kTileColumns, a.seq_k - first))) continue;
    const int64_t group = first / kTileColumns / 4;
    if (group != drawn) draw_uniforms(a, block, group, s);
    drawn = group;
    visit_tile(a, block, first, s);
  }
  finish(a, block, s);
}

Queue with_useful_threads(Queue queue, const Plan& p) {
  queue.num_threads = int32_t(smaller(queue.num_threads, p.tasks));
  return queue;
}

const char* run(const Queue& queue, const Args& a, void* workspace) {
  const Plan p = plan(queue, a);
  char* base = arena_at(workspace).base;
  const uint64_t seed = a.seed_ptr ? uint64_t(*a.seed_ptr) : a.seed;
  core::parallel_for(with_useful_threads(queue, p), p.tasks, [&](int64_t task, int worker) {
    const int64_t sample = task % p.passes * p.samples, index = task / p.passes;
    const int64_t head = index / p.blocks, first = index % p.blocks * p.block;
    Arena arena = {base + worker * p.worker_bytes, 0};
    const Scratch s = lay_out(arena, a, p.block, p.samples);
    run_block(a,
              {head / a.heads_q, head % a.heads_q, first, smaller(p.block, a.seq_q - first), sample,
               smaller(p.samples, a.samples - sample), p.block, seed},
              s);
  });
  return nullptr;
}

const char* supports(const Args& a) {
  if (a.dim > kMaxHeadDim) return kTooWide;
  return larger(a.seq_q, a.seq_k) > INT32_MAX ? "more than 2^31 - 1 queries or keys" : nullptr;
}

int64_t workspace_bytes(const Queue& queue, const Args& a) {
  const Plan p = plan(queue, a);
  return with_alignment({nullptr, with_useful_threads(queue, p).num_threads * p.worker_bytes});
}

}  // namespace

const Slot<SoftmaxSampleArgs> softmax_sample_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
