// What the two passes of softmax_attention refuse.
#include "softmax_attention_reference.h"
#include "subquad/error.h"

using namespace softmax;

TEST(errors_of_the_forward_pass) {
  Problem p({1, 4, 2, 8, 6, 5, {{9, all_keys(), 2, true}}}), other({1, 3, 3, 8, 7, 5, {{9}}});
  Problem wide({1, 1, 1, 1, 513, 1, {{1}}});
  const Queue queue = Queue::cpu(1);
  const Sweep& w = p.sweeps[0];
  const auto run = [&](ConstTensor q, ConstTensor k, ConstTensor v, Tensor out, Tensor lse) {
    softmax_attention(queue, q, k, v, {}, out, lse, {});
  };
  const auto with = [&](auto change) {
    SoftmaxAttentionOptions options;
    change(options);
    softmax_attention(queue, p.q.view, w.k.view, w.v.view, options, p.out.view, p.lse.view, {});
  };
  const ConstTensor q = p.q.view, k = w.k.view, v = w.v.view;
  CHECK_THROWS_AS(std::invalid_argument, with([](auto&) {}), "[softmax_attention] workspace: expected at least ");
  CHECK_THROWS(run(q, other.sweeps[0].k.view, v, p.out.view, p.lse.view),
               "[softmax_attention] k: expected shape [B, Hkv, M, D], got [1, 3, 9, 7]");
  CHECK_THROWS(run(other.q.view, w.dpair_bias.view, v, p.out.view, {}), "[softmax_attention] k: expected shape ");
  CHECK_THROWS(run(q, k, p.out.view, p.out.view, {}),
               "[softmax_attention] v: expected shape [B, Hkv, M, E], got [1, 4, 8, 5]");
  CHECK_THROWS(run(q, k, v, p.dq.view, {}),
               "[softmax_attention] out: expected shape [B, H, N, E] = [1, 4, 8, 5], got [1, 4, 8, 6]");
  CHECK_THROWS(run(q, k, v, p.out.view, p.out.view), "[softmax_attention] lse: expected shape [B, H, N] = [1, 4, 8]");
  CHECK_THROWS_AS(TypeMismatch, run(q, k, v, {}, {}), "[softmax_attention] out: expected an array, or one for lse");
  CHECK_THROWS_AS(TypeMismatch, run(q, k, {}, p.out.view, {}),
                  "[softmax_attention] v: expected an array where there is out, got none");
  CHECK_THROWS_AS(Unsupported, run(wide.q.view, wide.sweeps[0].k.view, wide.sweeps[0].v.view, wide.out.view, {}),
                  "for a head dimension above 512");
  CHECK_THROWS(run(q, k, v, p.q.view, {}), "[softmax_attention] out: expected shape");
  CHECK_THROWS(run(w.k.view, w.k.view, w.k.view, w.k.view, {}),
               "[softmax_attention] out: expected an output that shares no memory with another argument");
  for (double scale : {-1.0, double(NAN), kInfinity, 1e-60, 1e60})
    CHECK_THROWS(with([&](auto& o) { o.scale = scale; }),
                 "[softmax_attention] scale: expected a finite value above 0, or 0 for D^-1/2, got ");
  for (double bias : {double(NAN), kInfinity, 1e60})
    CHECK_THROWS(with([&](auto& o) { o.key_norm_bias = bias; }),
                 "[softmax_attention] key_norm_bias: expected a finite value, got ");
  CHECK_THROWS(with([&](auto& o) { o.window_left = -2; }),
               "[softmax_attention] window_left: expected a number of tokens, or -1 for no bound, got -2");
  CHECK_THROWS(with([&](auto& o) { o.window_right = -9; }), "[softmax_attention] window_right: expected ");
  CHECK_THROWS(with([&](auto& o) { o.key_bias = p.lse.view; }), "[softmax_attention] key_bias: expected shape ");
  CHECK_THROWS(with([&](auto& o) { o.key_bias = make_tensor(static_cast<const float*>(v.data), {1, 3, 9}); }),
               "[softmax_attention] key_bias: expected 1, Hkv = 2 or H = 4 heads, got 3");
  CHECK_THROWS(with([&](auto& o) { o.pair_bias = w.k.view; }),
               "[softmax_attention] pair_bias: expected shape [B, H, N, M] = [1, 4, 8, 9], got [1, 2, 9, 6]");
  CHECK_THROWS_AS(TypeMismatch, with([&](auto& o) { o.key_mask = p.lse.view; }),
                  "[softmax_attention] key_mask: expected dtype bool, got float32");
  CHECK_THROWS(with([&](auto& o) { o.query_mask = make_tensor(reinterpret_cast<const bool*>(w.keep.data()), {1, 9}); }),
               "[softmax_attention] query_mask: expected shape [B, N] = [1, 8], got [1, 9]");
}

