#include "core/parallel.h"
#include "cpu/landmarks.h"
#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = MixtureProposalsArgs;

constexpr int64_t kMostRows = 256;

struct Scratch {
  Landmarks landmarks;
  float *mu, *half_squares;  // [C rounded up to kPanel, pitch]; s |mu_c|^2 / 2 [width]
  float *rows, *panel;       // samples [kPanel, pitch], and their transpose
  float* scores;             // of kTileRows or, backward, kTileColumns samples
  float *row_panels, *dw;    // backward: kTileColumns samples as panels; [kTileRows, pitch]
  float *column_sums, *dmu;  // backward: [width], [width, pitch]
};

Scratch lay_out(Arena& arena, const Args& a, bool backward) {
  const int64_t score_rows = backward ? kTileColumns : kTileRows;
  Scratch s = {};
  s.landmarks = lay_out_landmarks(arena, a.landmarks, a.dim, score_rows, backward);
  const int64_t width = s.landmarks.width, pitch = s.landmarks.pitch;
  s.mu = take<float>(arena, round_up(a.landmarks, kPanel) * pitch);
  s.half_squares = take<float>(arena, width);
  s.rows = take<float>(arena, kPanel * pitch);
  s.panel = take<float>(arena, kPanel * pitch);
  s.scores = take<float>(arena, scores_size(s.landmarks, score_rows));
  if (!backward) return s;
  s.row_panels = take<float>(arena, kTileColumns * round_up(pitch, kPanel));
  s.dw = take<float>(arena, kTileRows * pitch);
  s.column_sums = take<float>(arena, width);
  s.dmu = take<float>(arena, width * pitch);
  return s;
}

/// A range of samples of one head.
struct Range {
  int64_t batch, head, first, rows;
};

/// Row (b, h, j) of an array [B, H, J, D], or element (b, h, j) of one [B, H, J]; null if there is no array.
float* at(const Operand& x, const Range& r, int64_t j) {
  if (!x.data) return nullptr;
  return static_cast<float*>(x.data) + r.batch * x.stride[0] + r.head * x.stride[1] + j * x.stride[2];
}

/// Sums of squares of kLanes columns of a panel, in the order of product_of_panels: without noise the density of a
/// sample under its own proposal is a difference of two such sums, and their errors cancel.
F32 squares_of_columns(const float* panel, int64_t depth) {
  constexpr int64_t kPiece = 128;
  F32 total = {};
  for (int64_t first = 0; first < depth; first += kPiece) {
    F32 sum = {};
    for (int64_t d = first; d < smaller(first + kPiece, depth); ++d) {
      const F32 x = load(panel + d * kPanel);
      sum = fma(x, x, sum);
    }
    total += sum;
  }
  return total;
}

void pack_head(const Args& a, const Range& range, Scratch& s) {
  Landmarks& l = s.landmarks;
  find_existing(l, a.counts, range.batch);
  const int64_t head_kv = range.head / (a.heads_q / a.heads_kv);
  for (int64_t c = 0; c < l.count; c += kPanel) {
    const int64_t count = smaller(kPanel, l.count - c);
    gather_rows(a.q_bar, range.batch, range.head, c, count, l.keep, l.dim, s.rows, l.pitch);
    gather_rows(a.k_bar, range.batch, head_kv, c, count, l.keep, l.dim, l.packing, l.pitch);
    for (int64_t i = 0; i < kPanel * l.pitch; i += kLanes) store(l.packing + i, load(l.packing + i) + load(s.rows + i));
    pack_landmarks(l, c);
    memcpy(s.mu + c * l.pitch, l.packing, size_t(kPanel * l.pitch) * sizeof(float));
  }
  for (int64_t c = 0; c < l.width; c += kLanes) {
    const float* mu = l.panels + c / kPanel * (kPanel * l.pitch) + c % kPanel;
    store(s.half_squares + c, set(0.5f * a.scale) * squares_of_columns(mu, l.dim));
  }
}

/// w of the samples [first, first + kPanel) to `rows` and, transposed, to `panel`; zeros past `count` samples and for
/// those whose landmark does not exist.
void form_samples(const Args& a, const Range& range, int64_t first, int64_t count, const Scratch& s) {
  const Landmarks& l = s.landmarks;
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t j = first + i, c = j % l.count;
    float* w = s.rows + i * l.pitch;
    if (i >= count || !l.keep[c]) {
      memset(w, 0, size_t(l.pitch) * sizeof(float));
      continue;
    }
    memcpy(w, s.mu + c * l.pitch, size_t(l.pitch) * sizeof(float));
    if (!a.noise.data) continue;
    const bool negated = a.antithetic && j >= a.samples / 2;
    const float* noise = at(a.noise, range, negated ? j - a.samples / 2 : j);
    const float factor = negated ? -a.noise_std : a.noise_std;
    int64_t d = 0;
    for (; d + kLanes <= l.dim; d += kLanes) store(w + d, load(w + d) + set(factor) * load(noise + d));
    for (; d < l.dim; ++d) w[d] += factor * noise[d];
  }
  transpose_rows(s.rows, l.pitch, s.panel);
}

