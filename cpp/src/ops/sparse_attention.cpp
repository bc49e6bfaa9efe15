#include "subquad/sparse_attention.h"

#include "core/registry.h"
#include "ops/sparse_attention_check.h"

namespace subquad {
namespace {

const char* const kOp = "sparse_attention";

SparseAttentionArgs check_all(const Queue& queue, const ConstTensor& q, const ConstTensor& k, const ConstTensor& v,
                              const SparsePattern& pattern, const SparseAttentionOptions& options, const Tensor& out,
                              const Tensor& lse) {
  const ops::SparseAttentionInputs in = {q, k, v, pattern, options};
  SparseAttentionArgs args = ops::check_sparse_attention(kOp, queue, in);
  core::check_array(kOp, "out", queue, out,
                    {{"B", args.batch}, {"H", args.heads_q}, {"N", args.seq_q}, {"E", args.dim_v}}, {q.dtype});
  if (lse.defined())
    core::check_array(kOp, "lse", queue, lse, {{"B", args.batch}, {"H", args.heads_q}, {"N", args.seq_q}},
                      {DType::f32});
  ops::check_sparse_output(kOp, "out", in, out, {&lse});
  ops::check_sparse_output(kOp, "lse", in, lse, {});
  args.out = core::operand(out), args.lse = core::operand(lse);
  return args;
}

}  // namespace

void sparse_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v, const SparsePattern& pattern,
                      const SparseAttentionOptions& options, Tensor out, Tensor lse, Workspace workspace) {
  const SparseAttentionArgs args = check_all(queue, q, k, v, pattern, options, out, lse);
  ops::check_pattern_values(kOp, queue, args.pattern, args.batch, args.heads_q, args.seq_q, args.seq_k);
  core::launch(kOp, queue, &Kernels::sparse_attention, args, workspace);
}

int64_t sparse_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                         const SparsePattern& pattern, const SparseAttentionOptions& options,
                                         Tensor out, Tensor lse) {
  return core::workspace_bytes(kOp, queue, &Kernels::sparse_attention,
                               check_all(queue, q, k, v, pattern, options, out, lse));
}

}  // namespace subquad
