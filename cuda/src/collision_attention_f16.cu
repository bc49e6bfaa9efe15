#include "collision_passes.cuh"

namespace subquad::cuda {

const char* run_collision_f16(const Queue& queue, const CollisionAttentionArgs& args, void* workspace) {
  return run_forward<2>(queue, args, workspace);
}

const char* run_collision_bwd_f16(const Queue& queue, const CollisionAttentionArgs& args, void* workspace) {
  return run_backward<half, 2>(queue, args, workspace);
}

}  // namespace subquad::cuda
