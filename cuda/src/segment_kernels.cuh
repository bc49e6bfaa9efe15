/// The kernels of bucket_segments.cuh.
///
/// The sources of every (b, head, r) are sorted by code (bucket_index.cuh). A bucket is cut into segments of 8 places
/// from its begin on, and prefix row k is the sum of its first k segments. A target finds its bucket and the places
/// [begin, end) of it that it sees, which causal order ends by a binary search of the bound, and adds one prefix row
/// and at most 7 rows of sources, however long the bucket is. Places are counted from the begin of the bucket, so that
/// a sum depends on nothing but the rows in it; backward causal order sorts descending, and its sums begin with the
/// last token.
///
/// 1. sums: the 8 rows of every whole segment. A group of lanes (4 columns a lane) owns a segment.
/// 2. prefixes: in buckets of several segments, running sums. A group owns a bucket: 1/8 of the rows, one after
///    another.
/// 3. gather: a group owns a target. Its lanes look up the buckets of as many hashes at once and list what is to be
///    added in shared memory; then all lanes walk the lists, 4 prefix rows or 8 rows of sources under way at a time.
///
/// Prefix row k of a bucket lies in slot (begin + 8 k) / 8: no two of a bucket nor of two buckets share one.
///
/// Predicted for B H = 96, N = 16384, E = 64, bf16, R = 16 on an H200 (5.5 TB/s from L2), for each of the 25 M (token,
/// hash): 1 reads 128 B for its row and 12 B for its place, 1 and 2 move 96 B of sums: 1.1 ms. 3 reads 70 B to find a
/// bucket, 130 B for a causal search, 128 B a row of a source and 256 B a prefix row. With 8 bits and causal order that
/// is 3.5 rows and a prefix row, 900 B: 4.1 ms. With 14 bits it is about 1 row, 200 to 330 B: 0.9 to 1.5 ms, and 1 and
/// 2 find few segments: 0.2 ms. Blocks of 256 threads with 16 KiB, 4 an SM.
#pragma once
#include "bucket_codes.cuh"
#include "bucket_segments.cuh"
#include "operand_rows.cuh"

