#include "bucket_attention.cuh"
#include "bucket_segments.cuh"
#include "device/launch.cuh"
#include "table.h"

namespace subquad::cuda {
namespace {

// Below this many pairs of tokens a head the time is that of launching kernels, and comparing all pairs needs one.
constexpr int64_t kFewPairs = 512 * 512;

enum class Path { pairs, tables, segments };

// The batch and the number of heads must not count here: an item alone gives the same bits as in a batch.
Path path_of(const BucketProblem& p) {
  const int64_t targets = p.targets.tokens;
  if (targets == 0 || p.sources.group == 0 || p.sources.tokens <= kFewPairs / targets) return Path::pairs;
  return !p.causal && p.num_buckets <= kMostTableBuckets ? Path::tables : Path::segments;
}

const char* supports(const BucketAttentionArgs& args) {
  if (args.dim_v > kMaxHeadDim) return kTooWide;
  if (args.seq_q > INT32_MAX || args.seq_k > INT32_MAX) return kTooManyTokens;
  return nullptr;
}

template <bool Backward>
int64_t workspace_bytes(const Queue&, const BucketAttentionArgs& args) {
  const BucketProblem problem = bucket_problem(args, Backward);
  Arena arena = {};
  if (path_of(problem) == Path::tables) take_tables(arena, problem);
  if (path_of(problem) == Path::segments) take_segments(arena, problem);
  return with_alignment(arena);
}

template <bool Backward>
const char* run(const Queue& queue, const BucketAttentionArgs& args, void* workspace) {
  const BucketProblem problem = bucket_problem(args, Backward);
  Arena arena = arena_at(workspace);
  switch (path_of(problem)) {
    case Path::pairs:
      return run_pairs(queue, problem);
    case Path::tables:
      return run_tables(queue, problem, take_tables(arena, problem));
    case Path::segments:
      return run_segments(queue, problem, take_segments(arena, problem));
  }
  return nullptr;
}

}  // namespace

const Slot<BucketAttentionArgs> bucket_attention_slot = {supports, workspace_bytes<false>, run<false>};
const Slot<BucketAttentionArgs> bucket_attention_bwd_slot = {supports, workspace_bytes<true>, run<true>};

}  // namespace subquad::cuda
