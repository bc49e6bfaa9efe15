/// A backend is a filled table: one slot per operator pass. An absent kernel is an empty slot.
#pragma once
#include "ops/bucket_attention_args.h"
#include "ops/bucket_gradient_args.h"
#include "ops/bucket_sort_args.h"
#include "ops/collision_attention_args.h"
#include "ops/l2_normalize_args.h"
#include "ops/lsh_hash_args.h"
#include "ops/random_args.h"

namespace subquad {

template <class Args>
struct Slot {
  /// Null if the kernel can run these arguments, else the reason as a clause ("head_dim above 512").
  const char* (*supports)(const Args&);
  /// Scratch memory that `run` needs; may depend on the queue's number of threads.
  int64_t (*workspace_bytes)(const Queue&, const Args&);
  /// Does the work. Never checks, throws or allocates. Null, or what the device said went wrong.
  const char* (*run)(const Queue&, const Args&, void* workspace);
};

struct Kernels {
  Slot<RandomArgs> random;
  Slot<LshHashArgs> lsh_hash;
  Slot<BucketSortArgs> bucket_sort;
  Slot<BucketAttentionArgs> bucket_attention;
  Slot<BucketAttentionArgs> bucket_attention_bwd;
  Slot<BucketGradientArgs> bucket_gradient;
  Slot<CollisionAttentionArgs> collision_attention;
  Slot<CollisionAttentionArgs> collision_attention_bwd;
  Slot<L2NormalizeArgs> l2_normalize;
  Slot<L2NormalizeArgs> l2_normalize_bwd;
};

}  // namespace subquad
