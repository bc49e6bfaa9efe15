/// Problems for softmax_attention with up to three sweeps, and their answers: the equations evaluated in double and in
/// float.
#pragma once
#include "arrays.h"
#include "core/registry.h"
#include "subquad/softmax_attention.h"

namespace softmax {

using namespace subquad;
using check::Array, check::Layout, check::epsilon;

constexpr double kInfinity = INFINITY;

/// All elements of row i, counted over all axes but the last.
static inline void set_row(Array& a, int64_t i, double x) {
  const int64_t dim = a.view.shape[a.view.rank - 1];
  for (int64_t c = 0; c < dim; ++c) a.set(i * dim + c, x);
}

static inline VisibleRule all_keys() { return {Visible::all, false, 0, -1, -1, 1, 1}; }
static inline VisibleRule band(int64_t left, int64_t right, int64_t offset) {
  return {Visible::band, false, offset, left, right, 1, 1};
}
static inline VisibleRule causal(int64_t n, int64_t m) { return band(-1, 0, m - n); }

/// The rules as args.h words them.
static inline bool sees(const VisibleRule& rule, int64_t n, int64_t m) {
  const int64_t p = n + rule.offset;
  const int64_t block = p >= 0 ? p / rule.block : -((rule.block - 1 - p) / rule.block);
  switch (rule.kind) {
    case Visible::all:
      return true;
    case Visible::band:
      return (rule.left < 0 || m >= p - rule.left) && (rule.right < 0 || m <= p + rule.right);
    case Visible::block:
      return block == m / rule.block && (!rule.causal || m <= p);
    case Visible::before:
      return (m + 1) * rule.chunk <= block * rule.block;
    case Visible::after:
      return m * rule.chunk >= (block + 1) * rule.block;
    case Visible::cell:
      return n * rule.chunk <= m && m < (n + 1) * rule.chunk;
  }
  return false;
}

struct SweepSizes {
  int64_t m;
  VisibleRule rule = all_keys();
  int64_t bias_heads = 0;  // 0: no key bias
  bool pair_bias = false;
  double key_norm_bias = 0;
};

struct Sizes {
  int64_t batch, heads, heads_kv, n, d, e;
  std::vector<SweepSizes> sweeps;
  bool masked = false;
  Layout layout = Layout::dense;
  DType q = DType::f32, k = DType::f32, v = DType::f32, out = DType::f32;
  double spread = 1;  // of q and k
};

struct Sweep {
  SweepSizes s;
  Array k, v, key_bias, pair_bias, dk, dv, dkey_bias, dpair_bias;
  std::vector<char> keep;
};

struct Problem {
  Sizes s;
  float scale;
  Array q, out, lse, dout, dlse, dq;
  std::vector<char> keep;
  std::vector<Sweep> sweeps;

  explicit Problem(const Sizes& sizes, unsigned seed = 1)
      : s(sizes),
        scale(float(1 / std::sqrt(double(s.d)))),
        q({s.batch, s.heads, s.n, s.d}, s.q, s.layout),
        out({s.batch, s.heads, s.n, s.e}, s.out, s.layout),
        lse({s.batch, s.heads, s.n}, DType::f32, s.layout),
        dout({s.batch, s.heads, s.n, s.e}, s.out, s.layout),
        dlse({s.batch, s.heads, s.n}, DType::f32, s.layout),
        dq({s.batch, s.heads, s.n, s.d}, s.q, s.layout) {
    std::mt19937 random(seed);
    q.fill_normal(random, s.spread), dout.fill_normal(random), dlse.fill_normal(random);
    for (const SweepSizes& sweep : s.sweeps) sweeps.push_back(make_sweep(random, sweep));
    keep.assign(size_t(s.batch * s.n), 1);
    if (!s.masked) return;
    for (char& x : keep) x = random() % 10 < 8;
    for (Sweep& sweep : sweeps)
      for (char& x : sweep.keep) x = random() % 10 < 6;
    fill_masked(NAN);
  }

