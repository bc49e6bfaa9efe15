#include "collision_passes.cuh"

namespace subquad::cuda {

const char* run_collision_bf16(const Queue& queue, const CollisionAttentionArgs& args, void* workspace) {
  return run_forward<1>(queue, args, workspace);
}

const char* run_collision_bwd_bf16(const Queue& queue, const CollisionAttentionArgs& args, void* workspace) {
  return run_backward<bfloat16, 1>(queue, args, workspace);
}

}  // namespace subquad::cuda
