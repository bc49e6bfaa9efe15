#include "core/parallel.h"
#include "cpu/table.h"
#include "cpu/tile.h"
#include "cpu/unit_row.h"

// Both passes are sums along the keys in two levels: within segments that begin at fixed keys, and over the segments.
// So the bits depend neither on the number of threads nor on what comes later, and rounding grows with 1024 + M / 1024.

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = RunningMeanArgs;

constexpr int64_t kSegment = 1024;

int64_t segments_of(const Args& a) { return (a.seq_k + kSegment - 1) / kSegment; }

/// One thread takes whole heads, and reads the rows once, where that keeps all threads busy.
bool whole_heads(const Queue& queue, const Args& a) {
  return queue.num_threads == 1 || segments_of(a) < 2 || a.batch * a.heads >= 2 * queue.num_threads;
}

struct Scratch {
  int64_t* counts;  // [B, segments + 1]: valid keys before each segment, with those of the state
  float* sums;      // [B, H, segments, padded E], unless threads take whole heads
};

Scratch lay_out(Arena& arena, const Queue& queue, const Args& a) {
  Scratch s;
  s.counts = take<int64_t>(arena, a.batch * (segments_of(a) + 1));
  s.sums = take<float>(arena, whole_heads(queue, a) ? 0 : a.batch * a.heads * segments_of(a) * padded(a.dim));
  return s;
}

void count_keys(const Queue& queue, const Args& a, const Scratch& scratch) {
  const int64_t segments = segments_of(a);
  core::parallel_for(queue, a.batch, [&](int64_t b, int) {
    const bool* keep = mask_of(a.key_mask, b);
    int64_t* counts = scratch.counts + b * (segments + 1);
    int64_t kept = a.count.data ? *element<int32_t>(a.count, b) : 0;
    for (int64_t s = 0; s < segments; ++s) {
      counts[s] = kept;
      kept += count_kept(keep, s * kSegment, smaller(a.seq_k, (s + 1) * kSegment));
    }
    counts[segments] = kept;
  });
}

/// Calls start(head, sum), then segment(head, s, before, own) for the segments in order or backwards, then
/// finish(head, sum). `before` is the sum of the segments already passed, to which `own` is what the call left of its
/// own; where `before` is null that is all it has to do.
template <class Start, class Segment, class Finish>
void scan(const Queue& queue, const Args& a, float* sums, bool backwards, Start&& start, Segment&& segment,
          Finish&& finish) {
  const int64_t heads = a.batch * a.heads, count = segments_of(a), size = padded(a.dim);
  const bool whole = whole_heads(queue, a);
  if (!whole)
    core::parallel_for(queue, heads * count, [&](int64_t task, int) {
      segment(task / count, task % count, static_cast<const float*>(nullptr), sums + task * size);
    });
  core::parallel_for(queue, heads, [&](int64_t head, int) {
    alignas(64) float sum[kMaxHeadDim] = {}, own[kMaxHeadDim];
    start(head, sum);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t s = backwards ? count - 1 - i : i;
      if (whole) {
        segment(head, s, sum, own);
      } else {
        float* place = sums + (head * count + s) * size;
        memcpy(own, place, size_t(size) * sizeof(float));
        memcpy(place, sum, size_t(size) * sizeof(float));
      }
      add_row(own, sum, size);
    }
    finish(head, sum);
  });
  if (whole) return;
  core::parallel_for(queue, heads * count, [&](int64_t task, int) {
    alignas(64) float own[kMaxHeadDim];
    segment(task / count, task % count, sums + task * size, own);
  });
}

/// sum[0..n) += x[0..n) / divisor
template <bool Divide, class T>
void add_values(const T* x, float divisor, float* sum, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(sum + i, load(sum + i) + (Divide ? load(x + i) / set(divisor) : load(x + i)));
  for (; i < n; ++i) sum[i] += Divide ? to_float(x[i]) / divisor : to_float(x[i]);
}

/// Row n of out = (before + own) / count, 0 for a count of 0.
void store_mean(const Args& a, int64_t b, int64_t h, int64_t n, const float* before, const float* own, int64_t count) {
  alignas(64) float mean[kMaxHeadDim];
  const F32 divisor = set(float(count));
  for (int64_t i = 0; i < padded(a.dim); i += kLanes)
    store(mean + i, count > 0 ? (load(before + i) + load(own + i)) / divisor : F32{});
  store_row(a.out, b, h, n, mean, a.dim);
}

/// The rows that see no key.
void store_first_rows(const Args& a, int64_t b, int64_t h, const float* state, int64_t count) {
  alignas(64) const float none[kMaxHeadDim] = {};
  for (int64_t n = 0; n < smaller(a.seq_q, a.seq_q - a.seq_k); ++n) store_mean(a, b, h, n, state, none, count);
}

void load_state(const Args& a, int64_t b, int64_t h, float* sum) {
  if (a.sum.data) memcpy(sum, element<float>(a.sum, b, h), size_t(a.dim) * sizeof(float));
}

