#include "subquad/softmax_attention.h"

#include <algorithm>
#include <cmath>

#include "core/registry.h"

namespace subquad {
namespace {

using core::kAny;
using Args = SoftmaxAttentionArgs;

const char* const kForward = "softmax_attention";
const char* const kBackward = "softmax_attention_bwd";

const std::initializer_list<DType> kFloats = {DType::f32, DType::f16, DType::bf16};

/// What both passes read, under the names of the contract.
struct Inputs {
  const ConstTensor &q, &k, &v;
  const SoftmaxAttentionOptions& options;

  int64_t batch() const { return q.shape[0]; }
  int64_t heads() const { return q.shape[1]; }
  int64_t heads_kv() const { return k.shape[1]; }
  int64_t seq_q() const { return q.shape[2]; }
  int64_t seq_k() const { return k.shape[2]; }
};

void check_qkv(const char* op, const Queue& queue, const Inputs& in) {
  core::check_array(op, "q", queue, in.q, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"D", kAny}}, kFloats);
  core::check_not_empty(op, "q", "D", in.q.shape[3]);
  core::check_array(op, "k", queue, in.k, {{"B", in.batch()}, {"Hkv", kAny}, {"M", kAny}, {"D", in.q.shape[3]}},
                    kFloats);
  core::check_groups(op, "k", in.heads(), in.heads_kv());
  if (!in.v.defined()) return;
  core::check_array(op, "v", queue, in.v, {{"B", in.batch()}, {"Hkv", in.heads_kv()}, {"M", in.seq_k()}, {"E", kAny}},
                    kFloats);
  core::check_not_empty(op, "v", "E", in.v.shape[3]);
}

void check_biases(const char* op, const Queue& queue, const Inputs& in) {
  const ConstTensor &key_bias = in.options.key_bias, &pair_bias = in.options.pair_bias;
  if (pair_bias.defined())
    core::check_array(op, "pair_bias", queue, pair_bias,
                      {{"B", in.batch()}, {"H", in.heads()}, {"N", in.seq_q()}, {"M", in.seq_k()}}, {DType::f32});
  if (!key_bias.defined()) return;
  core::check_array(op, "key_bias", queue, key_bias, {{"B", in.batch()}, {"heads", kAny}, {"M", in.seq_k()}},
                    {DType::f32});
  const int64_t heads = key_bias.shape[1];
  if (heads != in.heads() && (in.heads() == 0 || (heads != 1 && heads != in.heads_kv())))
    core::invalid(op, "key_bias",
                  "1, Hkv = " + std::to_string(in.heads_kv()) + " or H = " + std::to_string(in.heads()) + " heads",
                  std::to_string(heads));
}

void check_window(const char* op, const char* argument, int64_t bound) {
  if (bound < -1) core::invalid(op, argument, "a number of tokens, or -1 for no bound", std::to_string(bound));
}

void check_options(const char* op, const Queue& queue, const Inputs& in) {
  const SoftmaxAttentionOptions& o = in.options;
  // Kernels take both as f32, where a tiny scale is 0 and a huge one infinite.
  if (o.scale != 0 && !(float(o.scale) > 0 && std::isfinite(float(o.scale))))
    core::invalid(op, "scale", "a finite value above 0, or 0 for D^-1/2", std::to_string(o.scale));
  if (!std::isfinite(float(o.key_norm_bias)))
    core::invalid(op, "key_norm_bias", "a finite value", std::to_string(o.key_norm_bias));
  check_biases(op, queue, in);
  if (o.key_mask.defined())
    core::check_array(op, "key_mask", queue, o.key_mask, {{"B", in.batch()}, {"M", in.seq_k()}}, {DType::boolean});
  if (o.query_mask.defined())
    core::check_array(op, "query_mask", queue, o.query_mask, {{"B", in.batch()}, {"N", in.seq_q()}}, {DType::boolean});
  check_window(op, "window_left", o.window_left);
  check_window(op, "window_right", o.window_right);
}

VisibleRule visible(const Inputs& in) {
  const SoftmaxAttentionOptions& o = in.options;
  VisibleRule rule = {};
  rule.kind = Visible::all;
  if (!o.is_causal && o.window_left < 0 && o.window_right < 0) return rule;
  rule.kind = Visible::band;
  rule.offset = in.seq_k() - in.seq_q();
  // A bound of N + M tokens already leaves nothing out; a larger one might overflow.
  const int64_t widest = in.seq_q() + in.seq_k();
  rule.left = std::min(o.window_left, widest);
  rule.right = o.is_causal ? 0 : std::min(o.window_right, widest);
  return rule;
}

