#include "bucket_gradient_launch.cuh"

namespace subquad::cuda {

const char* launch_pairs_f16(const Queue& queue, const PairProblem& problem) {
  return launch_pairs<half>(queue, problem);
}

}  // namespace subquad::cuda