  /// Everything of masked tokens, the pair biases included.
  void fill_masked(double x) {
    for (Array* a : {&q, &dout}) fill_tokens(*a, keep, s.n, a->view.shape[3], x);
    for (Sweep& sweep : sweeps) {
      fill_tokens(sweep.k, sweep.keep, sweep.s.m, s.d, x);
      fill_tokens(sweep.v, sweep.keep, sweep.s.m, s.e, x);
      fill_tokens(sweep.key_bias, sweep.keep, sweep.s.m, 1, x);
      if (!sweep.s.pair_bias) continue;
      for (int64_t i = 0; i < sweep.pair_bias.size(); ++i) {
        const int64_t m = sweep.s.m, row = i / m, b = row / s.n / s.heads;
        if (!keep[size_t(b * s.n + row % s.n)] || !sweep.keep[size_t(b * m + i % m)]) sweep.pair_bias.set(i, x);
      }
    }
  }

  void forward(int threads = 2, bool wants_out = true, bool wants_lse = true) {
    SoftmaxAttentionArgs a = args();
    if (!wants_lse) a.lse = {};
    if (!wants_out) {
      a.out = {}, a.dim_v = 0;
      for (SoftmaxSweep& sweep : a.sweeps) sweep.v = {};
    }
    launch(a, threads);
  }

  static void launch(const SoftmaxAttentionArgs& a, int threads) {
    const Queue queue = Queue::cpu(threads);
    const int64_t bytes = core::workspace_bytes("softmax_attention", queue, &Kernels::softmax_attention, a);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    core::launch("softmax_attention", queue, &Kernels::softmax_attention, a, {workspace.data(), bytes});
  }

  /// Of both passes: all operands but the cotangents and the gradients.
  SoftmaxAttentionArgs args() {
    SoftmaxAttentionArgs a = {};
    a.batch = s.batch, a.heads_q = s.heads, a.heads_kv = s.heads_kv, a.seq_q = s.n, a.dim_qk = s.d, a.dim_v = s.e;
    a.scale = scale;
    a.q = core::operand(q.view), a.out = core::operand(out.view), a.lse = core::operand(lse.view);
    if (s.masked) a.query_mask = core::operand(mask(keep, s.n));
    for (Sweep& from : sweeps) {
      SoftmaxSweep& to = a.sweeps[a.num_sweeps++];
      to.seq_k = from.s.m, to.rule = from.s.rule, to.key_norm_bias = float(from.s.key_norm_bias);
      to.k = core::operand(from.k.view), to.v = core::operand(from.v.view);
      to.key_bias = core::operand(from.key_bias.view), to.pair_bias = core::operand(from.pair_bias.view);
      to.bias_group = from.s.bias_heads ? s.heads / from.s.bias_heads : 1;
      if (s.masked) to.key_mask = core::operand(mask(from.keep, from.s.m));
    }
    return a;
  }

 private:
  Tensor mask(std::vector<char>& bits, int64_t tokens) {
    return make_tensor(reinterpret_cast<bool*>(bits.data()), {s.batch, tokens});
  }

  Sweep make_sweep(std::mt19937& random, const SweepSizes& z) {
    Sweep w;
    w.s = z;
    w.k = Array({s.batch, s.heads_kv, z.m, s.d}, s.k, s.layout), w.dk = Array({s.batch, s.heads_kv, z.m, s.d}, s.k);
    w.v = Array({s.batch, s.heads_kv, z.m, s.e}, s.v, s.layout), w.dv = Array({s.batch, s.heads_kv, z.m, s.e}, s.v);
    w.k.fill_normal(random, s.spread), w.v.fill_normal(random);
    w.keep.assign(size_t(s.batch * z.m), 1);
    if (z.bias_heads) {
      w.key_bias = Array({s.batch, z.bias_heads, z.m}, DType::f32, s.layout);
      w.dkey_bias = Array({s.batch, z.bias_heads, z.m}, DType::f32);
      w.key_bias.fill_normal(random);
      for (int64_t i = 0; i < w.key_bias.size(); ++i)
        if (random() % 8 == 0) w.key_bias.set(i, -kInfinity);
    }
    if (z.pair_bias) {
      w.pair_bias = Array({s.batch, s.heads, s.n, z.m}, DType::f32, s.layout);
      w.dpair_bias = Array({s.batch, s.heads, s.n, z.m}, DType::f32);
      w.pair_bias.fill_normal(random);
      for (int64_t i = 0; i < w.pair_bias.size(); ++i)
        if (random() % 8 == 0) w.pair_bias.set(i, -kInfinity);
    }
    return w;
  }

