#include "bucket_segments.cuh"
#include "core/visit.h"
#include "device/launch.cuh"
#include "segment_kernels.cuh"

namespace subquad::cuda {
namespace {

SegmentArgs segment_args(const BucketProblem& problem, const Segments& segments) {
  SegmentArgs a = {};
  a.problem = problem, a.segments = segments;
  a.lanes_log2 = 3;
  while (a.lanes_log2 < 5 && (kQuad << a.lanes_log2) < problem.dim) ++a.lanes_log2;
  const int64_t width = kQuad << a.lanes_log2;
  a.slices = unsigned(ceil_div(problem.dim, width));
  const int64_t groups = kSegmentThreads >> a.lanes_log2;
  a.tiles = unsigned(ceil_div(problem.targets.tokens, groups));
  a.wide_rows = allows_quads(problem.rows, problem.dim);
  a.wide_out = allows_quads(problem.out, problem.dim);
  return a;
}

dim3 blocks(int64_t count) { return dim3(unsigned(count)); }

const char* run_sums(const Queue& queue, const SegmentArgs& a) {
  const BucketIndexPlan& plan = a.segments.index.plan;
  const int64_t pieces = ceil_div(plan.seq, kSegmentPlaces);
  const int64_t warps = plan.batch * plan.heads * plan.num_hashes * pieces * a.slices;
  if (warps == 0 || plan.seq < kSegment) return nullptr;
  const dim3 grid = blocks(ceil_div(warps, kSegmentWarps)), block = blocks(kSegmentThreads);
  const char* status = nullptr;
  visit_float(a.problem.rows.dtype,
              [&](auto tag) { status = launch(queue, segment_sums_kernel<decltype(tag)>, grid, block, 0, a); });
  if (status || plan.seq < 2 * kSegment) return status;
  return launch(queue, segment_prefixes_kernel, grid, block, 0, a);
}

const char* run_gather(const Queue& queue, const SegmentArgs& a) {
  const BucketProblem& p = a.problem;
  const int64_t tasks = p.batch * p.heads_kv * p.targets.group * a.tiles * a.slices;
  const char* status = nullptr;
  if (tasks == 0) return status;
  visit_float(p.rows.dtype, [&](auto tag) {
    status = launch(queue, segment_gather_kernel<decltype(tag)>, blocks(tasks), blocks(kSegmentThreads), 0, a);
  });
  return status;
}

Operand from_item(Operand x, int64_t b) {
  if (x.data) x.data = static_cast<char*>(x.data) + b * x.stride[0] * dtype_bytes(x.dtype);
  return x;
}

BucketSide from_item(const BucketSide& side, int64_t b) {
  return {from_item(side.codes, b), from_item(side.mask, b), side.group, side.tokens};
}

/// Batch items [begin, begin + count).
BucketProblem items_of(BucketProblem p, int64_t begin, int64_t count) {
  p.batch = count;
  p.sources = from_item(p.sources, begin), p.targets = from_item(p.targets, begin);
  p.rows = from_item(p.rows, begin), p.out = from_item(p.out, begin);
  return p;
}

}  // namespace

Segments take_segments(Arena& arena, const BucketProblem& p, int64_t prefix_bytes) {
  const int64_t heads = p.heads_kv * p.sources.group;
  Segments s = {};
  // The last slot is that of a segment which ends at the last place.
  s.slots = p.sources.tokens / kSegment + 1;
  s.pitch = ceil_div(p.dim, kQuad) * kQuad;
  const int64_t item = heads * p.num_hashes * s.slots * s.pitch;
  const int64_t fit = item ? prefix_bytes / (item * int64_t(sizeof(float))) : p.batch;
  const int64_t items = fit < 1 ? 1 : fit < p.batch ? fit : p.batch;
  BucketIndexPlan plan = plan_bucket_index(items, heads, p.num_hashes, p.sources.tokens, p.num_buckets);
  plan.lists_codes = true;
  s.index = take_bucket_indexes(arena, plan);
  s.prefix = take<float>(arena, items * item);
  return s;
}

const char* run_segments(const Queue& queue, const BucketProblem& problem, const Segments& segments) {
  const int64_t items = segments.index.plan.batch;
  const char* status = nullptr;
  for (int64_t begin = 0; begin < problem.batch && !status; begin += items) {
    const int64_t count = problem.batch - begin < items ? problem.batch - begin : items;
    SegmentArgs a = segment_args(items_of(problem, begin, count), segments);
    a.segments.index.plan.batch = count;
    const BucketSide& sources = a.problem.sources;
    const bool descending = problem.causal && problem.backward;
    status = build_bucket_indexes(queue, sources.codes, sources.mask, descending, a.segments.index);
    if (!status) status = run_sums(queue, a);
    if (!status) status = run_gather(queue, a);
  }
  return status;
}

}  // namespace subquad::cuda
