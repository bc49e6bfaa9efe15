/// The slots that each row of kernels fills, and the table it offers.
#pragma once
#include "core/kernels.h"

namespace subquad::cpu::SUBQUAD_ISA {

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
extern const Slot<SoftmaxAttentionArgs> softmax_attention_slot;
extern const Slot<SoftmaxAttentionArgs> softmax_attention_bwd_slot;
extern const Slot<MergeStatesArgs> merge_states_slot;
extern const Slot<MergeStatesArgs> merge_states_bwd_slot;
extern const Slot<SumArraysArgs> sum_arrays_slot;
extern const Slot<RowDotArgs> row_dot_slot;
extern const Slot<SegmentMeanArgs> segment_mean_slot;
extern const Slot<SegmentMeanArgs> segment_mean_bwd_slot;
extern const Slot<FeatureMapArgs> feature_map_slot;
extern const Slot<FeatureMapArgs> feature_map_bwd_slot;
extern const Slot<OrthogonalProjectionArgs> orthogonal_projection_slot;
extern const Slot<LinearAttentionArgs> linear_attention_slot;
extern const Slot<LinearAttentionArgs> linear_attention_bwd_slot;
extern const Slot<SoftmaxSampleArgs> softmax_sample_slot;
extern const Slot<SampledProposalsArgs> sampled_proposals_slot;
extern const Slot<SampledProposalsArgs> sampled_proposals_bwd_slot;
extern const Slot<MixtureProposalsArgs> mixture_proposals_slot;
extern const Slot<MixtureProposalsArgs> mixture_proposals_bwd_slot;
extern const Slot<MixtureWeightsArgs> mixture_weights_slot;
extern const Slot<MixtureWeightsArgs> mixture_weights_bwd_slot;
extern const Slot<VisibleKeysArgs> visible_keys_slot;
extern const Slot<TopkSelectArgs> topk_select_slot;
extern const Slot<SelectBlocksArgs> select_blocks_slot;
extern const Slot<ExpandBlocksArgs> expand_blocks_indptr_slot;
extern const Slot<ExpandBlocksArgs> expand_blocks_slot;
extern const Slot<TransposePatternArgs> transpose_pattern_slot;
extern const Slot<SparseAttentionArgs> sparse_attention_slot;
extern const Slot<SparseAttentionArgs> sparse_attention_bwd_slot;
extern const Slot<RunningMeanArgs> running_mean_slot;
extern const Slot<RunningMeanArgs> running_mean_bwd_slot;
extern const Slot<BlockPoolArgs> block_pool_slot;
extern const Slot<BlockPoolArgs> block_pool_bwd_slot;
extern const Slot<ExpandValuesArgs> expand_values_slot;
extern const Slot<BlockSumArgs> block_sum_slot;
extern const Slot<TeacherBlocksArgs> teacher_blocks_slot;
extern const Slot<AttentionDivergenceArgs> attention_divergence_slot;
extern const Slot<AttentionDivergenceArgs> attention_divergence_bwd_slot;
extern const Slot<SeaEstimateArgs> sea_estimate_slot;

const Kernels& table();

}  // namespace subquad::cpu::SUBQUAD_ISA