  /// Elements [B, heads, tokens, dim] of the tokens that are not kept.
  static void fill_tokens(Array& a, const std::vector<char>& keep, int64_t tokens, int64_t dim, double x) {
    for (int64_t i = 0; i < a.size(); ++i) {
      const int64_t b = i / dim / tokens / a.view.shape[1];
      if (!keep[size_t(b * tokens + i / dim % tokens)]) a.set(i, x);
    }
  }
};

/// The equations of the header over all sweeps, evaluated in T: double is the truth, float the plain formula. With
/// `backward` the gradients for the cotangents dout and dlse too.
template <class T>
struct Reference {
  struct Gradients {
    std::vector<T> dk, dv, dkey_bias, dpair_bias;
  };
  std::vector<T> out, lse, dq;
  std::vector<Gradients> sweeps;

  explicit Reference(const Problem& problem, bool backward = false) : p(problem), s(problem.s) {
    out.resize(p.out.values.size()), lse.resize(p.lse.values.size()), dq.resize(p.q.values.size());
    for (const Sweep& w : p.sweeps)
      sweeps.push_back({std::vector<T>(w.k.values.size()), std::vector<T>(w.v.values.size()),
                        std::vector<T>(w.key_bias.values.size()), std::vector<T>(w.pair_bias.values.size())});
    for (int64_t row = 0; row < s.batch * s.heads * s.n; ++row) add_row(row, backward);
  }

 private:
  const Problem& p;
  const Sizes& s;

  struct Pair {
    size_t sweep, key, bias, pair;  // flat indices: of the row of k and v, of key_bias, of pair_bias
    T x;
  };

  Pair pair_at(int64_t row, size_t i, int64_t m) const {
    const Sweep& w = p.sweeps[i];
    const int64_t b = row / s.n / s.heads, h = row / s.n % s.heads, heads_bias = std::max<int64_t>(1, w.s.bias_heads);
    const size_t key = size_t((b * s.heads_kv + h / (s.heads / s.heads_kv)) * w.s.m + m);
    const size_t bias = size_t((b * heads_bias + h / (s.heads / heads_bias)) * w.s.m + m);
    const size_t pair = size_t(row * w.s.m + m);
    T product = 0, square = 0;
    for (size_t d = 0; d < size_t(s.d); ++d) {
      const T k = T(w.k.values[key * size_t(s.d) + d]);
      product += T(p.q.values[size_t(row * s.d) + d]) * T(p.scale) * k;
      square += k * k;
    }
    T x = product;
    if (w.s.key_norm_bias != 0) x += T(float(w.s.key_norm_bias)) * square;
    if (w.s.bias_heads) x += T(w.key_bias.values[bias]);
    if (w.s.pair_bias) x += T(w.pair_bias.values[pair]);
    return {i, key, bias, pair, x};
  }

  /// A key of bias -inf has no effect, like a masked one.
  bool has_effect(const Pair& pair, int64_t row, int64_t m) const {
    const Sweep& w = p.sweeps[pair.sweep];
    return w.keep[size_t(row / s.n / s.heads * w.s.m + m)] && sees(w.s.rule, row % s.n, m) &&
           !(w.s.bias_heads && w.key_bias.values[pair.bias] == -kInfinity);
  }

