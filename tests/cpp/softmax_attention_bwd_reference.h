/// The backward pass of the problems of softmax_attention_reference.h, and what its gradients are compared with.
#pragma once
#include "softmax_attention_reference.h"

namespace softmax {

/// Which operands a call gets and which gradients it forms.
struct Choice {
  bool dout = true, dlse = true, dq = true, dk = true, dv = true, dkey_bias = true, dpair_bias = true;
};

static inline std::vector<Array*> gradients_of(Problem& p) {
  std::vector<Array*> arrays = {&p.dq};
  for (Sweep& w : p.sweeps)
    for (Array* a : {&w.dk, &w.dv, &w.dkey_bias, &w.dpair_bias}) arrays.push_back(a);
  return arrays;
}

static inline void launch_bwd(const SoftmaxAttentionArgs& a, int threads) {
  const Queue queue = Queue::cpu(threads);
  const int64_t bytes = core::workspace_bytes("softmax_attention_bwd", queue, &Kernels::softmax_attention_bwd, a);
  std::vector<char> workspace(size_t(bytes), char(0xff));
  core::launch("softmax_attention_bwd", queue, &Kernels::softmax_attention_bwd, a, {workspace.data(), bytes});
}

/// Both passes, with NaN in the gradients beforehand. The one in between is not rounded to 16 bits.
static inline void backward(Problem& p, const Choice& c = {}, int threads = 2) {
  Array out({p.s.batch, p.s.heads, p.s.n, p.s.e}, DType::f32);
  SoftmaxAttentionArgs a = p.args();
  a.out = core::operand(out.view);
  Problem::launch(a, threads);
  for (Array* gradient : gradients_of(p)) std::fill(gradient->bytes.begin(), gradient->bytes.end(), 0xff);
  if (c.dout) a.dout = core::operand(p.dout.view);
  if (!c.dout) a.out = {};
  if (c.dlse) a.dlse = core::operand(p.dlse.view);
  if (c.dq) a.dq = core::operand(p.dq.view);
  for (size_t i = 0; i < p.sweeps.size(); ++i) {
    Sweep& from = p.sweeps[i];
    SoftmaxSweep& to = a.sweeps[i];
    if (c.dk) to.dk = core::operand(from.dk.view);
    if (c.dv) to.dv = core::operand(from.dv.view);
    if (c.dkey_bias) to.dkey_bias = core::operand(from.dkey_bias.view);
    if (c.dpair_bias) to.dpair_bias = core::operand(from.dpair_bias.view);
  }
  launch_bwd(a, threads);
}

/// The largest sum of the sizes of the terms of one element, per gradient. Where they cancel, and in a logit of many
/// terms, a rounding of each is what any evaluation in float may lose.
struct TermSizes {
  struct OfSweep {
    std::vector<double> dk, dv, dkey_bias, dpair_bias;
  };
  std::vector<double> dq;
  std::vector<OfSweep> sweeps;

  TermSizes(const Problem& p, const Reference<double>& exact) : dq(p.q.values.size()) {
    for (size_t i = 0; i < p.sweeps.size(); ++i) {
      const Sweep& w = p.sweeps[i];
      sweeps.push_back({std::vector<double>(w.k.values.size()), std::vector<double>(w.v.values.size()),
                        std::vector<double>(w.key_bias.values.size()), std::vector<double>(w.pair_bias.values.size())});
      for (int64_t row = 0; row < p.s.batch * p.s.heads * p.s.n; ++row)
        for (int64_t m = 0; m < w.s.m; ++m) add_pair(p, exact, size_t(row), i, m);
    }
  }

  static double largest(const std::vector<double>& sizes) {
    return sizes.empty() ? 0 : *std::max_element(sizes.begin(), sizes.end());
  }

 private:
  void add_pair(const Problem& p, const Reference<double>& exact, size_t row, size_t i, int64_t m) {
    const Sizes& s = p.s;
    const Sweep& w = p.sweeps[i];
    const int64_t b = int64_t(row) / s.n / s.heads, h = int64_t(row) / s.n % s.heads, n = int64_t(row) % s.n;
    if (exact.lse[row] == -kInfinity || !w.keep[size_t(b * w.s.m + m)] || !sees(w.s.rule, n, m)) return;
    const int64_t heads_bias = std::max<int64_t>(1, w.s.bias_heads);
    const size_t key = size_t((b * s.heads_kv + h / (s.heads / s.heads_kv)) * w.s.m + m), pair = row * size_t(w.s.m);
    const size_t bias = size_t((b * heads_bias + h / (s.heads / heads_bias)) * w.s.m + m), dim = size_t(s.d);
    const double *q = &p.q.values[row * dim], *k = &w.k.values[key * dim];
    double x = 0, terms = 1;
    const auto add = [&](double term) { x += term, terms += std::fabs(term); };
    for (size_t d = 0; d < dim; ++d) add(p.scale * q[d] * k[d]), add(w.s.key_norm_bias * k[d] * k[d]);
    if (w.s.bias_heads) add(w.key_bias.values[bias]);
    if (w.s.pair_bias) add(w.pair_bias.values[pair + size_t(m)]);
    if (x == -kInfinity) return;
    const double weight = std::exp(x - exact.lse[row]) * terms;
    OfSweep& to = sweeps[i];
    double dx = std::fabs(p.dlse.values[row]);
    for (size_t c = 0; c < size_t(s.e); ++c) {
      const double dout = std::fabs(p.dout.values[row * size_t(s.e) + c]);
      dx += dout * (std::fabs(w.v.values[key * size_t(s.e) + c]) + std::fabs(exact.out[row * size_t(s.e) + c]));
      to.dv[key * size_t(s.e) + c] += weight * dout;
    }
    dx *= weight;
    for (size_t d = 0; d < dim; ++d) {
      dq[row * dim + d] += dx * p.scale * std::fabs(k[d]);
      to.dk[key * dim + d] += dx * (p.scale * std::fabs(q[d]) + 2 * std::fabs(w.s.key_norm_bias * k[d]));
    }
    if (w.s.bias_heads) to.dkey_bias[bias] += dx;
    if (w.s.pair_bias) to.dpair_bias[pair + size_t(m)] = dx;
  }
};

struct Answers {
  Reference<double> exact;
  Reference<float> plain;
  TermSizes terms;

  explicit Answers(const Problem& p) : exact(p, true), plain(p, true), terms(p, exact) {}

  void compare(const std::string& what, const Problem& p) const {
    check_budget(what + ": dq", p.dq, exact.dq, plain.dq, TermSizes::largest(terms.dq));
    for (size_t i = 0; i < p.sweeps.size(); ++i) {
      const std::string where = what + ", sweep " + std::to_string(i);
      const Sweep& got = p.sweeps[i];
      const auto& e = exact.sweeps[i];
      const auto& g = plain.sweeps[i];
      const TermSizes::OfSweep& t = terms.sweeps[i];
      check_budget(where + ": dk", got.dk, e.dk, g.dk, TermSizes::largest(t.dk));
      check_budget(where + ": dv", got.dv, e.dv, g.dv, TermSizes::largest(t.dv));
      check_budget(where + ": dkey_bias", got.dkey_bias, e.dkey_bias, g.dkey_bias, TermSizes::largest(t.dkey_bias));
      check_budget(where + ": dpair_bias", got.dpair_bias, e.dpair_bias, g.dpair_bias,
                   TermSizes::largest(t.dpair_bias));
    }
  }
};

}  // namespace softmax
