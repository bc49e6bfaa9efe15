#include "bucket_gradient_launch.cuh"
#include "core/visit.h"
#include "ops/bucket_gradient_args.h"
#include "table.h"

namespace subquad::cuda {
namespace {

struct Layout {
  BucketIndexes queries, keys;
  RowScale *query_scales, *key_scales;
  float* dout;  // if its type is neither float nor that of the rest
};

bool widens_dout(const BucketGradientArgs& args) {
  return args.dout.dtype != DType::f32 && args.dout.dtype != args.q.dtype;
}

Layout take_layout(Arena& arena, const BucketGradientArgs& a) {
  const int64_t queries = a.batch * a.heads_q * a.seq_q, keys = a.batch * a.heads_kv * a.seq_k;
  const int64_t buckets = int64_t(1) << a.hash_bits;
  Layout layout = {};
  layout.queries = take_bucket_indexes(arena, plan_bucket_index(a.batch, a.heads_q, a.num_hashes, a.seq_q, buckets));
  layout.keys = take_bucket_indexes(arena, plan_bucket_index(a.batch, a.heads_kv, a.num_hashes, a.seq_k, buckets));
  layout.query_scales = take<RowScale>(arena, queries);
  layout.key_scales = take<RowScale>(arena, keys);
  layout.dout = take<float>(arena, widens_dout(a) ? queries * a.dim_v : 0);
  return layout;
}

/// True if every row of x begins at a multiple of 16 bytes and has whole multiples of them.
bool is_wide(const Operand& x, int64_t dim) { return dim * dtype_bytes(x.dtype) % 16 == 0 && has_aligned_rows(x, 16); }

/// How picks are spread over the lanes of a warp, and the division by num_samples.
void plan_picks(PairProblem& p) {
  p.picks_a_hash = p.num_samples * (p.exact ? 2 : 1);
  p.hashes_a_time = p.picks_a_hash < kWarp ? kWarp / p.picks_a_hash : 1;
  if (p.exact && p.hashes_a_time > kWarp / p.hash_bits) p.hashes_a_time = kWarp / p.hash_bits;
  // With 2^s >= num_samples and factor = floor(2^(31 + s) / num_samples) + 1 the quotient is exact below 2^31.
  p.sample_shift = 31;
  while (int64_t(1) << (p.sample_shift - 31) < p.num_samples) ++p.sample_shift;
  p.sample_factor = uint32_t((uint64_t(1) << p.sample_shift) / uint64_t(p.num_samples)) + 1;
}

/// dq; dk with the sides exchanged.
PairProblem query_problem(const BucketGradientArgs& a, const Layout& layout) {
  constexpr float kPi = 3.14159265f;
  PairProblem p = {};
  p.targets = {a.q, a.dout, a.codes_q, a.query_mask, a.dq, a.heads_q, a.seq_q, layout.query_scales, layout.queries};
  p.candidates = {a.k, a.v, a.codes_k, a.key_mask, a.dk, a.heads_kv, a.seq_k, layout.key_scales, layout.keys};
  if (widens_dout(a)) {
    const int64_t head = a.seq_q * a.dim_v;
    p.targets.value = {layout.dout, {a.heads_q * head, head, a.dim_v, 1}, DType::f32};
  }
  p.batch = a.batch, p.group = a.heads_q / a.heads_kv;
  p.num_hashes = int32_t(a.num_hashes), p.hash_bits = a.hash_bits, p.num_samples = a.num_samples;
  p.dim_unit = int32_t(a.dim_qk), p.dim_value = int32_t(a.dim_v);
  p.exact = a.exact, p.causal = a.causal, p.targets_are_queries = true;
  plan_picks(p);
  p.own_weight = float(a.hash_bits) / (a.exact ? kPi : 2.0f) / float(a.num_hashes);
  p.flipped_weight = p.own_weight / float(a.hash_bits);
  p.seed = a.seed, p.seed_ptr = a.seed_ptr;
  p.wide_loads = is_wide(a.q, a.dim_qk) && is_wide(a.k, a.dim_qk) && is_wide(a.dq, a.dim_qk) &&
                 is_wide(a.dk, a.dim_qk) && is_wide(a.v, a.dim_v) && is_wide(p.targets.value, a.dim_v);
  return p;
}

PairProblem key_problem(const PairProblem& queries) {
  PairProblem p = queries;
  p.targets = queries.candidates, p.candidates = queries.targets;
  p.targets_are_queries = false;
  return p;
}

int64_t rows_of(const PairProblem& p) { return p.batch * p.targets.heads * p.targets.seq; }

/// What the candidates of the other problem need: the scales of their rows, and their buckets.
const char* prepare(const Queue& queue, const PairProblem& p, RowScale* scales) {
  const char* status = nullptr;
  visit_float(p.targets.unit.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto kernel = p.dim_unit <= 2 * kWarp ? row_scale_kernel<2, T> : row_scale_kernel<8, T>;
    status =
        launch(queue, kernel, grid_of_warps(rows_of(p)), dim3(kPairThreads), 0, p.targets, p.batch, p.dim_unit, scales);
  });
  if (status) return status;
  return build_bucket_indexes(queue, p.targets.codes, p.targets.mask, false, p.targets.index);
}

const char* widen_dout(const Queue& queue, const BucketGradientArgs& args, PairProblem p, float* rows) {
  const char* status = nullptr;
  p.targets.value = args.dout;
  visit_float(args.dout.dtype, [&](auto tag) {
    status = launch(queue, widen_rows_kernel<decltype(tag)>, grid_of_warps(rows_of(p)), dim3(kPairThreads), 0,
                    p.targets, p.batch, p.dim_value, rows);
  });
  return status;
}

const char* launch_side(const Queue& queue, const PairProblem& p) {
  if (rows_of(p) == 0) return nullptr;
  if (p.targets.unit.dtype == DType::f32) return launch_pairs_f32(queue, p);
  return p.targets.unit.dtype == DType::f16 ? launch_pairs_f16(queue, p) : launch_pairs_bf16(queue, p);
}

const char* run(const Queue& queue, const BucketGradientArgs& args, void* workspace) {
  Arena arena = arena_at(workspace);
  const Layout layout = take_layout(arena, args);
  const PairProblem queries = query_problem(args, layout), keys = key_problem(queries);
  const char* status = nullptr;
  if (rows_of(queries)) {
    if (widens_dout(args)) status = widen_dout(queue, args, queries, layout.dout);
    if (!status) status = prepare(queue, queries, layout.query_scales);
  }
  if (!status && rows_of(keys)) status = prepare(queue, keys, layout.key_scales);
  if (!status) status = launch_side(queue, queries);
  return status ? status : launch_side(queue, keys);
}

const char* supports(const BucketGradientArgs& args) {
  if (args.dim_qk > kMaxHeadDim || args.dim_v > kMaxHeadDim) return kTooWide;
  if (args.seq_q > INT32_MAX || args.seq_k > INT32_MAX) return kTooManyTokens;
  return nullptr;
}

int64_t workspace_bytes(const Queue&, const BucketGradientArgs& args) {
  Arena arena = {};
  take_layout(arena, args);
  return with_alignment(arena);
}

}  // namespace

const Slot<BucketGradientArgs> bucket_gradient_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cuda
