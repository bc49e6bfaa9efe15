/// A backend is a filled table: one slot per operator pass. An absent kernel is an empty slot.
#pragma once
#include "ops/attention_divergence_args.h"
#include "ops/block_pool_args.h"
#include "ops/block_sum_args.h"
#include "ops/bucket_attention_args.h"
#include "ops/bucket_gradient_args.h"
#include "ops/bucket_sort_args.h"
#include "ops/collision_attention_args.h"
#include "ops/expand_blocks_args.h"
#include "ops/expand_values_args.h"
#include "ops/feature_map_args.h"
#include "ops/l2_normalize_args.h"
#include "ops/linear_attention_args.h"
#include "ops/lsh_hash_args.h"
#include "ops/merge_states_args.h"
#include "ops/mixture_proposals_args.h"
#include "ops/mixture_weights_args.h"
#include "ops/orthogonal_projection_args.h"
#include "ops/random_args.h"
#include "ops/row_dot_args.h"
#include "ops/running_mean_args.h"
#include "ops/sampled_proposals_args.h"
#include "ops/sea_estimate_args.h"
#include "ops/segment_mean_args.h"
#include "ops/select_blocks_args.h"
#include "ops/softmax_attention_args.h"
#include "ops/softmax_sample_args.h"
#include "ops/sparse_attention_args.h"
#include "ops/sum_arrays_args.h"
#include "ops/teacher_blocks_args.h"
#include "ops/topk_select_args.h"
#include "ops/transpose_pattern_args.h"
#include "ops/visible_keys_args.h"

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
  Slot<SoftmaxAttentionArgs> softmax_attention;
  Slot<SoftmaxAttentionArgs> softmax_attention_bwd;
  Slot<MergeStatesArgs> merge_states;
  Slot<MergeStatesArgs> merge_states_bwd;
  Slot<SumArraysArgs> sum_arrays;
  Slot<RowDotArgs> row_dot;
  Slot<SegmentMeanArgs> segment_mean;
  Slot<SegmentMeanArgs> segment_mean_bwd;
  Slot<FeatureMapArgs> feature_map;
  Slot<FeatureMapArgs> feature_map_bwd;
  Slot<OrthogonalProjectionArgs> orthogonal_projection;
  Slot<LinearAttentionArgs> linear_attention;
  Slot<LinearAttentionArgs> linear_attention_bwd;
  Slot<SoftmaxSampleArgs> softmax_sample;
  Slot<SampledProposalsArgs> sampled_proposals;
  Slot<SampledProposalsArgs> sampled_proposals_bwd;
  Slot<MixtureProposalsArgs> mixture_proposals;
  Slot<MixtureProposalsArgs> mixture_proposals_bwd;
  Slot<MixtureWeightsArgs> mixture_weights;
  Slot<MixtureWeightsArgs> mixture_weights_bwd;
  Slot<VisibleKeysArgs> visible_keys;
  Slot<TopkSelectArgs> topk_select;
  Slot<SelectBlocksArgs> select_blocks;
  Slot<ExpandBlocksArgs> expand_blocks_indptr;
  Slot<ExpandBlocksArgs> expand_blocks;
  Slot<TransposePatternArgs> transpose_pattern;
  Slot<SparseAttentionArgs> sparse_attention;
  Slot<SparseAttentionArgs> sparse_attention_bwd;
  Slot<RunningMeanArgs> running_mean;
  Slot<RunningMeanArgs> running_mean_bwd;
  Slot<BlockPoolArgs> block_pool;
  Slot<BlockPoolArgs> block_pool_bwd;
  Slot<ExpandValuesArgs> expand_values;
  Slot<BlockSumArgs> block_sum;
  Slot<TeacherBlocksArgs> teacher_blocks;
  Slot<AttentionDivergenceArgs> attention_divergence;
  Slot<AttentionDivergenceArgs> attention_divergence_bwd;
  Slot<SeaEstimateArgs> sea_estimate;
};

}  // namespace subquad
