#include "subquad/block_pool.h"

#include "core/registry.h"

namespace subquad {
namespace {

using core::kAny;

const char* const kForward = "block_pool";
const char* const kBackward = "block_pool_bwd";

BlockPoolArgs check_inputs(const char* op, const Queue& queue, const ConstTensor& v, const ConstTensor& probs,
                           const ConstTensor& key_mask, const ConstTensor& query_mask) {
  core::check_array(op, "v", queue, v, {{"B", kAny}, {"H", kAny}, {"M", kAny}, {"E", kAny}},
                    {DType::f32, DType::f16, DType::bf16});
  core::check_not_empty(op, "v", "E", v.shape[3]);
  core::check_array(op, "probs", queue, probs, {{"B", v.shape[0]}, {"H", v.shape[1]}, {"N", kAny}, {"K", kAny}},
                    {DType::f32});
  core::check_not_empty(op, "probs", "K", probs.shape[3]);
  BlockPoolArgs args = {};
  args.batch = v.shape[0], args.heads = v.shape[1], args.seq_k = v.shape[2], args.dim = v.shape[3];
  args.seq_q = probs.shape[2], args.columns = probs.shape[3];
  if (key_mask.defined())
    core::check_array(op, "key_mask", queue, key_mask, {{"B", args.batch}, {"M", args.seq_k}}, {DType::boolean});
  if (query_mask.defined())
    core::check_array(op, "query_mask", queue, query_mask, {{"B", args.batch}, {"N", args.seq_q}}, {DType::boolean});
  args.v = core::operand(v), args.probs = core::operand(probs);
  args.key_mask = core::operand(key_mask), args.query_mask = core::operand(query_mask);
  return args;
}

void check_pooled(const char* op, const char* argument, const Queue& queue, const ConstTensor& t,
                  const BlockPoolArgs& args) {
  core::check_array(op, argument, queue, t, {{"B", args.batch}, {"H", args.heads}, {"1", 1}, {"E", args.dim}},
                    {DType::f32, DType::f16, DType::bf16});
}

void check_like_values(const char* argument, const Queue& queue, const ConstTensor& t, const BlockPoolArgs& args) {
  core::check_array(kBackward, argument, queue, t,
                    {{"B", args.batch}, {"H", args.heads}, {"M", args.seq_k}, {"E", args.dim}},
                    {DType::f32, DType::f16, DType::bf16});
}

BlockPoolArgs check_forward(const Queue& queue, const ConstTensor& v, const ConstTensor& probs,
                            const ConstTensor& key_mask, const ConstTensor& query_mask, const Tensor& out) {
  BlockPoolArgs args = check_inputs(kForward, queue, v, probs, key_mask, query_mask);
  check_pooled(kForward, "out", queue, out, args);
  core::check_output(kForward, "out", out, {&v, &probs, &key_mask, &query_mask});
  args.out = core::operand(out);
  return args;
}

BlockPoolArgs check_backward(const Queue& queue, const ConstTensor& dout, const ConstTensor& base, const ConstTensor& v,
                             const ConstTensor& probs, const ConstTensor& key_mask, const ConstTensor& query_mask,
                             const Tensor& dv, const Tensor& dprobs) {
  BlockPoolArgs args = check_inputs(kBackward, queue, v, probs, key_mask, query_mask);
  check_pooled(kBackward, "dout", queue, dout, args);
  if (base.defined()) check_like_values("base", queue, base, args);
  check_like_values("dv", queue, dv, args);
  core::check_array(kBackward, "dprobs", queue, dprobs,
                    {{"B", args.batch}, {"H", args.heads}, {"N", args.seq_q}, {"K", args.columns}}, {DType::f32});
  core::check_output(kBackward, "dv", dv, {&dout, &base, &v, &probs, &key_mask, &query_mask, &dprobs});
  core::check_output(kBackward, "dprobs", dprobs, {&dout, &base, &v, &probs, &key_mask, &query_mask, &dv});
  args.dout = core::operand(dout), args.base = core::operand(base);
  args.dv = core::operand(dv), args.dprobs = core::operand(dprobs);
  return args;
}

bool empty(const BlockPoolArgs& args) { return args.batch == 0 || args.heads == 0; }

}  // namespace

void block_pool(const Queue& queue, ConstTensor v, ConstTensor probs, ConstTensor key_mask, ConstTensor query_mask,
                Tensor out, Workspace workspace) {
  const BlockPoolArgs args = check_forward(queue, v, probs, key_mask, query_mask, out);
  if (!empty(args)) core::launch(kForward, queue, &Kernels::block_pool, args, workspace);
}

int64_t block_pool_workspace_bytes(const Queue& queue, ConstTensor v, ConstTensor probs, ConstTensor key_mask,
                                   ConstTensor query_mask, Tensor out) {
  const BlockPoolArgs args = check_forward(queue, v, probs, key_mask, query_mask, out);
  return empty(args) ? 0 : core::workspace_bytes(kForward, queue, &Kernels::block_pool, args);
}

void block_pool_bwd(const Queue& queue, ConstTensor dout, ConstTensor base, ConstTensor v, ConstTensor probs,
                    ConstTensor key_mask, ConstTensor query_mask, Tensor dv, Tensor dprobs, Workspace workspace) {
  const BlockPoolArgs args = check_backward(queue, dout, base, v, probs, key_mask, query_mask, dv, dprobs);
  if (!empty(args)) core::launch(kBackward, queue, &Kernels::block_pool_bwd, args, workspace);
}

int64_t block_pool_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor base, ConstTensor v,
                                       ConstTensor probs, ConstTensor key_mask, ConstTensor query_mask, Tensor dv,
                                       Tensor dprobs) {
  const BlockPoolArgs args = check_backward(queue, dout, base, v, probs, key_mask, query_mask, dv, dprobs);
  return empty(args) ? 0 : core::workspace_bytes(kBackward, queue, &Kernels::block_pool_bwd, args);
}

}  // namespace subquad
