#include "core/parallel.h"
#include "cpu/exp.h"
#include "cpu/table.h"
#include "cpu/tile.h"
#include "cpu/unit_row.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = SegmentMeanArgs;

/// The segments of one item. Segment c is the valid ones of the tokens [starts[c], starts[c + 1]); together they cover
/// all tokens. Where counts[c] is 0 no token belongs to it.
struct Segments {
  int64_t* starts;  // [C + 1]
  int32_t* counts;  // [C]
};

struct Scratch {
  int64_t* starts;  // [B, C + 1]
  int32_t* counts;  // [B, C]
};

Scratch lay_out(Arena& arena, const Args& a) {
  Scratch s;
  s.starts = take<int64_t>(arena, a.batch * (a.segments + 1));
  s.counts = take<int32_t>(arena, a.batch * a.segments);
  return s;
}

Segments segments_of(const Args& a, const Scratch& s, int64_t b) {
  return {s.starts + b * (a.segments + 1), s.counts + b * a.segments};
}

int64_t count_kept(const bool* keep, int64_t count) {
  int64_t kept = 0;
  for (int64_t n = 0; n < count; ++n) kept += keep[n];
  return kept;
}

void cut_by_size(const Args& a, const bool* keep, const Segments& s) {
  for (int64_t c = 0; c < a.segments; ++c) {
    const int64_t first = c * a.segment_size, count = smaller(a.segment_size, a.seq - first);
    s.starts[c] = first;
    s.counts[c] = int32_t(keep ? count_kept(keep + first, count) : count);
  }
  s.starts[a.segments] = a.seq;
}

void cut_by_number(const Args& a, const bool* keep, const bool* paired, const Segments& s) {
  const int64_t valid = keep ? count_kept(keep, a.seq) : a.seq;
  int64_t used = smaller(a.segments, valid);
  if (a.seq_paired >= 0) used = smaller(used, count_kept(paired, a.seq_paired));
  const int64_t length = used ? valid / used : 0, short_ones = used * (length + 1) - valid;
  int64_t token = 0;
  for (int64_t c = 0; c < a.segments; ++c) {
    const int64_t count = c >= used ? 0 : length + (c >= short_ones);
    s.starts[c] = token, s.counts[c] = int32_t(count);
    if (c + 1 >= used)
      token = a.seq;  // the last segment takes the padding behind it
    else if (keep)
      for (int64_t left = count; left > 0; ++token) left -= keep[token];
    else
      token += count;
  }
  s.starts[a.segments] = a.seq;
}

void store_counts(const Args& a, int64_t b, const int32_t* counts) {
  for (int64_t c = 0; c < a.segments; ++c) {
    const int32_t count = a.unit_counts && counts[c] > 1 ? 1 : counts[c];
    const int64_t at = b * a.counts.stride[0] + c;
    if (a.counts.dtype == DType::f32)
      static_cast<float*>(a.counts.data)[at] = log(float(count));
    else
      static_cast<int32_t*>(a.counts.data)[at] = count;
  }
}

/// Fills the scratch; the tasks that follow read it.
void cut_items(const Queue& queue, const Args& a, const Scratch& scratch) {
  core::parallel_for(queue, a.batch, [&](int64_t b, int) {
    const Segments s = segments_of(a, scratch, b);
    if (a.segment_size > 0)
      cut_by_size(a, mask_of(a.mask, b), s);
    else
      cut_by_number(a, mask_of(a.mask, b), mask_of(a.paired_mask, b), s);
    if (a.counts.data) store_counts(a, b, s.counts);
  });
}

/// sum[0..n) += x[0..n)
template <class T>
void add_row(const T* x, float* sum, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(sum + i, load(sum + i) + load(x + i));
  for (; i < n; ++i) sum[i] += to_float(x[i]);
}

void mean_of(const Args& a, int64_t b, int64_t h, int64_t c, const Segments& s) {
  alignas(64) float sum[kMaxHeadDim] = {};
  const bool* keep = mask_of(a.mask, b);
  if (s.counts[c] > 0) {
    visit_float(a.x.dtype, [&](auto tag) {
      const auto* x = static_cast<const decltype(tag)*>(a.x.data) + b * a.x.stride[0] + h * a.x.stride[1];
      for (int64_t n = s.starts[c]; n < s.starts[c + 1]; ++n)
        if (!keep || keep[n]) add_row(x + n * a.x.stride[2], sum, a.dim);
    });
    divide_row(sum, padded(a.dim), float(s.counts[c]));
  }
  store_row(a.out, b, h, c, sum, a.dim);
}