/// ln of a density of the mixture as the sum of two parts.
struct LogSum {
  float largest, sum;  // largest + ln sum
};

/// Scores of one sample, whose landmark exists, to its log-densities l_jc; -inf where there is no landmark.
LogSum form_log_densities(const Args& a, const Scratch& s, float* row) {
  const Landmarks& l = s.landmarks;
  F32 largest = set(-kInfinity);
  for_each_vector(l, [&](int64_t at, int64_t c) {
    const F32 density = fma(load(row + at), set(a.scale), -load(s.half_squares + c));
    const F32 log_density = select(load(l.exists + c), density, set(-kInfinity));
    store(row + at, log_density);
    largest = max(log_density, largest);
  });
  const float shift = reduce_max(largest);
  F32 sum = {};
  for_each_vector(l, [&](int64_t at, int64_t) { sum += exp(load(row + at) - shift); });
  return {shift, reduce_add(sum)};
}

float& own_of(const Landmarks& l, float* row, int64_t c) {
  return row[c / kTileColumns * l.tile_stride + c % kTileColumns];
}

/// e^{l_own - m} / R
float balance_of(const Args& a, float own, LogSum m) {
  return exp(own - m.largest) / m.sum / float(a.samples / a.landmarks);
}

/// Writes the results for sample j; `w` is its row, `row` its scores.
void write_sample(const Args& a, const Range& range, int64_t j, const Scratch& s, const float* w, float* row) {
  const Landmarks& l = s.landmarks;
  const int64_t c = j % l.count;
  memcpy(at(a.w, range, j), w, size_t(l.dim) * sizeof(float));
  if (float* keys = at(a.keys, range, j)) {
    const float* mu = s.mu + c * l.pitch;
    for (int64_t d = 0; d < l.dim; ++d) keys[d] = w[d] + mu[d];
  }
  float log_density = kInfinity, balance = 0;
  if (l.keep[c]) {
    const LogSum m = form_log_densities(a, s, row);
    const float own = own_of(l, row, c);
    log_density = a.mis == Mis::opt ? own : m.largest + log(m.sum);
    balance = balance_of(a, own, m);
  }
  *at(a.log_density, range, j) = log_density;
  if (float* to = at(a.balance, range, j)) *to = balance;
}

void run_rows(const Args& a, const Range& range, Scratch& s) {
  pack_head(a, range, s);
  for (int64_t r = 0; r < range.rows; ++r) {
    const int64_t lane = r % kPanel;
    if (lane == 0) form_samples(a, range, range.first + r, range.rows - r, s);
    if (r % kTileRows == 0) form_scores(s.landmarks, s.panel + lane, s.scores);
    write_sample(a, range, range.first + r, s, s.rows + lane * s.landmarks.pitch,
                 s.scores + r % kTileRows * kTileColumns);
  }
}

/// Scores of one sample, whose landmark c exists, to s dl_jc.
void form_dl(const Args& a, const Range& range, int64_t j, const Scratch& s, float* row) {
  const Landmarks& l = s.landmarks;
  const int64_t own = j % l.count;
  const LogSum m = form_log_densities(a, s, row);
  const float *given = at(a.dlog_density, range, j), *dbalance = at(a.dbalance, range, j);
  const float dlog_density = given ? *given : 0.0f;
  const float db = dbalance ? *dbalance * balance_of(a, own_of(l, row, own), m) : 0.0f;
  // dl_jc = by_share e^{l_jc - m_j}, and more for the own landmark
  const float by_share = a.mis == Mis::opt ? -db : dlog_density, by_own = a.mis == Mis::opt ? dlog_density + db : 0.0f;
  const F32 factor = set(by_share * a.scale / m.sum);
  for_each_vector(l, [&](int64_t at, int64_t) { store(row + at, exp(load(row + at) - m.largest) * factor); });
  own_of(l, row, own) += by_own * a.scale;
}

/// Adds to dmu what reaches the own landmark of sample j through w and keys; `dw` is s sum_c dl_jc mu_c.
void add_own(const Args& a, const Range& range, int64_t j, const Scratch& s, const float* dw) {
  const Landmarks& l = s.landmarks;
  float* to = s.dmu + j % l.count * l.pitch;
  const float *given = at(a.dw, range, j), *keys = at(a.dkeys, range, j);
  for (int64_t d = 0; d < l.dim; ++d) {
    float sum = dw[d];
    if (given) sum += given[d];
    // keys = mu + noise + mu
    if (keys) sum += 2 * keys[d];
    to[d] += sum;
  }
}