/// Checks what both passes share and fills the fields of Args that it gives; v only where it is given.
Args check_inputs(const char* op, const Queue& queue, const Inputs& in) {
  check_qkv(op, queue, in);
  check_options(op, queue, in);
  const SoftmaxAttentionOptions& o = in.options;
  Args args = {};
  args.batch = in.batch(), args.heads_q = in.heads(), args.heads_kv = in.heads_kv(), args.seq_q = in.seq_q();
  args.dim_qk = in.q.shape[3], args.dim_v = in.v.defined() ? in.v.shape[3] : 0;
  args.scale = o.scale == 0 ? float(1 / std::sqrt(double(args.dim_qk))) : float(o.scale);
  args.q = core::operand(in.q), args.query_mask = core::operand(o.query_mask);
  args.num_sweeps = 1;
  SoftmaxSweep& sweep = args.sweeps[0];
  sweep.seq_k = in.seq_k();
  sweep.k = core::operand(in.k), sweep.v = core::operand(in.v);
  sweep.key_mask = core::operand(o.key_mask);
  sweep.key_bias = core::operand(o.key_bias), sweep.pair_bias = core::operand(o.pair_bias);
  const int64_t bias_heads = o.key_bias.defined() ? o.key_bias.shape[1] : 1;
  sweep.bias_group = bias_heads > 0 ? std::max<int64_t>(1, in.heads() / bias_heads) : 1;
  sweep.key_norm_bias = float(o.key_norm_bias);
  sweep.rule = visible(in);
  return args;
}

void check_output(const char* op, const char* argument, const Inputs& in, const Tensor& output,
                  std::initializer_list<const ConstTensor*> others) {
  const SoftmaxAttentionOptions& o = in.options;
  core::check_output(op, argument, output,
                     {&in.q, &in.k, &in.v, &o.key_bias, &o.pair_bias, &o.key_mask, &o.query_mask});
  core::check_output(op, argument, output, others);
}

void check_like_out(const char* op, const char* argument, const Queue& queue, const Inputs& in, const ConstTensor& t) {
  if (t.defined())
    core::check_array(
        op, argument, queue, t,
        {{"B", in.batch()}, {"H", in.heads()}, {"N", in.seq_q()}, {"E", in.v.defined() ? in.v.shape[3] : kAny}},
        kFloats);
}

void check_like_lse(const char* op, const char* argument, const Queue& queue, const Inputs& in, const ConstTensor& t) {
  if (t.defined())
    core::check_array(op, argument, queue, t, {{"B", in.batch()}, {"H", in.heads()}, {"N", in.seq_q()}}, {DType::f32});
}

Args check_forward(const Queue& queue, const Inputs& in, const Tensor& out, const Tensor& lse) {
  Args args = check_inputs(kForward, queue, in);
  if (!out.defined() && !lse.defined()) core::mismatch(kForward, "out", "an array, or one for lse", "none");
  if (out.defined() && !in.v.defined()) core::mismatch(kForward, "v", "an array where there is out", "none");
  check_like_out(kForward, "out", queue, in, out);
  check_like_lse(kForward, "lse", queue, in, lse);
  check_output(kForward, "out", in, out, {&lse});
  check_output(kForward, "lse", in, lse, {});
  args.out = core::operand(out), args.lse = core::operand(lse);
  if (!out.defined()) args.sweeps[0].v = {}, args.dim_v = 0;
  return args;
}

/// What the backward pass takes besides.
struct Cotangents {
  const ConstTensor &dout, &dlse, &out, &lse;
  const SoftmaxAttentionGradients& gradients;
};

void check_cotangents(const Queue& queue, const Inputs& in, const Cotangents& c) {
  if (!c.dout.defined() && !c.dlse.defined()) core::mismatch(kBackward, "dout", "an array, or one for dlse", "none");
  if (c.dout.defined() && !in.v.defined()) core::mismatch(kBackward, "v", "an array where there is dout", "none");
  check_like_out(kBackward, "dout", queue, in, c.dout);
  check_like_lse(kBackward, "dlse", queue, in, c.dlse);
  check_like_out(kBackward, "out", queue, in, c.out);
  check_like_lse(kBackward, "lse", queue, in, c.lse);
}

void check_like(const char* argument, const Queue& queue, const Tensor& gradient, const ConstTensor& x) {
  if (gradient.defined())
    core::check_array(kBackward, argument, queue, gradient,
                      {{"B", x.shape[0]}, {"heads", x.shape[1]}, {"tokens", x.shape[2]}, {"dim", x.shape[3]}}, kFloats);
}

void check_gradients(const Queue& queue, const Inputs& in, const Cotangents& c) {
  const SoftmaxAttentionGradients& g = c.gradients;
  const ConstTensor& key_bias = in.options.key_bias;
  if (g.dv.defined() && !in.v.defined()) core::mismatch(kBackward, "v", "an array where there is dv", "none");
  if (g.dkey_bias.defined() && !key_bias.defined())
    core::mismatch(kBackward, "key_bias", "an array where there is dkey_bias", "none");
  check_like("dq", queue, g.dq, in.q);
  check_like("dk", queue, g.dk, in.k);
  check_like("dv", queue, g.dv, in.v);
  if (g.dkey_bias.defined())
    core::check_array(kBackward, "dkey_bias", queue, g.dkey_bias,
                      {{"B", in.batch()}, {"heads", key_bias.shape[1]}, {"M", in.seq_k()}}, {DType::f32});
  if (g.dpair_bias.defined())
    core::check_array(kBackward, "dpair_bias", queue, g.dpair_bias,
                      {{"B", in.batch()}, {"H", in.heads()}, {"N", in.seq_q()}, {"M", in.seq_k()}}, {DType::f32});
  check_output(kBackward, "dq", in, g.dq, {&c.dout, &c.dlse, &c.out, &c.lse});
  check_output(kBackward, "dk", in, g.dk, {&c.dout, &c.dlse, &c.out, &c.lse, &g.dq});
  check_output(kBackward, "dv", in, g.dv, {&c.dout, &c.dlse, &c.out, &c.lse, &g.dq, &g.dk});
  check_output(kBackward, "dkey_bias", in, g.dkey_bias, {&c.dout, &c.dlse, &c.out, &c.lse, &g.dq, &g.dk, &g.dv});
  check_output(kBackward, "dpair_bias", in, g.dpair_bias,
               {&c.dout, &c.dlse, &c.out, &c.lse, &g.dq, &g.dk, &g.dv, &g.dkey_bias});
}

