#include "subquad/collision_attention.h"

#include "core/registry.h"

namespace subquad {
namespace {

const char* const kForward = "collision_attention";
const char* const kBackward = "collision_attention_bwd";

void check_tokens(const char* op, const char* argument, const Queue& queue, const ConstTensor& t, int64_t batch,
                  const char* letter, int64_t tokens) {
  if (t.defined()) core::check_array(op, argument, queue, t, {{"B", batch}, {letter, tokens}}, {DType::boolean});
}

/// What both passes share: q, k, v, the options, and the fields of Args that they give.
CollisionAttentionArgs check_inputs(const char* op, const Queue& queue, const ConstTensor& q, const ConstTensor& k,
                                    const ConstTensor& v, const CollisionAttentionOptions& options) {
  using core::kAny;
  const auto floats = {DType::f32, DType::f16, DType::bf16};
  core::check_array(op, "q", queue, q, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"D", kAny}}, floats);
  core::check_not_empty(op, "q", "D", q.shape[3]);
  core::check_array(op, "k", queue, k, {{"B", q.shape[0]}, {"Hkv", kAny}, {"M", kAny}, {"D", q.shape[3]}}, {q.dtype});
  core::check_groups(op, "k", q.shape[1], k.shape[1]);
  core::check_array(op, "v", queue, v, {{"B", q.shape[0]}, {"Hkv", k.shape[1]}, {"M", k.shape[2]}, {"E", kAny}},
                    {q.dtype});
  core::check_not_empty(op, "v", "E", v.shape[3]);
  core::check_range(op, "hash_bits", options.hash_bits, 1, 24);
  check_tokens(op, "key_mask", queue, options.key_mask, q.shape[0], "M", k.shape[2]);
  check_tokens(op, "query_mask", queue, options.query_mask, q.shape[0], "N", q.shape[2]);

  CollisionAttentionArgs args = {};
  args.batch = q.shape[0], args.heads_q = q.shape[1], args.heads_kv = k.shape[1];
  args.seq_q = q.shape[2], args.seq_k = k.shape[2], args.dim_qk = q.shape[3], args.dim_v = v.shape[3];
  args.hash_bits = int32_t(options.hash_bits);
  args.causal = options.is_causal;
  args.q = core::operand(q), args.k = core::operand(k), args.v = core::operand(v);
  args.key_mask = core::operand(options.key_mask), args.query_mask = core::operand(options.query_mask);
  return args;
}

CollisionAttentionArgs check_forward(const Queue& queue, const ConstTensor& q, const ConstTensor& k,
                                     const ConstTensor& v, const CollisionAttentionOptions& options,
                                     const Tensor& out) {
  CollisionAttentionArgs args = check_inputs(kForward, queue, q, k, v, options);
  core::check_array(kForward, "out", queue, out,
                    {{"B", args.batch}, {"H", args.heads_q}, {"N", args.seq_q}, {"E", args.dim_v}},
                    {DType::f32, DType::f16, DType::bf16});
  core::check_output(kForward, "out", out, {&q, &k, &v, &options.key_mask, &options.query_mask});
  args.out = core::operand(out);
  return args;
}

void check_gradient(const char* argument, const Queue& queue, const Tensor& gradient, const ConstTensor& like) {
  core::check_array(kBackward, argument, queue, gradient,
                    {{"B", like.shape[0]}, {"H", like.shape[1]}, {"N", like.shape[2]}, {"D", like.shape[3]}},
                    {like.dtype});
}

CollisionAttentionArgs check_backward(const Queue& queue, const ConstTensor& dout, const ConstTensor& q,
                                      const ConstTensor& k, const ConstTensor& v,
                                      const CollisionAttentionOptions& options, GradientRule rule, const Tensor& dq,
                                      const Tensor& dk, const Tensor& dv) {
  CollisionAttentionArgs args = check_inputs(kBackward, queue, q, k, v, options);
  core::check_array(kBackward, "dout", queue, dout,
                    {{"B", args.batch}, {"H", args.heads_q}, {"N", args.seq_q}, {"E", args.dim_v}},
                    {DType::f32, DType::f16, DType::bf16});
  check_gradient("dq", queue, dq, q);
  check_gradient("dk", queue, dk, k);
  if (dv.defined()) check_gradient("dv", queue, dv, v);
  const ConstTensor &keys = options.key_mask, &queries = options.query_mask;
  core::check_output(kBackward, "dq", dq, {&dout, &q, &k, &v, &keys, &queries, &dk, &dv});
  core::check_output(kBackward, "dk", dk, {&dout, &q, &k, &v, &keys, &queries, &dq, &dv});
  core::check_output(kBackward, "dv", dv, {&dout, &q, &k, &v, &keys, &queries, &dq, &dk});
  args.exact = rule == GradientRule::exact;
  args.dout = core::operand(dout);
  args.dq = core::operand(dq), args.dk = core::operand(dk), args.dv = core::operand(dv);
  return args;
}

}  // namespace

void collision_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                         const CollisionAttentionOptions& options, Tensor out, Workspace workspace) {
  const CollisionAttentionArgs args = check_forward(queue, q, k, v, options, out);
  core::launch(kForward, queue, &Kernels::collision_attention, args, workspace);
}

int64_t collision_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                            const CollisionAttentionOptions& options, Tensor out) {
  return core::workspace_bytes(kForward, queue, &Kernels::collision_attention,
                               check_forward(queue, q, k, v, options, out));
}

void collision_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k, ConstTensor v,
                             const CollisionAttentionOptions& options, GradientRule rule, Tensor dq, Tensor dk,
                             Tensor dv, Workspace workspace) {
  const CollisionAttentionArgs args = check_backward(queue, dout, q, k, v, options, rule, dq, dk, dv);
  core::launch(kBackward, queue, &Kernels::collision_attention_bwd, args, workspace);
}

int64_t collision_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k,
                                                ConstTensor v, const CollisionAttentionOptions& options,
                                                GradientRule rule, Tensor dq, Tensor dk, Tensor dv) {
  return core::workspace_bytes(kBackward, queue, &Kernels::collision_attention_bwd,
                               check_backward(queue, dout, q, k, v, options, rule, dq, dk, dv));
}

}  // namespace subquad
