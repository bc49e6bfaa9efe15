/// Checks of what both passes of sparse_attention take.
#pragma once
#include <cmath>

#include "ops/pattern_check.h"
#include "ops/sparse_attention_args.h"
#include "subquad/sparse_attention.h"

namespace subquad::ops {

struct SparseAttentionInputs {
  const ConstTensor &q, &k, &v;
  const SparsePattern& pattern;
  const SparseAttentionOptions& options;
};

inline void check_row_factor(const char* op, const char* argument, const Queue& queue, const ConstTensor& t,
                             const ConstTensor& q) {
  if (t.defined())
    core::check_array(op, argument, queue, t, {{"B", q.shape[0]}, {"H", q.shape[1]}, {"N", q.shape[2]}}, {DType::f32});
}

inline void check_sparse_options(const char* op, const Queue& queue, const SparseAttentionInputs& in) {
  const SparseAttentionOptions& o = in.options;
  check_row_factor(op, "row_scale", queue, o.row_scale, in.q);
  check_row_factor(op, "mix", queue, o.mix, in.q);
  if (o.context.defined()) {
    if (!o.mix.defined()) core::mismatch(op, "mix", "an array where there is context", "none");
    // One row of context serves all queries.
    const int64_t rows = o.context.rank == 4 && o.context.shape[2] == 1 ? 1 : in.q.shape[2];
    core::check_array(op, "context", queue, o.context,
                      {{"B", in.q.shape[0]}, {"H", in.q.shape[1]}, {"N or 1", rows}, {"E", in.v.shape[3]}},
                      {in.q.dtype, DType::f32});
  }
  if (o.query_mask.defined())
    core::check_array(op, "query_mask", queue, o.query_mask, {{"B", in.q.shape[0]}, {"N", in.q.shape[2]}},
                      {DType::boolean});
}

/// Checks the inputs, but not the values of the pattern, and fills the fields of Args that they give.
inline SparseAttentionArgs check_sparse_attention(const char* op, const Queue& queue, const SparseAttentionInputs& in) {
  using core::kAny;
  const ConstTensor &q = in.q, &k = in.k, &v = in.v;
  const SparseAttentionOptions& o = in.options;
  core::check_array(op, "q", queue, q, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"D", kAny}},
                    {DType::f32, DType::f16, DType::bf16});
  core::check_not_empty(op, "q", "D", q.shape[3]);
  core::check_array(op, "k", queue, k, {{"B", q.shape[0]}, {"Hkv", kAny}, {"M", kAny}, {"D", q.shape[3]}}, {q.dtype});
  core::check_groups(op, "k", q.shape[1], k.shape[1]);
  core::check_array(op, "v", queue, v, {{"B", q.shape[0]}, {"Hkv", k.shape[1]}, {"M", k.shape[2]}, {"E", kAny}},
                    {q.dtype});
  core::check_not_empty(op, "v", "E", v.shape[3]);
  check_sparse_options(op, queue, in);

  SparseAttentionArgs args = {};
  args.batch = q.shape[0], args.heads_q = q.shape[1], args.heads_kv = k.shape[1];
  args.seq_q = q.shape[2], args.seq_k = k.shape[2], args.dim = q.shape[3], args.dim_v = v.shape[3];
  args.scale = core::check_scale(op, "scale", o.scale, args.dim);
  args.pattern = check_pattern(op, queue, in.pattern, args.batch, args.heads_q, args.heads_kv, args.seq_q, args.seq_k);
  args.q = core::operand(q), args.k = core::operand(k), args.v = core::operand(v);
  args.row_scale = core::operand(o.row_scale), args.mix = core::operand(o.mix);
  args.context = core::operand(o.context), args.query_mask = core::operand(o.query_mask);
  if (o.context.defined()) {
    args.context_rows = o.context.shape[2];
    if (args.context_rows == 1) args.context.stride[2] = 0;
  }
  return args;
}

/// Checks that an output shares no memory with the inputs nor with `others`.
inline void check_sparse_output(const char* op, const char* argument, const SparseAttentionInputs& in,
                                const Tensor& output, std::initializer_list<const ConstTensor*> others) {
  const SparseAttentionOptions& o = in.options;
  const SparsePattern& p = in.pattern;
  core::check_output(op, argument, output,
                     {&in.q, &in.k, &in.v, &p.indices, &p.log_weights, &p.indptr, &p.bits, &p.visible, &p.positions,
                      &o.row_scale, &o.mix, &o.context, &o.query_mask});
  core::check_output(op, argument, output, others);
}

}  // namespace subquad::ops