const char* run(const Queue& queue, const Args& a, void* workspace) {
  Arena arena = arena_at(workspace);
  const Scratch scratch = lay_out(arena, a);
  cut_items(queue, a, scratch);
  const int64_t segments_a_task = 1 + 16384 / ((a.seq / a.segments + 1) * (a.dim + 16));
  const int64_t pieces = (a.segments + segments_a_task - 1) / segments_a_task;
  core::parallel_for(queue, a.batch * a.heads * pieces, [&](int64_t task, int) {
    const int64_t head = task / pieces, b = head / a.heads, first = task % pieces * segments_a_task;
    const Segments s = segments_of(a, scratch, b);
    const int64_t end = smaller(first + segments_a_task, a.segments);
    for (int64_t c = first; c < end; ++c) mean_of(a, b, head % a.heads, c, s);
  });
  return nullptr;
}

/// row[0..n) = [row +] row n of x.
template <bool Add>
void take_row(const Operand& x, int64_t b, int64_t h, int64_t n, float* row, int64_t dim) {
  visit_float(x.dtype, [&](auto tag) {
    const auto* from = static_cast<const decltype(tag)*>(x.data) + b * x.stride[0] + h * x.stride[1] + n * x.stride[2];
    if constexpr (Add)
      add_row(from, row, dim);
    else
      widen(from, row, dim);
  });
}

/// The last segment that starts at or before a token.
int64_t segment_at(const Segments& s, int64_t segments, int64_t token) {
  int64_t begin = 0, end = segments;
  while (end - begin > 1) {
    const int64_t middle = begin + (end - begin) / 2;
    (s.starts[middle] <= token ? begin : end) = middle;
  }
  return begin;
}

/// Writes dx of the tokens [first, end) of one head.
void spread(const Args& a, int64_t b, int64_t h, int64_t first, int64_t end, const Segments& s) {
  alignas(64) float mean[kMaxHeadDim] = {}, row[kMaxHeadDim] = {};
  const bool* keep = mask_of(a.mask, b);
  for (int64_t c = segment_at(s, a.segments, first), n = first; n < end; ++c) {
    const bool used = s.counts[c] > 0;
    if (used) {
      take_row<false>(a.dout, b, h, c, mean, a.dim);
      divide_row(mean, padded(a.dim), float(s.counts[c]));
    }
    for (const int64_t last = smaller(s.starts[c + 1], end); n < last; ++n) {
      if (used && (!keep || keep[n]))
        memcpy(row, mean, size_t(a.dim) * sizeof(float));
      else
        memset(row, 0, size_t(a.dim) * sizeof(float));
      if (a.base.data) take_row<true>(a.base, b, h, n, row, a.dim);
      store_row(a.dx, b, h, n, row, a.dim);
    }
  }
}

const char* run_bwd(const Queue& queue, const Args& a, void* workspace) {
  Arena arena = arena_at(workspace);
  const Scratch scratch = lay_out(arena, a);
  cut_items(queue, a, scratch);
  const int64_t tokens_a_task = 1 + 16384 / (a.dim + 16), pieces = (a.seq + tokens_a_task - 1) / tokens_a_task;
  core::parallel_for(queue, a.batch * a.heads * pieces, [&](int64_t task, int) {
    const int64_t head = task / pieces, b = head / a.heads, first = task % pieces * tokens_a_task;
    spread(a, b, head % a.heads, first, smaller(first + tokens_a_task, a.seq), segments_of(a, scratch, b));
  });
  return nullptr;
}

const char* supports(const Args& a) {
  if (a.dim > kMaxHeadDim) return kTooWide;
  return larger(a.seq, a.seq_paired) > INT32_MAX ? "more than 2^31 - 1 tokens" : nullptr;
}

int64_t workspace_bytes(const Queue&, const Args& args) {
  Arena arena = {};
  lay_out(arena, args);
  return with_alignment(arena);
}

}  // namespace

const Slot<SegmentMeanArgs> segment_mean_slot = {supports, workspace_bytes, run};
const Slot<SegmentMeanArgs> segment_mean_bwd_slot = {supports, workspace_bytes, run_bwd};

}  // namespace subquad::cpu::SUBQUAD_ISA
