/// The slots that the CUDA backend fills, and the table it offers.
#pragma once
#include "core/kernels.h"

namespace subquad::cuda {

extern const Slot<RandomArgs> random_slot;
extern const Slot<LshHashArgs> lsh_hash_slot;
extern const Slot<BucketSortArgs> bucket_sort_slot;
extern const Slot<BucketAttentionArgs> bucket_attention_slot;
extern const Slot<BucketAttentionArgs> bucket_attention_bwd_slot;
extern const Slot<BucketGradientArgs> bucket_gradient_slot;
extern const Slot<CollisionAttentionArgs> collision_attention_slot;
extern const Slot<CollisionAttentionArgs> collision_attention_bwd_slot;
extern const Slot<L2NormalizeArgs> l2_normalize_slot;
extern const Slot<L2NormalizeArgs> l2_normalize_bwd_slot;

const Kernels& table();

}  // namespace subquad::cuda
