#include "subquad/bucket_attention.h"

#include <cmath>

#include "core/registry.h"
#include "ops/codes_check.h"

namespace subquad {
namespace {

using core::kAny;
using core::operand;

/// Checks everything but the values of the codes. `rows` is v, or in the backward pass dout; `out` is out or dv.
BucketAttentionArgs check(const char* op, const Queue& queue, const ConstTensor& codes_q, const ConstTensor& codes_k,
                          const ConstTensor& rows, const BucketAttentionOptions& options, const Tensor& out,
                          bool backward) {
  const std::initializer_list<DType> floats = {DType::f32, DType::f16, DType::bf16};
  core::check_array(op, "codes_q", queue, codes_q, {{"B", kAny}, {"H", kAny}, {"R", kAny}, {"N", kAny}},
                    {DType::u16, DType::i32});
  BucketAttentionArgs a = {};
  a.batch = codes_q.shape[0], a.heads_q = codes_q.shape[1], a.num_hashes = codes_q.shape[2], a.seq_q = codes_q.shape[3];
  core::check_array(op, "codes_k", queue, codes_k, {{"B", a.batch}, {"Hkv", kAny}, {"R", a.num_hashes}, {"M", kAny}},
                    {codes_q.dtype});
  a.heads_kv = codes_k.shape[1], a.seq_k = codes_k.shape[3];
  core::check_groups(op, "codes_k", a.heads_q, a.heads_kv);
  const auto check_queries = [&](const char* name, const ConstTensor& t, int64_t columns) {
    core::check_array(op, name, queue, t, {{"B", a.batch}, {"H", a.heads_q}, {"N", a.seq_q}, {"E", columns}}, floats);
  };
  const auto check_keys = [&](const char* name, const ConstTensor& t, int64_t columns) {
    core::check_array(op, name, queue, t, {{"B", a.batch}, {"Hkv", a.heads_kv}, {"M", a.seq_k}, {"E", columns}},
                      floats);
  };
  backward ? check_queries("dout", rows, kAny) : check_keys("v", rows, kAny);
  a.dim_v = rows.shape[3];
  if (a.dim_v == 0) core::invalid(op, "E", "a head dimension of at least 1", "0");
  backward ? check_keys("dv", out, a.dim_v) : check_queries("out", out, a.dim_v);
  core::check_range(op, "num_buckets", options.num_buckets, 1, int64_t(1) << 24);
  a.num_buckets = options.num_buckets;
  a.scale = float(options.scale);
  if (!std::isfinite(a.scale)) core::invalid(op, "scale", "a finite float32", std::to_string(options.scale));
  a.causal = options.is_causal;
  if (options.key_mask.defined())
    core::check_array(op, "key_mask", queue, options.key_mask, {{"B", a.batch}, {"M", a.seq_k}}, {DType::boolean});
  if (options.query_mask.defined())
    core::check_array(op, "query_mask", queue, options.query_mask, {{"B", a.batch}, {"N", a.seq_q}}, {DType::boolean});
  core::check_output(op, backward ? "dv" : "out", out,
                     {&codes_q, &codes_k, &rows, &options.key_mask, &options.query_mask});
  a.codes_q = operand(codes_q), a.codes_k = operand(codes_k);
  a.key_mask = operand(options.key_mask), a.query_mask = operand(options.query_mask);
  a.rows = operand(rows), a.out = operand(out);
  return a;
}

struct Op {
  const char* name;
  Slot<BucketAttentionArgs> Kernels::* slot;
  bool backward;
};

const Op kForward = {"bucket_attention", &Kernels::bucket_attention, false};
const Op kBackward = {"bucket_attention_bwd", &Kernels::bucket_attention_bwd, true};

void launch(const Op& op, const Queue& queue, const ConstTensor& codes_q, const ConstTensor& codes_k,
            const ConstTensor& rows, const BucketAttentionOptions& options, const Tensor& out,
            const Workspace& workspace) {
  const BucketAttentionArgs args = check(op.name, queue, codes_q, codes_k, rows, options, out, op.backward);
  ops::check_codes(op.name, "codes_q", queue, codes_q, args.num_buckets);
  ops::check_codes(op.name, "codes_k", queue, codes_k, args.num_buckets);
  if (out.numel() > 0) core::launch(op.name, queue, op.slot, args, workspace);
}

int64_t workspace_bytes(const Op& op, const Queue& queue, const ConstTensor& codes_q, const ConstTensor& codes_k,
                        const ConstTensor& rows, const BucketAttentionOptions& options, const Tensor& out) {
  const BucketAttentionArgs args = check(op.name, queue, codes_q, codes_k, rows, options, out, op.backward);
  return out.numel() > 0 ? core::workspace_bytes(op.name, queue, op.slot, args) : 0;
}

}  // namespace

void bucket_attention(const Queue& queue, ConstTensor codes_q, ConstTensor codes_k, ConstTensor v,
                      const BucketAttentionOptions& options, Tensor out, Workspace workspace) {
  launch(kForward, queue, codes_q, codes_k, v, options, out, workspace);
}

int64_t bucket_attention_workspace_bytes(const Queue& queue, ConstTensor codes_q, ConstTensor codes_k, ConstTensor v,
                                         const BucketAttentionOptions& options, Tensor out) {
  return workspace_bytes(kForward, queue, codes_q, codes_k, v, options, out);
}

void bucket_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor codes_q, ConstTensor codes_k,
                          const BucketAttentionOptions& options, Tensor dv, Workspace workspace) {
  launch(kBackward, queue, codes_q, codes_k, dout, options, dv, workspace);
}

int64_t bucket_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor codes_q,
                                             ConstTensor codes_k, const BucketAttentionOptions& options, Tensor dv) {
  return workspace_bytes(kBackward, queue, codes_q, codes_k, dout, options, dv);
}

}  // namespace subquad
