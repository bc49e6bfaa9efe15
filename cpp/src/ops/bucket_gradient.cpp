#include "subquad/bucket_gradient.h"

#include "core/registry.h"
#include "ops/codes_check.h"

namespace subquad {
namespace {

const char* const kOp = "bucket_gradient";

/// The arrays of one call under the names of the contract.
struct Arrays {
  const ConstTensor &dout, &q, &k, &v, &codes_q, &codes_k;
  const Tensor &dq, &dk;
};

void check_inputs(const Queue& queue, const Arrays& a) {
  using core::kAny;
  core::check_array(kOp, "q", queue, a.q, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"D", kAny}},
                    {DType::f32, DType::f16, DType::bf16});
  const int64_t batch = a.q.shape[0], heads_q = a.q.shape[1], seq_q = a.q.shape[2], dim = a.q.shape[3];
  core::check_array(kOp, "k", queue, a.k, {{"B", batch}, {"Hkv", kAny}, {"M", kAny}, {"D", dim}}, {a.q.dtype});
  const int64_t heads_kv = a.k.shape[1], seq_k = a.k.shape[2];
  core::check_groups(kOp, "k", heads_q, heads_kv);
  core::check_array(kOp, "v", queue, a.v, {{"B", batch}, {"Hkv", heads_kv}, {"M", seq_k}, {"E", kAny}}, {a.q.dtype});
  core::check_array(kOp, "dout", queue, a.dout, {{"B", batch}, {"H", heads_q}, {"N", seq_q}, {"E", a.v.shape[3]}},
                    {DType::f32, DType::f16, DType::bf16});
  core::check_array(kOp, "codes_q", queue, a.codes_q, {{"B", batch}, {"H", heads_q}, {"R", kAny}, {"N", seq_q}},
                    {DType::u16, DType::i32});
  core::check_range(kOp, "num_hashes", a.codes_q.shape[2], 1, int64_t(1) << 30);
  core::check_array(kOp, "codes_k", queue, a.codes_k,
                    {{"B", batch}, {"Hkv", heads_kv}, {"R", a.codes_q.shape[2]}, {"M", seq_k}}, {a.codes_q.dtype});
}

void check_options(const Queue& queue, const Arrays& a, const BucketGradientOptions& options) {
  core::check_range(kOp, "hash_bits", options.hash_bits, 1, 24);
  core::check_range(kOp, "num_samples", options.num_samples, 1, 64);
  if (options.key_mask.defined())
    core::check_array(kOp, "key_mask", queue, options.key_mask, {{"B", a.k.shape[0]}, {"M", a.k.shape[2]}},
                      {DType::boolean});
  if (options.query_mask.defined())
    core::check_array(kOp, "query_mask", queue, options.query_mask, {{"B", a.q.shape[0]}, {"N", a.q.shape[2]}},
                      {DType::boolean});
}

void check_gradients(const Queue& queue, const Arrays& a, const BucketGradientOptions& options) {
  core::check_array(kOp, "dq", queue, a.dq,
                    {{"B", a.q.shape[0]}, {"H", a.q.shape[1]}, {"N", a.q.shape[2]}, {"D", a.q.shape[3]}}, {a.q.dtype});
  core::check_array(kOp, "dk", queue, a.dk,
                    {{"B", a.k.shape[0]}, {"Hkv", a.k.shape[1]}, {"M", a.k.shape[2]}, {"D", a.k.shape[3]}},
                    {a.k.dtype});
  core::check_output(kOp, "dq", a.dq,
                     {&a.dout, &a.q, &a.k, &a.v, &a.codes_q, &a.codes_k, &options.key_mask, &options.query_mask});
  core::check_output(
      kOp, "dk", a.dk,
      {&a.dout, &a.q, &a.k, &a.v, &a.codes_q, &a.codes_k, &options.key_mask, &options.query_mask, &a.dq});
}

BucketGradientArgs check(const Queue& queue, const Arrays& a, const BucketGradientOptions& options) {
  check_inputs(queue, a);
  check_options(queue, a, options);
  check_gradients(queue, a, options);
  BucketGradientArgs args = {};
  args.batch = a.q.shape[0], args.heads_q = a.q.shape[1], args.heads_kv = a.k.shape[1];
  args.num_hashes = a.codes_q.shape[2];
  args.seq_q = a.q.shape[2], args.seq_k = a.k.shape[2];
  args.dim_qk = a.q.shape[3], args.dim_v = a.v.shape[3];
  args.hash_bits = int32_t(options.hash_bits), args.num_samples = int32_t(options.num_samples);
  args.exact = options.rule == GradientRule::exact;
  args.causal = options.is_causal;
  args.seed = options.seed.value;
  args.seed_ptr = options.seed.pointer;
  args.dout = core::operand(a.dout);
  args.q = core::operand(a.q), args.k = core::operand(a.k), args.v = core::operand(a.v);
  args.codes_q = core::operand(a.codes_q), args.codes_k = core::operand(a.codes_k);
  args.key_mask = core::operand(options.key_mask), args.query_mask = core::operand(options.query_mask);
  args.dq = core::operand(a.dq), args.dk = core::operand(a.dk);
  return args;
}

bool empty(const BucketGradientArgs& args) {
  return args.batch == 0 || args.heads_kv == 0 || (args.seq_q == 0 && args.seq_k == 0);
}

}  // namespace

void bucket_gradient(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k, ConstTensor v,
                     ConstTensor codes_q, ConstTensor codes_k, const BucketGradientOptions& options, Tensor dq,
                     Tensor dk, Workspace workspace) {
  const BucketGradientArgs args = check(queue, {dout, q, k, v, codes_q, codes_k, dq, dk}, options);
  ops::check_codes(kOp, "codes_q", queue, codes_q, int64_t(1) << options.hash_bits);
  ops::check_codes(kOp, "codes_k", queue, codes_k, int64_t(1) << options.hash_bits);
  if (!empty(args)) core::launch(kOp, queue, &Kernels::bucket_gradient, args, workspace);
}

int64_t bucket_gradient_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k,
                                        ConstTensor v, ConstTensor codes_q, ConstTensor codes_k,
                                        const BucketGradientOptions& options, Tensor dq, Tensor dk) {
  const BucketGradientArgs args = check(queue, {dout, q, k, v, codes_q, codes_k, dq, dk}, options);
  return empty(args) ? 0 : core::workspace_bytes(kOp, queue, &Kernels::bucket_gradient, args);
}

}  // namespace subquad
