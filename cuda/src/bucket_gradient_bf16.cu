#include "bucket_gradient_launch.cuh"

namespace subquad::cuda {

const char* launch_pairs_bf16(const Queue& queue, const PairProblem& problem) {
  return launch_pairs<bfloat16>(queue, problem);
}

}  // namespace subquad::cuda