/// Up to kTileColumns samples of the head, from sample `first` on.
void add_samples(const Args& a, const Range& head, int64_t first, const Scratch& s) {
  const Landmarks& l = s.landmarks;
  const int64_t count = smaller(kTileColumns, head.rows - first);
  for (int64_t r = 0; r < kTileColumns; r += kTileRows) {
    if (r % kPanel == 0) {
      form_samples(a, head, first + r, count - r, s);
      split_rows(s.rows, l.pitch, r, s.row_panels);
    }
    float* scores = s.scores + r * kTileColumns;
    form_scores(l, s.panel + r % kPanel, scores);
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t j = first + r + i;
      float* row = scores + i * kTileColumns;
      if (r + i < count && l.keep[j % l.count])
        form_dl(a, head, j, s, row);
      else
        for_each_vector(l, [&](int64_t at, int64_t) { store(row + at, F32{}); });
      for_each_vector(
          l, [&](int64_t at, int64_t c) { store(s.column_sums + c, load(s.column_sums + c) + load(row + at)); });
    }
    memset(s.dw, 0, size_t(kTileRows * l.pitch) * sizeof(float));
    add_landmarks(l, scores, s.dw);
    for (int64_t i = 0; i < kTileRows && r + i < count; ++i) add_own(a, head, first + r + i, s, s.dw + i * l.pitch);
  }
  add_rows_to_landmarks(l, s.scores, s.row_panels, count, s.dmu);
}

/// What landmarks that do not exist have gathered, NaN perhaps, is left out at the end.
void run_head_bwd(const Args& a, const Range& head, Scratch& s) {
  const Landmarks& l = s.landmarks;
  pack_head(a, head, s);
  memset(s.dmu, 0, size_t(l.width * l.pitch) * sizeof(float));
  memset(s.column_sums, 0, size_t(l.width) * sizeof(float));
  for (int64_t first = 0; first < head.rows; first += kTileColumns) add_samples(a, head, first, s);
  for (int64_t c = 0; c < l.count; ++c) {
    float* sum = s.dmu + c * l.pitch;
    const F32 factor = set(-s.column_sums[c]);
    for (int64_t d = 0; d < l.pitch; d += kLanes)
      store(sum + d, l.keep[c] ? fma(factor, load(s.mu + c * l.pitch + d), load(sum + d)) : F32{});
    memcpy(at(a.dmu, head, c), sum, size_t(l.dim) * sizeof(float));
  }
}

struct Plan {
  Queue queue;
  int64_t rows, blocks, tasks, worker_bytes;
};

Plan plan(const Queue& queue, const Args& a, bool backward) {
  const int64_t heads = a.batch * a.heads_q;
  Plan p = {queue, a.samples, 1, 0, 0};
  if (!backward) {
    p.rows = rows_per_task(queue.num_threads, heads, a.samples, kMostRows);
    p.blocks = (a.samples + p.rows - 1) / p.rows;
  }
  p.tasks = heads * p.blocks;
  Arena arena = {};
  lay_out(arena, a, backward);
  p.worker_bytes = arena.used;
  p.queue.num_threads = int32_t(larger(1, smaller(queue.num_threads, p.tasks)));
  return p;
}

int64_t bytes_for(const Plan& p) { return with_alignment({nullptr, p.queue.num_threads * p.worker_bytes}); }

template <class F>
void for_each_range(const Plan& p, const Args& a, void* workspace, bool backward, F&& f) {
  char* base = arena_at(workspace).base;
  core::parallel_for(p.queue, p.tasks, [&](int64_t task, int worker) {
    Arena arena = {base + worker * p.worker_bytes, 0};
    Scratch s = lay_out(arena, a, backward);
    const int64_t head = task / p.blocks, first = task % p.blocks * p.rows;
    f(Range{head / a.heads_q, head % a.heads_q, first, smaller(p.rows, a.samples - first)}, s);
  });
}

const char* supports(const Args& a) { return a.dim > kMaxHeadDim ? kTooWide : nullptr; }

int64_t workspace_bytes(const Queue& queue, const Args& args) { return bytes_for(plan(queue, args, false)); }

const char* run(const Queue& queue, const Args& args, void* workspace) {
  for_each_range(plan(queue, args, false), args, workspace, false,
                 [&](const Range& range, Scratch& s) { run_rows(args, range, s); });
  return nullptr;
}

int64_t workspace_bytes_bwd(const Queue& queue, const Args& args) { return bytes_for(plan(queue, args, true)); }

// A task per head: the samples of a head all add to the same landmarks, and they are few.
const char* run_bwd(const Queue& queue, const Args& args, void* workspace) {
  for_each_range(plan(queue, args, true), args, workspace, true,
                 [&](const Range& head, Scratch& s) { run_head_bwd(args, head, s); });
  return nullptr;
}

}  // namespace

const Slot<MixtureProposalsArgs> mixture_proposals_slot = {supports, workspace_bytes, run};
const Slot<MixtureProposalsArgs> mixture_proposals_bwd_slot = {supports, workspace_bytes_bwd, run_bwd};

}  // namespace subquad::cpu::SUBQUAD_ISA