/// The launches of one backward call: what was left out of the forward pass formed again, then the gradients. With a
/// made-up base address it lays out the scratch without touching it, which is how the number of bytes is found.
struct Backward {
  Args forward, gradients;
  bool forms_again;
  Arena arena;
  int64_t bytes;
};

Backward plan_backward(const Queue& queue, const Inputs& in, const Cotangents& c, Arena arena) {
  Args args = check_inputs(kBackward, queue, in);
  check_cotangents(queue, in, c);
  check_gradients(queue, in, c);
  Args forward = args;
  const bool lacks_out = c.dout.defined() && !c.out.defined();
  if (lacks_out) {
    const int64_t tokens = args.seq_q, dim = args.dim_v;
    forward.out = {take<float>(arena, args.batch * args.heads_q * tokens * dim),
                   {args.heads_q * tokens * dim, tokens * dim, dim, 1},
                   DType::f32};
  } else {
    forward.sweeps[0].v = {}, forward.dim_v = 0;
  }
  if (!c.lse.defined())
    forward.lse = {take<float>(arena, args.batch * args.heads_q * args.seq_q),
                   {args.heads_q * args.seq_q, args.seq_q, 1, 0},
                   DType::f32};
  args.dout = core::operand(c.dout), args.dlse = core::operand(c.dlse);
  if (c.dout.defined()) args.out = lacks_out ? forward.out : core::operand(c.out);
  args.lse = c.lse.defined() ? core::operand(c.lse) : forward.lse;
  SoftmaxSweep& sweep = args.sweeps[0];
  args.dq = core::operand(c.gradients.dq);
  sweep.dk = core::operand(c.gradients.dk), sweep.dv = core::operand(c.gradients.dv);
  sweep.dkey_bias = core::operand(c.gradients.dkey_bias), sweep.dpair_bias = core::operand(c.gradients.dpair_bias);

  const bool forms_again = lacks_out || !c.lse.defined();
  int64_t nested = core::workspace_bytes(kBackward, queue, &Kernels::softmax_attention_bwd, args);
  if (forms_again)
    nested = std::max(nested, core::workspace_bytes(kBackward, queue, &Kernels::softmax_attention, forward));
  return {forward, args, forms_again, arena, with_alignment(arena) + nested};
}

}  // namespace

void softmax_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                       const SoftmaxAttentionOptions& options, Tensor out, Tensor lse, Workspace workspace) {
  const Args args = check_forward(queue, {q, k, v, options}, out, lse);
  core::launch(kForward, queue, &Kernels::softmax_attention, args, workspace);
}

int64_t softmax_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                          const SoftmaxAttentionOptions& options, Tensor out, Tensor lse) {
  return core::workspace_bytes(kForward, queue, &Kernels::softmax_attention,
                               check_forward(queue, {q, k, v, options}, out, lse));
}

void softmax_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor dlse, ConstTensor q, ConstTensor k,
                           ConstTensor v, const SoftmaxAttentionOptions& options, ConstTensor out, ConstTensor lse,
                           const SoftmaxAttentionGradients& gradients, Workspace workspace) {
  const Backward plan =
      plan_backward(queue, {q, k, v, options}, {dout, dlse, out, lse, gradients}, arena_at(workspace.data));
  core::check_workspace(kBackward, workspace, plan.bytes);
  const Workspace rest = {plan.arena.base + plan.arena.used, plan.bytes - with_alignment(plan.arena)};
  if (plan.forms_again) core::launch(kBackward, queue, &Kernels::softmax_attention, plan.forward, rest);
  core::launch(kBackward, queue, &Kernels::softmax_attention_bwd, plan.gradients, rest);
}

int64_t softmax_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor dlse, ConstTensor q,
                                              ConstTensor k, ConstTensor v, const SoftmaxAttentionOptions& options,
                                              ConstTensor out, ConstTensor lse,
                                              const SoftmaxAttentionGradients& gradients) {
  const Arena made_up = {reinterpret_cast<char*>(uintptr_t(1) << 12), 0};
  return plan_backward(queue, {q, k, v, options}, {dout, dlse, out, lse, gradients}, made_up).bytes;
}

}  // namespace subquad
