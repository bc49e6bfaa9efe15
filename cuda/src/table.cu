#include "table.h"

namespace subquad::cuda {
namespace {

Kernels filled() {
  Kernels k = {};
  k.random = random_slot;
  k.lsh_hash = lsh_hash_slot;
  k.bucket_sort = bucket_sort_slot;
  k.bucket_attention = bucket_attention_slot;
  k.bucket_attention_bwd = bucket_attention_bwd_slot;
  k.bucket_gradient = bucket_gradient_slot;
  k.collision_attention = collision_attention_slot;
  k.collision_attention_bwd = collision_attention_bwd_slot;
  k.l2_normalize = l2_normalize_slot;
  k.l2_normalize_bwd = l2_normalize_bwd_slot;
  return k;
}

}  // namespace

// A function and not a constant: the slots are constants of other files, read when the program runs.
const Kernels& table() {
  static const Kernels kernels = filled();
  return kernels;
}

}  // namespace subquad::cuda
