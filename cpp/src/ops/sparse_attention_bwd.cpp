#include "core/registry.h"
#include "ops/sparse_attention_check.h"

namespace subquad {
namespace {

const char* const kOp = "sparse_attention_bwd";

void check_like(const char* argument, const Queue& queue, const Tensor& gradient, const ConstTensor& like) {
  core::check_array(kOp, argument, queue, gradient,
                    {{"B", like.shape[0]}, {"H", like.shape[1]}, {"N", like.shape[2]}, {"D", like.shape[3]}},
                    {DType::f32, like.dtype});
}

void check_row(const char* argument, const Queue& queue, const Tensor& gradient, const ConstTensor& q) {
  if (!gradient.defined()) return;
  core::check_array(kOp, argument, queue, gradient, {{"B", q.shape[0]}, {"H", q.shape[1]}, {"N", q.shape[2]}},
                    {DType::f32});
}

SparseAttentionArgs check(const Queue& queue, const ConstTensor& dout, const ConstTensor& dlse,
                          const ops::SparseAttentionInputs& in, const SparseAttentionGradients& g) {
  SparseAttentionArgs args = ops::check_sparse_attention(kOp, queue, in);
  core::check_array(kOp, "dout", queue, dout,
                    {{"B", args.batch}, {"H", args.heads_q}, {"N", args.seq_q}, {"E", args.dim_v}}, {in.q.dtype});
  ops::check_row_factor(kOp, "dlse", queue, dlse, in.q);
  check_like("dq", queue, g.dq, in.q), check_like("dk", queue, g.dk, in.k), check_like("dv", queue, g.dv, in.v);
  check_row("drow_scale", queue, g.drow_scale, in.q), check_row("dmix", queue, g.dmix, in.q);
  if (g.dcontext.defined()) {
    if (!in.options.context.defined()) core::mismatch(kOp, "context", "an array where dcontext is wanted", "none");
    check_like("dcontext", queue, g.dcontext, in.options.context);
  }
  const Tensor* const all[] = {&g.dq, &g.dk, &g.dv, &g.drow_scale, &g.dmix, &g.dcontext};
  const char* const names[] = {"dq", "dk", "dv", "drow_scale", "dmix", "dcontext"};
  for (int i = 0; i < 6; ++i) {
    ops::check_sparse_output(kOp, names[i], in, *all[i], {&dout, &dlse});
    for (int j = 0; j < i; ++j) core::check_output(kOp, names[i], *all[i], {all[j]});
  }
  args.dout = core::operand(dout), args.dlse = core::operand(dlse);
  args.dq = core::operand(g.dq), args.dk = core::operand(g.dk), args.dv = core::operand(g.dv);
  args.drow_scale = core::operand(g.drow_scale), args.dmix = core::operand(g.dmix);
  args.dcontext = core::operand(g.dcontext);
  if (args.pattern.form != PatternForm::blocks) return args;
  args.max_entries = in.options.max_entries;
  if (args.max_entries < 0)
    core::invalid(kOp, "max_entries", "a value of at least 0", std::to_string(args.max_entries));
  return args;
}

/// Bytes in front of the kernel's scratch, for the places of the rows among the entries of a pattern of blocks.
int64_t bytes_of_places(const SparseAttentionArgs& args) {
  if (args.pattern.form != PatternForm::blocks) return 0;
  return (args.batch * args.heads_q * args.seq_q + 1) * int64_t(sizeof(int64_t)) + 64;
}

int64_t bytes_of_all(const Queue& queue, const SparseAttentionArgs& args) {
  return bytes_of_places(args) + core::workspace_bytes(kOp, queue, &Kernels::sparse_attention_bwd, args);
}

/// Counts the entries of a pattern of blocks and gives the kernel the places of the rows, as CSR has them.
void find_places(const Queue& queue, SparseAttentionArgs& args, void* memory) {
  Arena arena = arena_at(memory);
  const int64_t rows = args.batch * args.heads_q * args.seq_q;
  args.pattern.indptr = {take<int64_t>(arena, rows + 1), {1, 0, 0, 0}, DType::i64};
  ExpandBlocksArgs count = {args.batch, args.heads_q, args.seq_q, args.seq_k, args.pattern, args.pattern.indptr, {}};
  core::launch("expand_blocks_indptr", queue, &Kernels::expand_blocks_indptr, count, {});
  if (queue.device.type != DeviceType::cpu) return;
  const int64_t entries = static_cast<const int64_t*>(args.pattern.indptr.data)[rows];
  if (entries > args.max_entries)
    core::invalid(kOp, "max_entries", "at least " + std::to_string(entries), std::to_string(args.max_entries));
}

}  // namespace

void sparse_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor dlse, ConstTensor q, ConstTensor k,
                          ConstTensor v, const SparsePattern& pattern, const SparseAttentionOptions& options,
                          const SparseAttentionGradients& gradients, Workspace workspace) {
  SparseAttentionArgs args = check(queue, dout, dlse, {q, k, v, pattern, options}, gradients);
  ops::check_pattern_values(kOp, queue, args.pattern, args.batch, args.heads_q, args.seq_q, args.seq_k);
  core::check_workspace(kOp, workspace, bytes_of_all(queue, args));
  const int64_t places = bytes_of_places(args);
  if (places) find_places(queue, args, workspace.data);
  core::launch(kOp, queue, &Kernels::sparse_attention_bwd, args,
               {static_cast<char*>(workspace.data) + places, workspace.bytes - places});
}

int64_t sparse_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor dlse, ConstTensor q,
                                             ConstTensor k, ConstTensor v, const SparsePattern& pattern,
                                             const SparseAttentionOptions& options,
                                             const SparseAttentionGradients& gradients) {
  return bytes_of_all(queue, check(queue, dout, dlse, {q, k, v, pattern, options}, gradients));
}

}  // namespace subquad
