#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {

// A function and not a constant: the slots are constants of other files, read when the program runs.
const Kernels& table() {
  static const Kernels kernels = {
      random_slot,
      lsh_hash_slot,
      bucket_sort_slot,
      bucket_attention_slot,
      bucket_attention_bwd_slot,
      bucket_gradient_slot,
      collision_attention_slot,
      collision_attention_bwd_slot,
      l2_normalize_slot,
      l2_normalize_bwd_slot,
  };
  return kernels;
}

}  // namespace subquad::cpu::SUBQUAD_ISA
