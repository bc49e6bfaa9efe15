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
      softmax_attention_slot,
      softmax_attention_bwd_slot,
      merge_states_slot,
      merge_states_bwd_slot,
      sum_arrays_slot,
      row_dot_slot,
      segment_mean_slot,
      segment_mean_bwd_slot,
      feature_map_slot,
      feature_map_bwd_slot,
      orthogonal_projection_slot,
      linear_attention_slot,
      linear_attention_bwd_slot,
      softmax_sample_slot,
      sampled_proposals_slot,
      sampled_proposals_bwd_slot,
      mixture_proposals_slot,
      mixture_proposals_bwd_slot,
      mixture_weights_slot,
      mixture_weights_bwd_slot,
      visible_keys_slot,
      topk_select_slot,
      select_blocks_slot,
      expand_blocks_indptr_slot,
      expand_blocks_slot,
      transpose_pattern_slot,
      sparse_attention_slot,
      sparse_attention_bwd_slot,
      running_mean_slot,
      running_mean_bwd_slot,
      block_pool_slot,
      block_pool_bwd_slot,
      expand_values_slot,
      block_sum_slot,
      teacher_blocks_slot,
      attention_divergence_slot,
      attention_divergence_bwd_slot,
      sea_estimate_slot,
  };
  return kernels;
}

}  // namespace subquad::cpu::SUBQUAD_ISA
