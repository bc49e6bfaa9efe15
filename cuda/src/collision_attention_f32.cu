#include "collision_passes.cuh"

namespace subquad::cuda {

const char* run_collision_f32(const Queue& queue, const CollisionAttentionArgs& args, void* workspace) {
  return run_forward<3>(queue, args, workspace);
}

const char* run_collision_bwd_f32(const Queue& queue, const CollisionAttentionArgs& args, void* workspace) {
  return run_backward<float, 3>(queue, args, workspace);
}

}  // namespace subquad::cuda
