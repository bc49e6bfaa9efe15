#include "collision_passes.cuh"
#include "table.h"

namespace subquad::cuda {
namespace {

/// Parts of an element, each a bfloat16: powers of u and coefficients span more than a half does.
int parts_of(DType dtype) { return dtype == DType::f32 ? 3 : dtype == DType::f16 ? 2 : 1; }

int64_t bytes_for(const CollisionAttentionArgs& a, bool backward) {
  Arena arena = {};
  take_scratch(arena, a, parts_of(a.q.dtype), backward);
  return with_alignment(arena);
}

const char* supports(const CollisionAttentionArgs& a) {
  return a.dim_qk > kMaxHeadDim || a.dim_v > kMaxHeadDim ? kTooWide : nullptr;
}

int64_t workspace_bytes(const Queue&, const CollisionAttentionArgs& args) { return bytes_for(args, false); }

int64_t workspace_bytes_bwd(const Queue&, const CollisionAttentionArgs& args) { return bytes_for(args, true); }

const char* run(const Queue& queue, const CollisionAttentionArgs& args, void* workspace) {
  if (args.q.dtype == DType::f32) return run_collision_f32(queue, args, workspace);
  if (args.q.dtype == DType::f16) return run_collision_f16(queue, args, workspace);
  return run_collision_bf16(queue, args, workspace);
}

const char* run_bwd(const Queue& queue, const CollisionAttentionArgs& args, void* workspace) {
  if (args.q.dtype == DType::f32) return run_collision_bwd_f32(queue, args, workspace);
  if (args.q.dtype == DType::f16) return run_collision_bwd_f16(queue, args, workspace);
  return run_collision_bwd_bf16(queue, args, workspace);
}

}  // namespace

const Slot<CollisionAttentionArgs> collision_attention_slot = {supports, workspace_bytes, run};
const Slot<CollisionAttentionArgs> collision_attention_bwd_slot = {supports, workspace_bytes_bwd, run_bwd};

}  // namespace subquad::cuda