  void add_row(int64_t row, bool backward) {
    std::vector<Pair> pairs;
    T top = -T(kInfinity), total = 0;
    for (size_t i = 0; i < p.sweeps.size() && p.keep[size_t(row / s.n / s.heads * s.n + row % s.n)]; ++i) {
      for (int64_t m = 0; m < p.sweeps[i].s.m; ++m) {
        const Pair pair = pair_at(row, i, m);
        if (!has_effect(pair, row, m)) continue;
        pairs.push_back(pair);
        if (!(pair.x <= top)) top = pair.x;
      }
    }
    T* sum = &out[size_t(row * s.e)];
    lse[size_t(row)] = -T(kInfinity);
    if (top == -T(kInfinity)) return;
    for (const Pair& pair : pairs) {
      const T weight = std::exp(pair.x - top);
      total += weight;
      for (size_t c = 0; c < size_t(s.e); ++c)
        sum[c] += weight * T(p.sweeps[pair.sweep].v.values[pair.key * size_t(s.e) + c]);
    }
    for (size_t c = 0; c < size_t(s.e); ++c) sum[c] /= total;
    lse[size_t(row)] = top + std::log(total);
    if (backward) add_gradients(size_t(row), pairs, sum);
  }

  void add_gradients(size_t row, const std::vector<Pair>& pairs, const T* sum) {
    const size_t dim = size_t(s.d), width = size_t(s.e);
    T own = -T(p.dlse.values[row]);
    for (size_t c = 0; c < width; ++c) own += T(p.dout.values[row * width + c]) * sum[c];
    for (const Pair& pair : pairs) {
      const Sweep& w = p.sweeps[pair.sweep];
      Gradients& g = sweeps[pair.sweep];
      const T weight = std::exp(pair.x - lse[row]);
      T along = 0;
      for (size_t c = 0; c < width; ++c) {
        along += T(p.dout.values[row * width + c]) * T(w.v.values[pair.key * width + c]);
        g.dv[pair.key * width + c] += weight * T(p.dout.values[row * width + c]);
      }
      const T dx = weight * (along - own);
      for (size_t d = 0; d < dim; ++d) {
        const T q = T(p.q.values[row * dim + d]), k = T(w.k.values[pair.key * dim + d]);
        dq[row * dim + d] += T(p.scale) * dx * k;
        g.dk[pair.key * dim + d] += dx * (T(p.scale) * q + 2 * T(float(w.s.key_norm_bias)) * k);
      }
      if (w.s.bias_heads) g.dkey_bias[pair.bias] += dx;
      if (w.s.pair_bias) g.dpair_bias[pair.pair] += dx;
    }
  }
};

/// Error against double at most twice that of the plain formula in float, plus one rounding of the output and one of
/// the largest value, where the plain formula may happen to be exact; what is not finite in double is the same here.
/// `at_least`: the size of terms that may have cancelled in a single logit.
static inline void check_budget(const std::string& what, const Array& got, const std::vector<double>& exact,
                                const std::vector<float>& plain, double at_least = 0) {
  double error = 0, granted = 0, largest = at_least;
  bool same = true;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double value = got.get(int64_t(i));
    if (!std::isfinite(exact[i])) {
      same &= std::isnan(exact[i]) ? std::isnan(value) : value == exact[i];
      continue;
    }
    same &= std::isfinite(value);
    error = std::max(error, std::fabs(value - exact[i]));
    if (std::isfinite(plain[i])) granted = std::max(granted, std::fabs(plain[i] - exact[i]));
    largest = std::max(largest, std::fabs(exact[i]));
  }
  const double budget = 2 * granted + (epsilon(got.view.dtype) / 2 + 0x1p-23) * largest;
  if (same && error <= budget) return;
  char text[120];
  std::snprintf(text, sizeof text, ": error %.3g above %.3g%s", error, budget, same ? "" : ", or NaN or infinity");
  check::fail(__FILE__, __LINE__, what + text);
}

static inline bool same_bits(const Array& a, const Array& b) {
  bool same = true;
  for (int64_t i = 0; i < a.size(); ++i) same &= float_to_bits(a.get(i)) == float_to_bits(b.get(i));
  return same;
}

}  // namespace softmax
