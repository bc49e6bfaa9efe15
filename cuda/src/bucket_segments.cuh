/// bucket_attention by sorted codes: causal order, and any number of buckets in memory O(tokens). The kernels and how
/// they work: segment_kernels.cuh.
#pragma once
#include "bucket_index.cuh"
#include "bucket_problem.cuh"

namespace subquad::cuda {

/// Bytes of prefix rows that exist at the same time, where a batch item needs no more: enough work to fill any device.
static constexpr int64_t kPrefixBytes = int64_t(256) << 20;

/// Scratch memory of as many batch items as the plan of `index` says; the items of a problem go through it in turn.
struct Segments {
  BucketIndexes index;
  float* prefix;  // [B, heads of the sources, R, slots, pitch]
  int64_t slots, pitch;
};

Segments take_segments(Arena& arena, const BucketProblem& problem, int64_t prefix_bytes = kPrefixBytes);
const char* run_segments(const Queue& queue, const BucketProblem& problem, const Segments& segments);

}  // namespace subquad::cuda
