#include "bucket_gradient_launch.cuh"

namespace subquad::cuda {

const char* launch_pairs_f32(const Queue& queue, const PairProblem& problem) {
  return launch_pairs<float>(queue, problem);
}

}  // namespace subquad::cuda