namespace subquad::cuda {

static constexpr int kSegment = 8;  // places
static constexpr int kSegmentThreads = 256;
static constexpr int kSegmentWarps = kSegmentThreads / kWarp;
static constexpr int kSegmentPlaces = 128;  // that a warp looks through

struct SegmentArgs {
  BucketProblem problem;
  Segments segments;
  unsigned slices, tiles;    // of the columns; of the targets, one for every group of a block
  int lanes_log2;            // of a group: 8, 16 or 32 lanes
  bool wide_rows, wide_out;  // rows may be read, outputs written in vectors
};

/// Columns [first, first + kQuad) of a row, those below `dim`.
struct SegmentColumns {
  int first, dim;
  __device__ bool exist() const { return first < dim; }
};

__device__ inline void add(Quad<float>& sum, const Quad<float>& x) {
#pragma unroll
  for (int i = 0; i < kQuad; ++i) sum.value[i] += x.value[i];
}

/// A group of lanes that share a row.
struct SegmentGroup {
  int lanes, index, lane, count;
  __device__ explicit SegmentGroup(int log2)
      : lanes(1 << log2), index(lane_id() >> log2), lane(lane_id() & (lanes - 1)), count(kWarp >> log2) {}
};

__device__ inline SegmentColumns columns_of(const SegmentArgs& a, SegmentGroup group, unsigned slice) {
  return {(int(slice) * group.lanes + group.lane) * kQuad, int(a.problem.dim)};
}

/// Where the prefix rows of row (b, head, r) of the sorted sources begin.
__device__ inline float* prefix_rows(const SegmentArgs& a, int64_t b, int64_t head, int64_t r) {
  const BucketIndexPlan& plan = a.segments.index.plan;
  return a.segments.prefix + ((b * plan.heads + head) * plan.num_hashes + r) * a.segments.slots * a.segments.pitch;
}

/// The offset of the prefix row of segments that end before a place.
__device__ inline int64_t prefix_offset(const SegmentArgs& a, int end) {
  return int64_t(end / kSegment) * a.segments.pitch;
}

/// Places [begin, end) of a sorted row.
struct Places {
  int begin, end;
};

/// What a warp of the first two kernels does: some places of a row, a slice of the columns.
struct SegmentTask {
  BucketIndex index;
  int64_t b, head;
  float* prefix;
  Places places;
  unsigned slice;
  bool exists;
};

__device__ inline SegmentTask segment_task(const SegmentArgs& a) {
  const BucketIndexPlan& plan = a.segments.index.plan;
  // 32 bits suffice: 2^32 warps would have terabytes of places.
  const unsigned pieces = unsigned((plan.seq + kSegmentPlaces - 1) / kSegmentPlaces);
  const unsigned hashes = unsigned(plan.num_hashes), heads = unsigned(plan.heads);
  const unsigned warp = blockIdx.x * kSegmentWarps + unsigned(warp_id());
  const unsigned piece = warp / a.slices, row = piece / pieces, b_head = row / hashes;
  SegmentTask task = {};
  task.exists = row < unsigned(plan.batch) * heads * hashes;
  if (!task.exists) return task;
  const int64_t r = row % hashes;
  task.b = b_head / heads, task.head = b_head % heads, task.slice = warp % a.slices;
  task.index = index_of(a.segments.index, task.b, task.head, r);
  task.prefix = prefix_rows(a, task.b, task.head, r);
  const int first = int(piece % pieces) * kSegmentPlaces, count = int(bucket_index_count(task.index));
  task.places = {first, count - first < kSegmentPlaces ? count : first + kSegmentPlaces};
  return task;
}

/// Those of the task's places whose bucket makes choose(place, bucket) true, each by one group: work(place, bucket).
template <class Choose, class Work>
__device__ inline void for_chosen_places(const SegmentTask& task, SegmentGroup group, Choose choose, Work work) {
  for (int base = task.places.begin; base < task.places.end; base += kWarp) {
    const int place = base + lane_id();
    Places bucket = {0, 0};
    bool is_chosen = false;
    if (place < task.places.end) {
      const BucketRange range = find_bucket(task.index, task.index.codes[place]);
      bucket = {int(range.begin), int(range.end)};
      is_chosen = choose(place, bucket);
    }
    unsigned chosen = __ballot_sync(kFullMask, is_chosen);
    while (chosen) {
      int mine = -1;
      for (int g = 0; g < group.count && chosen; ++g, chosen &= chosen - 1)
        if (g == group.index) mine = __ffs(int(chosen)) - 1;
      const int from = mine < 0 ? 0 : mine;
      const Places of_mine = {__shfl_sync(kFullMask, bucket.begin, from), __shfl_sync(kFullMask, bucket.end, from)};
      if (mine >= 0) work(base + mine, of_mine);
      __syncwarp();
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kSegmentThreads, 4) segment_sums_kernel(const __grid_constant__ SegmentArgs a) {
  const SegmentTask task = segment_task(a);
  if (!task.exists) return;
  const SegmentGroup group(a.lanes_log2);
  const SegmentColumns columns = columns_of(a, group, task.slice);
  const T* rows = element<const T>(a.problem.rows, task.b, task.head);
  const auto ends_segment = [](int place, Places bucket) { return (place + 1 - bucket.begin) % kSegment == 0; };
  for_chosen_places(task, group, ends_segment, [&](int place, Places) {
    Quad<float> x[kSegment];
    const int32_t* tokens = task.index.order + place - (kSegment - 1);
#pragma unroll
    for (int i = 0; i < kSegment; ++i)
      x[i] = load_quad(rows + tokens[i] * a.problem.rows.stride[2], columns.first, columns.dim, a.wide_rows);
#pragma unroll
    for (int i = 1; i < kSegment; ++i) add(x[0], x[i]);
    float* to = task.prefix + prefix_offset(a, place + 1) + columns.first;
    if (columns.exist()) *reinterpret_cast<Quad<float>*>(to) = x[0];
  });
}

static __global__ void __launch_bounds__(kSegmentThreads)
    segment_prefixes_kernel(const __grid_constant__ SegmentArgs a) {
  const SegmentTask task = segment_task(a);
  if (!task.exists) return;
  const SegmentGroup group(a.lanes_log2);
  const SegmentColumns columns = columns_of(a, group, task.slice);
  const auto ends_second = [](int place, Places bucket) { return place + 1 - bucket.begin == 2 * kSegment; };
  for_chosen_places(task, group, ends_second, [&](int, Places bucket) {
    if (!columns.exist()) return;
    constexpr int kAhead = 8;
    const int count = (bucket.end - bucket.begin) / kSegment;
    const int64_t pitch = a.segments.pitch;
    float* segment = task.prefix + prefix_offset(a, bucket.begin + kSegment) + columns.first;
    Quad<float> sum = *reinterpret_cast<const Quad<float>*>(segment);
    for (int k = 1; k < count; k += kAhead) {
      Quad<float> x[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (k + i < count) x[i] = *reinterpret_cast<const Quad<float>*>(segment + (k + i) * pitch);
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (k + i < count) {
          add(sum, x[i]);
          *reinterpret_cast<Quad<float>*>(segment + (k + i) * pitch) = sum;
        }
    }
  });
}

/// The places of a bucket that a target sees; they are the first ones in any order.
__device__ inline Places visible_places(const BucketProblem& p, const BucketIndex& index, RawCode code,
                                        unsigned target) {
  const BucketRange bucket = find_bucket(index, code_or(code, p.num_buckets, -1));
  const int begin = int(bucket.begin);
  int end = int(bucket.end);
  if (!p.causal) return {begin, end};
  const int64_t bound = causal_bound(p, target);
  for (int seen = begin; seen < end;) {
    const int middle = seen + (end - seen) / 2;
    const int32_t token = index.order[middle];
    if (p.backward ? token >= bound : token < bound)
      seen = middle + 1;
    else
      end = middle;
  }
  return {begin, end};
}

/// What the targets of a warp have still to add: offsets of rows of sources and of prefix rows, a list for each group.
struct SegmentLists {
  int64_t rows[kWarp * (kSegment - 1)];
  int64_t prefixes[kWarp];
};

struct SegmentCounts {
  int rows, prefixes;
};

/// The sum of `x` over the lanes of the group up to this one.
__device__ inline int scan_group(SegmentGroup group, int x) {
  for (int step = 1; step < group.lanes; step *= 2) {
    const int before = __shfl_up_sync(kFullMask, x, unsigned(step), group.lanes);
    if (group.lane >= step) x += before;
  }
  return x;
}

/// Lists what hash r of source head (b, head) adds to the target of the group, in the order of the lanes.
__device__ inline SegmentCounts list_segments(const SegmentArgs& a, SegmentGroup group, unsigned b, unsigned head,
                                              int r, Places seen, const int32_t* order, SegmentLists& lists) {
  const int whole = (seen.end - seen.begin) / kSegment, rest = seen.begin + whole * kSegment, count = seen.end - rest;
  int32_t tokens[kSegment - 1];
#pragma unroll
  for (int i = 0; i < kSegment - 1; ++i) tokens[i] = i < count ? order[rest + i] : 0;
  // Both counts in one scan: 32 lanes have at most 224 rows.
  const int ends = scan_group(group, count | (whole > 0) << 16), rows_end = ends & 0xffff;
  int64_t* rows = lists.rows + group.index * group.lanes * (kSegment - 1) + rows_end - count;
#pragma unroll
  for (int i = 0; i < kSegment - 1; ++i)
    if (i < count) rows[i] = tokens[i] * a.problem.rows.stride[2];
  if (whole > 0)
    lists.prefixes[group.index * group.lanes + (ends >> 16) - 1] =
        prefix_rows(a, b, head, r) + prefix_offset(a, rest) - a.segments.prefix;
  const int totals = __shfl_sync(kFullMask, ends, group.lanes - 1, group.lanes);
  __syncwarp();
  return {totals & 0xffff, totals >> 16};
}

/// Adds the rows whose offsets are listed, kAhead of them under way at a time. The whole warp takes as many steps as
/// its longest list.
template <int kAhead, bool Wide, class T>
__device__ inline void add_rows(const int64_t* list, int count, const T* rows, SegmentColumns columns,
                                Quad<float>& sum) {
  const int longest = __reduce_max_sync(kFullMask, count);
  for (int k = 0; k < longest; k += kAhead) {
    Quad<float> x[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (k + i < count) x[i] = load_quad(rows + list[k + i], columns.first, columns.dim, Wide);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) add(sum, x[i]);
  }
}

/// The sum of a target over source heads and hashes; `exists` is false behind the last target.
template <class T>
__device__ inline Quad<float> gather_target(const SegmentArgs& a, SegmentGroup group, SegmentColumns columns,
                                            unsigned b, unsigned target_head, unsigned target, bool exists,
                                            SegmentLists& lists) {
  const BucketProblem& p = a.problem;
  const int64_t* rows_listed = lists.rows + group.index * group.lanes * (kSegment - 1);
  const int64_t* prefixes_listed = lists.prefixes + group.index * group.lanes;
  const unsigned sources = unsigned(p.sources.group), first_head = target_head / unsigned(p.targets.group) * sources;
  Quad<float> sum = {};
  for (unsigned head = first_head; head < first_head + sources; ++head)
    for (int hash = 0; hash < int(p.num_hashes); hash += group.lanes) {
      const int r = hash + group.lane;
      Places seen = {0, 0};
      const int32_t* order = nullptr;
      if (exists && r < int(p.num_hashes)) {
        const BucketIndex index = index_of(a.segments.index, b, head, r);
        seen = visible_places(p, index, load_raw(p.targets, b, target_head, r, target), target);
        order = index.order;
      }
      const SegmentCounts counts = list_segments(a, group, b, head, r, seen, order, lists);
      add_rows<4, true>(prefixes_listed, counts.prefixes, a.segments.prefix, columns, sum);
      const T* rows = element<const T>(p.rows, b, head);
      if (a.wide_rows)
        add_rows<8, true>(rows_listed, counts.rows, rows, columns, sum);
      else
        add_rows<4, false>(rows_listed, counts.rows, rows, columns, sum);
      __syncwarp();
    }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kSegmentThreads, 3) segment_gather_kernel(const __grid_constant__ SegmentArgs a) {
  __shared__ SegmentLists lists[kSegmentWarps];
  const BucketProblem& p = a.problem;
  const SegmentGroup group(a.lanes_log2);
  const unsigned heads = unsigned(p.heads_kv * p.targets.group), piece = blockIdx.x / a.slices;
  const unsigned tile = piece % a.tiles, b = piece / a.tiles / heads, head = piece / a.tiles % heads;
  const SegmentColumns columns = columns_of(a, group, blockIdx.x % a.slices);
  const unsigned target = (tile * kSegmentWarps + unsigned(warp_id())) * unsigned(group.count) + unsigned(group.index);
  const bool exists = target < unsigned(p.targets.tokens);
  Quad<float> sum = gather_target<T>(a, group, columns, b, head, target, exists, lists[warp_id()]);
  if (!exists) return;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) sum.value[i] *= p.scale;
  visit_row(p.out, b, head, target, [&](auto* row) { store_quad(sum, row, columns.first, columns.dim, a.wide_out); });
}

}  // namespace subquad::cuda
