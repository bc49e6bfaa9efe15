/// The ways to compute bucket_attention. Each is right for every problem that its comment names.
#pragma once
#include "bucket_problem.cuh"
#include "subquad/queue.h"

namespace subquad::cuda {

/// Any problem, in time O(sources * targets * hashes) and without scratch memory.
const char* run_pairs(const Queue& queue, const BucketProblem& problem);

/// A table of every bucket for every hash: problems that are not causal, with at most kMostTableBuckets.
static constexpr int64_t kMostTableBuckets = 1024;

struct Tables {
  float* data;
  int64_t pairs_once;  // (batch, kv head) whose tables exist at the same time
};

Tables take_tables(Arena& arena, const BucketProblem& problem);
const char* run_tables(const Queue& queue, const BucketProblem& problem, const Tables& tables);

}  // namespace subquad::cuda