void mean_segment(const Args& a, const Scratch& scratch, int64_t head, int64_t s, const float* before, float* own) {
  const int64_t b = head / a.heads, h = head % a.heads, offset = a.seq_k - a.seq_q;
  const bool* keep = mask_of(a.key_mask, b);
  int64_t count = scratch.counts[b * (segments_of(a) + 1) + s];
  memset(own, 0, size_t(padded(a.dim)) * sizeof(float));
  visit_float(a.v.dtype, [&](auto tag) {
    const auto* v = element<const decltype(tag)>(a.v, b, h);
    for (int64_t m = s * kSegment, end = smaller(a.seq_k, m + kSegment); m < end; ++m) {
      if (!keep || keep[m]) add_values<false>(v + m * a.v.stride[2], 1, own, a.dim), ++count;
      if (before && m >= offset) store_mean(a, b, h, m - offset, before, own, count);
    }
  });
}

const char* run(const Queue& queue, const Args& a, void* workspace) {
  Arena arena = arena_at(workspace);
  const Scratch scratch = lay_out(arena, queue, a);
  const int64_t segments = segments_of(a);
  count_keys(queue, a, scratch);
  for (int64_t b = 0; a.new_count.data && b < a.batch; ++b)
    *element<int32_t>(a.new_count, b) = int32_t(scratch.counts[b * (segments + 1) + segments]);
  scan(
      queue, a, scratch.sums, false,
      [&](int64_t head, float* sum) {
        const int64_t b = head / a.heads, h = head % a.heads;
        load_state(a, b, h, sum);
        store_first_rows(a, b, h, sum, scratch.counts[b * (segments + 1)]);
      },
      [&](int64_t head, int64_t s, const float* before, float* own) { mean_segment(a, scratch, head, s, before, own); },
      [&](int64_t head, const float* sum) {
        if (a.new_sum.data)
          memcpy(element<float>(a.new_sum, head / a.heads, head % a.heads), sum, size_t(a.dim) * sizeof(float));
      });
  return nullptr;
}

// Rows that are asked for in advance, for walking backwards the hardware is slow to do so.
constexpr int64_t kAhead = 16;

/// Row m of dv = [before + own] + base, the bracket for a valid key only.
void store_gradient(const Args& a, int64_t b, int64_t h, int64_t m, bool valid, const float* before, const float* own) {
  alignas(64) float row[kMaxHeadDim];
  for (int64_t i = 0; i < padded(a.dim); i += kLanes) store(row + i, valid ? load(before + i) + load(own + i) : F32{});
  if (a.base.data)
    visit_float(a.base.dtype,
                [&](auto tag) { add_values<false>(element<const decltype(tag)>(a.base, b, h, m), 1, row, a.dim); });
  store_row(a.dv, b, h, m, row, a.dim);
}

void gradient_segment(const Args& a, const Scratch& scratch, int64_t head, int64_t s, const float* before, float* own) {
  const int64_t b = head / a.heads, h = head % a.heads, offset = a.seq_k - a.seq_q;
  const bool* keep = mask_of(a.key_mask, b);
  int64_t count = scratch.counts[b * (segments_of(a) + 1) + s + 1];
  memset(own, 0, size_t(padded(a.dim)) * sizeof(float));
  visit_float(a.dout.dtype, [&](auto tag) {
    const auto* dout = element<const decltype(tag)>(a.dout, b, h);
    for (int64_t m = smaller(a.seq_k, (s + 1) * kSegment) - 1; m >= s * kSegment; --m) {
      const bool valid = !keep || keep[m];
      if (m >= offset + kAhead) prefetch_row(a.dout, b, h, m - offset - kAhead, a.dim);
      if (m >= offset && count > 0) add_values<true>(dout + (m - offset) * a.dout.stride[2], float(count), own, a.dim);
      if (before && m >= kAhead) prefetch_row(a.dv, b, h, m - kAhead, a.dim);
      if (before) store_gradient(a, b, h, m, valid, before, own);
      count -= valid;
    }
  });
}

const char* run_bwd(const Queue& queue, const Args& a, void* workspace) {
  Arena arena = arena_at(workspace);
  const Scratch scratch = lay_out(arena, queue, a);
  count_keys(queue, a, scratch);
  scan(
      queue, a, scratch.sums, true, [](int64_t, float*) {},
      [&](int64_t head, int64_t s, const float* before, float* own) {
        gradient_segment(a, scratch, head, s, before, own);
      },
      [](int64_t, const float*) {});
  return nullptr;
}

const char* supports(const Args& a) { return a.dim > kMaxHeadDim ? kTooWide : nullptr; }

int64_t workspace_bytes(const Queue& queue, const Args& a) {
  Arena arena = {};
  lay_out(arena, queue, a);
  return with_alignment(arena);
}

}  // namespace

const Slot<RunningMeanArgs> running_mean_slot = {supports, workspace_bytes, run};
const Slot<RunningMeanArgs> running_mean_bwd_slot = {supports, workspace_bytes, run_bwd};

}  // namespace subquad::cpu::SUBQUAD_ISA
