#include "bucket_attention.cuh"
#include "bucket_pairs.cuh"
#include "core/visit.h"
#include "device/launch.cuh"

namespace subquad::cuda {

const char* run_pairs(const Queue& queue, const BucketProblem& problem) {
  PairsArgs args = {problem, 0, 1};
  // Warps without targets of their own help others.
  while (args.sharing < kPairWarps && problem.targets.tokens <= kPairTargets * kPairWarps / (2 * args.sharing))
    args.sharing *= 2;
  const int64_t targets = kPairTargets * kPairWarps / args.sharing;
  args.tiles = (problem.targets.tokens + targets - 1) / targets;
  const int64_t blocks = args.tiles * problem.batch * problem.heads_kv * problem.targets.group;
  const char* status = nullptr;
  if (blocks == 0) return status;
  visit_float(problem.rows.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto kernel = problem.dim <= 64 ? bucket_pairs_kernel<2, T> : bucket_pairs_kernel<8, T>;
    status = launch(queue, kernel, dim3(unsigned(blocks)), dim3(kPairThreads), 0, args);
  });
  return status;
}

}  // namespace subquad::cuda