TEST(errors_of_the_backward_pass) {
  Problem p({1, 4, 2, 8, 6, 5, {{9, all_keys(), 2, true}}});
  const Sweep& w = p.sweeps[0];
  const ConstTensor q = p.q.view, k = w.k.view, v = w.v.view, dout = p.dout.view, dlse = p.dlse.view;
  SoftmaxAttentionOptions options;
  const auto run = [&](ConstTensor d, ConstTensor l, ConstTensor values, const SoftmaxAttentionGradients& gradients,
                       ConstTensor out = {}, ConstTensor lse = {}) {
    softmax_attention_bwd(Queue::cpu(1), d, l, q, k, values, options, out, lse, gradients, {});
  };
  const SoftmaxAttentionGradients good = {p.dq.view, w.dk.view, w.dv.view, {}, w.dpair_bias.view};
  const auto with = [&](auto change) {
    SoftmaxAttentionGradients gradients = good;
    change(gradients);
    run(dout, dlse, v, gradients);
  };
  CHECK_THROWS_AS(std::invalid_argument, run(dout, dlse, v, good), "[softmax_attention_bwd] workspace: expected at ");
  CHECK_THROWS_AS(TypeMismatch, run({}, {}, v, good),
                  "[softmax_attention_bwd] dout: expected an array, or one for dlse, got none");
  CHECK_THROWS_AS(TypeMismatch, run(dout, {}, {}, good),
                  "[softmax_attention_bwd] v: expected an array where there is dout, got none");
  CHECK_THROWS_AS(TypeMismatch, run({}, dlse, {}, good),
                  "[softmax_attention_bwd] v: expected an array where there is dv, got none");
  CHECK_THROWS(run(q, {}, v, good), "[softmax_attention_bwd] dout: expected shape [B, H, N, E] = [1, 4, 8, 5]");
  CHECK_THROWS(run({}, q, v, good), "[softmax_attention_bwd] dlse: expected shape [B, H, N] = [1, 4, 8]");
  CHECK_THROWS(run(dout, {}, v, good, q), "[softmax_attention_bwd] out: expected shape [B, H, N, E]");
  CHECK_THROWS(run(dout, {}, v, good, {}, q), "[softmax_attention_bwd] lse: expected shape [B, H, N]");
  CHECK_THROWS(with([&](auto& g) { g.dq = w.dk.view; }), "[softmax_attention_bwd] dq: expected shape ");
  CHECK_THROWS(with([&](auto& g) { g.dk = p.dq.view; }), "[softmax_attention_bwd] dk: expected shape ");
  CHECK_THROWS(with([&](auto& g) { g.dv = w.dk.view; }), "[softmax_attention_bwd] dv: expected shape ");
  CHECK_THROWS(with([&](auto& g) { g.dpair_bias = p.dq.view; }), "[softmax_attention_bwd] dpair_bias: expected shape ");
  CHECK_THROWS_AS(TypeMismatch, with([&](auto& g) { g.dkey_bias = w.dkey_bias.view; }),
                  "[softmax_attention_bwd] key_bias: expected an array where there is dkey_bias, got none");
  CHECK_THROWS(with([&](auto& g) { g.dk = w.k.view; }), "[softmax_attention_bwd] dk: expected an output that shares ");
  CHECK_THROWS(with([&](auto& g) { g.dq = p.dq.view, g.dq.data = g.dpair_bias.data; }),
               "[softmax_attention_bwd] dpair_bias: expected an output that shares no memory");
  options.key_bias = w.key_bias.view;
  CHECK_THROWS(with([&](auto& g) { g.dkey_bias = make_tensor(static_cast<float*>(g.dk.mutable_data()), {1, 4, 9}); }),
               "[softmax_attention_bwd] dkey_bias: expected shape [B, heads, M] = [1, 2, 9], got [1, 4, 9]");
  options.scale = -1;
  CHECK_THROWS(run(dout, dlse, v, good), "[softmax_attention_bwd] scale: expected a finite value above 0");
}
