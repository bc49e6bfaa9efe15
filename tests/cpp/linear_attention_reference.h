/// Problems for linear_attention with their answers: the equations of the header pair by pair, in double and in float.
#pragma once
#include <algorithm>
#include <functional>
#include <random>

#include "check.h"
#include "subquad/linear_attention.h"

namespace linear_test {

using namespace subquad;

/// An array with values that its dtype can hold; strided: every row of the last axis is followed by a gap, and of four
/// axes the two in the middle lie the other way round.
struct Array {
  std::vector<double> values;
  std::vector<unsigned char> bytes;
  Tensor view;

  Array() = default;
  Array(std::initializer_list<int64_t> shape, DType dtype = DType::f32, bool strided = false) {
    for (int64_t extent : shape) view.shape[view.rank++] = extent;
    view.dtype = dtype;
    int order[4] = {0, 1, 2, 3};
    if (strided && view.rank == 4) std::swap(order[1], order[2]);
    int64_t step = 1;
    for (int i = view.rank - 1; i >= 0; --i) {
      view.stride[order[i]] = step;
      step *= view.shape[order[i]] + (strided && i == view.rank - 1 ? 3 : 0);
    }
    bytes.assign(size_t(step * dtype_bytes(dtype)) + 64, 0xff);
    view.data = bytes.data();
    values.resize(size_t(view.numel()));
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  Array(Array&&) = default;
  Array& operator=(Array&&) = default;

  int64_t at(int64_t i) const {
    int64_t offset = 0;
    for (int k = view.rank - 1; k >= 0; --k) offset += i % view.shape[k] * view.stride[k], i /= view.shape[k];
    return offset;
  }
  float get(int64_t i) const {
    if (view.dtype == DType::f32) return static_cast<const float*>(view.data)[at(i)];
    if (view.dtype == DType::f16) return to_float(static_cast<const half*>(view.data)[at(i)]);
    return to_float(static_cast<const bfloat16*>(view.data)[at(i)]);
  }
  void set(int64_t i, double x) {
    void* data = bytes.data();
    if (view.dtype == DType::f32) from_float(float(x), static_cast<float*>(data) + at(i));
    if (view.dtype == DType::f16) from_float(float(x), static_cast<half*>(data) + at(i));
    if (view.dtype == DType::bf16) from_float(float(x), static_cast<bfloat16*>(data) + at(i));
    values[size_t(i)] = get(i);
  }
};

enum class Mode { plain, logs, weights };
enum class Fade { none, decay, gate };

struct Sizes {
  int64_t batch, heads, heads_kv, n, m, f, e;
  Mode mode = Mode::logs;
  bool causal = true;
  Fade fade = Fade::none;
  bool masked = false, normalize = true, strided = false, state = false;
  DType features = DType::f32, values = DType::f32;
  double spread = 1;  // of logarithms
};

struct Problem {
  Sizes s;
  Array fq, fk, v, dout, out, weight, fade, dfq, dfk, dv, dweight, dfade;
  Array state_s, state_z, state_shift, new_s, new_z, new_shift;
  std::vector<char> keep;
  LinearAttentionOptions options;
  LinearAttentionState state, new_state;
  LinearAttentionGradients gradients;

  explicit Problem(const Sizes& sizes, unsigned seed = 1)
      : s(sizes),
        fq({s.batch, s.heads, s.n, s.f}, s.features, s.strided),
        fk({s.batch, s.heads_kv, s.m, s.f}, s.features, s.strided),
        v({s.batch, s.heads_kv, s.m, s.e}, s.values, s.strided),
        dout({s.batch, s.heads, s.n, s.e}, s.values, s.strided),
        out({s.batch, s.heads, s.n, s.e}, s.values, s.strided),
        weight({s.batch, s.heads_kv, s.m}, DType::f32, s.strided),
        fade({s.batch, s.heads_kv, s.m}, DType::f32, s.strided),
        dfq({s.batch, s.heads, s.n, s.f}, s.features, s.strided),
        dfk({s.batch, s.heads_kv, s.m, s.f}, s.features, s.strided),
        dv({s.batch, s.heads_kv, s.m, s.e}, s.values, s.strided),
        dweight({s.batch, s.heads_kv, s.m}, DType::f32, s.strided),
        dfade({s.batch, s.heads_kv, s.m}, DType::f32, s.strided),
        state_s({s.batch, s.heads_kv, s.f, s.e}, DType::f32, s.strided),
        state_z({s.batch, s.heads_kv, s.f}, DType::f32, s.strided),
        state_shift({s.batch, s.heads_kv, s.f}, DType::f32, s.strided),
        new_s({s.batch, s.heads_kv, s.f, s.e}, DType::f32, s.strided),
        new_z({s.batch, s.heads_kv, s.f}, DType::f32, s.strided),
        new_shift({s.batch, s.heads_kv, s.f}, DType::f32, s.strided) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform;
    const auto each = [](Array& a, auto value) {
      for (int64_t i = 0; i < a.view.numel(); ++i) a.set(i, value());
    };
    for (Array* a : {&fq, &fk})
      each(*a, [&] { return s.mode == Mode::logs ? s.spread * normal(random) : 0.1 + std::fabs(normal(random)); });
    for (Array* a : {&v, &dout}) each(*a, [&] { return normal(random); });
    each(weight, [&] { return s.spread * normal(random); });
    each(fade, [&] { return uniform(random) < 0.1 ? std::floor(2 * uniform(random)) : 0.5 + 0.5 * uniform(random); });
    each(state_s, [&] { return normal(random); });
    each(state_z, [&] { return 0.2 + uniform(random); });
    const double common = std::log(2.0) * std::floor(8 * uniform(random) - 4);
    each(state_shift,
         [&] { return s.mode == Mode::logs ? std::log(2.0) * std::floor(8 * uniform(random) - 4) : common; });
    keep.assign(size_t(s.batch * s.m), 1);
    options.log_features = s.mode == Mode::logs, options.is_causal = s.causal, options.normalize = s.normalize;
    if (s.mode == Mode::weights) options.key_log_weight = weight.view;
    if (s.fade == Fade::decay) options.decay = fade.view;
    if (s.fade == Fade::gate) options.gate = fade.view;
    if (s.state) state = {state_s.view, state_z.view, s.mode == Mode::plain ? Tensor() : state_shift.view};
    if (s.causal) new_state = {new_s.view, new_z.view, s.mode == Mode::plain ? Tensor() : new_shift.view};
    gradients = {dfq.view, dfk.view, dv.view, Tensor(), Tensor()};
    if (s.mode == Mode::weights) gradients.dkey_log_weight = dweight.view;
    if (s.fade != Fade::none) gradients.dgate = dfade.view;
    if (!s.masked) return;
    for (char& k : keep) k = random() % 10 < 6;
    options.key_mask = make_tensor(reinterpret_cast<const bool*>(keep.data()), {s.batch, s.m});
    fill_masked(NAN);
  }

  /// All keys but the first lower by `level`, and one decay.
  void set_after_first(double level, double decay) {
    Array& x = s.mode == Mode::logs ? fk : weight;
    for (int64_t i = x.view.numel() / s.m; i < x.view.numel(); ++i) x.set(i, x.values[size_t(i)] + level);
    for (int64_t i = 0; i < fade.view.numel(); ++i) fade.set(i, decay);
  }

  void fill_masked(double x) {
    for (Array* a : {&fk, &v, &weight}) {
      const int64_t last = a->view.rank == 4 ? a->view.shape[3] : 1;
      for (int64_t i = 0; i < a->view.numel(); ++i)
        if (!keep[size_t(i / (s.heads_kv * s.m * last) * s.m + i / last % s.m)]) a->set(i, x);
    }
  }

  void forward(int threads = 2) {
    const Queue queue = Queue::cpu(threads);
    const int64_t bytes =
        linear_attention_workspace_bytes(queue, fq.view, fk.view, v.view, options, state, out.view, new_state);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    linear_attention(queue, fq.view, fk.view, v.view, options, state, out.view, new_state, {workspace.data(), bytes});
  }

  void backward(int threads = 2) {
    const Queue queue = Queue::cpu(threads);
    const int64_t bytes =
        linear_attention_bwd_workspace_bytes(queue, dout.view, fq.view, fk.view, v.view, options, state, gradients);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    linear_attention_bwd(queue, dout.view, fq.view, fk.view, v.view, options, state, gradients,
                         {workspace.data(), bytes});
  }
};

/// The equations of the header, evaluated in T: double is the truth, float the plain formula.
template <class T>
struct Reference {
  std::vector<T> out, dfq, dfk, dv, dweight, dfade;

  explicit Reference(Problem& problem, bool backward = false)
      : out(problem.out.values.size()),
        dfq(problem.fq.values.size()),
        dfk(problem.fk.values.size()),
        dv(problem.v.values.size()),
        dweight(problem.weight.values.size()),
        dfade(problem.fade.values.size()),
        p(problem),
        s(problem.s) {
    for (b = 0; b < s.batch; ++b)
      for (h = 0; h < s.heads; ++h)
        for (int64_t n = 0; n < s.n; ++n) row(n, backward);
  }

 private:
  Problem& p;
  const Sizes& s;
  int64_t b = 0, h = 0;
  std::vector<T> link;  // weight of each key in the row, 0 if not seen
  T carry = 1;          // weight of the state

  int64_t key_head() const { return b * s.heads_kv + h / (s.heads / s.heads_kv); }
  T fade_of(int64_t m) const { return T(p.fade.values[size_t(key_head() * s.m + m)]); }
  bool kept(int64_t m) const { return p.keep[size_t(b * s.m + m)]; }
  T share(int64_t m) const { return s.fade == Fade::gate ? 1 - fade_of(m) : T(1); }

  /// Weights of keys and of the state in row t; `skip`: without the factor of that key.
  void links(int64_t t, int64_t skip = -1) {
    link.assign(size_t(s.m), T(0));
    T product = 1;
    for (int64_t m = std::min(t, s.m - 1); m >= 0; --m) {
      if (!kept(m)) continue;
      link[size_t(m)] = product * share(m);
      if (s.fade != Fade::none && m != skip) product *= fade_of(m);
    }
    carry = product;
  }

  /// Exponent of feature i of query row q with key m (m = -1: with the state); the factor beside it.
  T exponent(int64_t q, int64_t m, int64_t i) const {
    const int64_t f = s.f, k = key_head() * s.m + m;
    T x = s.mode == Mode::logs ? T(p.fq.values[size_t(q * f + i)]) : T(0);
    if (m < 0) return s.mode == Mode::plain ? x : x + T(p.state_shift.values[size_t(key_head() * f + i)]);
    if (s.mode == Mode::logs) x += T(p.fk.values[size_t(k * f + i)]);
    if (s.mode == Mode::weights) x += T(p.weight.values[size_t(k)]);
    return x;
  }
  T query(int64_t q, int64_t i) const { return s.mode == Mode::logs ? T(1) : T(p.fq.values[size_t(q * s.f + i)]); }
  T key(int64_t m, int64_t i) const {
    return s.mode == Mode::logs ? T(1) : T(p.fk.values[size_t((key_head() * s.m + m) * s.f + i)]);
  }

  T top(int64_t q) const {
    T best = -INFINITY;
    for (int64_t m = s.state ? -1 : 0; m < s.m; ++m) {
      const T weight = m < 0 ? carry : link[size_t(m)];
      for (int64_t i = 0; i < s.f && weight > 0; ++i) best = std::max(best, exponent(q, m, i) + std::log(weight));
    }
    return s.normalize && best > -INFINITY ? best : T(0);
  }

  void row(int64_t n, bool backward) {
    const int64_t q = (b * s.heads + h) * s.n + n, t = s.causal ? n + s.m - s.n : s.m - 1, e = s.e;
    links(t);
    const std::vector<T> own = link;
    const T own_carry = carry, shift = top(q);
    std::vector<T> sum(size_t(e), T(0)), score(size_t(s.m), T(0));
    T total = 0;
    for (int64_t i = 0; i < s.f && s.state && carry > 0; ++i) {
      const T w = query(q, i) * std::exp(exponent(q, -1, i) - shift) * carry;
      const int64_t at = key_head() * s.f + i;
      total += w * T(p.state_z.values[size_t(at)]);
      for (int64_t c = 0; c < e; ++c) sum[size_t(c)] += w * T(p.state_s.values[size_t(at * e + c)]);
    }
    for (int64_t m = 0; m < s.m; ++m) {
      if (!(link[size_t(m)] > 0)) continue;
      T raw = 0;
      for (int64_t i = 0; i < s.f; ++i) raw += query(q, i) * key(m, i) * std::exp(exponent(q, m, i) - shift);
      score[size_t(m)] = raw * link[size_t(m)], total += score[size_t(m)];
      for (int64_t c = 0; c < e; ++c) sum[size_t(c)] += score[size_t(m)] * value(m, c);
    }
    const T scale = !s.normalize ? T(1) : total == 0 ? T(0) : 1 / total;
    for (int64_t c = 0; c < e; ++c) out[size_t(q * e + c)] = sum[size_t(c)] * scale;
    if (!backward) return;
    T along = 0;
    for (int64_t c = 0; s.normalize && c < e; ++c) along += grad(q, c) * out[size_t(q * e + c)];
    std::vector<T> push(size_t(s.m), T(0));  // gradient of each score
    for (int64_t m = 0; m <= std::min(t, s.m - 1); ++m) {
      if (!kept(m)) continue;
      for (int64_t c = 0; c < e; ++c) push[size_t(m)] += grad(q, c) * value(m, c);
      push[size_t(m)] = (push[size_t(m)] - along) * scale;
      row_key(q, m, push[size_t(m)], score[size_t(m)] * scale, own[size_t(m)], shift);
    }
    if (s.fade != Fade::none) fades(q, t, push, along, scale, shift);
    if (s.state) state_gradient(q, own_carry, along, scale, shift);
  }

  T value(int64_t m, int64_t c) const { return T(p.v.values[size_t((key_head() * s.m + m) * s.e + c)]); }
  T grad(int64_t q, int64_t c) const { return T(p.dout.values[size_t(q * s.e + c)]); }

  void row_key(int64_t q, int64_t m, T push, T score, T weight, T shift) {
    const int64_t k = key_head() * s.m + m;
    for (int64_t c = 0; c < s.e; ++c) dv[size_t(k * s.e + c)] += score * grad(q, c);
    for (int64_t i = 0; i < s.f && weight > 0; ++i) {
      const T term = push * weight * std::exp(exponent(q, m, i) - shift);
      dfq[size_t(q * s.f + i)] += term * key(m, i);
      dfk[size_t(k * s.f + i)] += term * query(q, i);
      dweight[size_t(k)] += term * query(q, i) * key(m, i);
    }
  }

  T state_push(int64_t q, int64_t i, T along, T scale) const {
    const int64_t at = key_head() * s.f + i;
    T push = s.normalize ? -along * T(p.state_z.values[size_t(at)]) : T(0);
    for (int64_t c = 0; c < s.e; ++c) push += grad(q, c) * T(p.state_s.values[size_t(at * s.e + c)]);
    return push * scale;
  }

  void state_gradient(int64_t q, T weight, T along, T scale, T shift) {
    for (int64_t i = 0; i < s.f && weight > 0; ++i)
      dfq[size_t(q * s.f + i)] += state_push(q, i, along, scale) * weight * std::exp(exponent(q, -1, i) - shift);
  }

  /// Gradients of the gates: what each score would be without the factor of key j, and as its own share.
  void fades(int64_t q, int64_t t, const std::vector<T>& push, T along, T scale, T shift) {
    std::vector<T> raw(size_t(s.m), T(0));
    for (int64_t m = 0; m <= std::min(t, s.m - 1); ++m)
      for (int64_t i = 0; i < s.f && kept(m); ++i)
        raw[size_t(m)] += query(q, i) * key(m, i) * std::exp(exponent(q, m, i) - shift) * push[size_t(m)];
    T from_state = 0;
    for (int64_t i = 0; i < s.f && s.state; ++i)
      from_state += state_push(q, i, along, scale) * query(q, i) * std::exp(exponent(q, -1, i) - shift);
    for (int64_t j = 0; j <= std::min(t, s.m - 1); ++j) {
      if (!kept(j)) continue;
      links(t, j);
      T& sum = dfade[size_t(key_head() * s.m + j)];
      for (int64_t m = 0; m < j; ++m) sum += raw[size_t(m)] * link[size_t(m)];
      sum += carry * from_state;
      if (s.fade == Fade::gate && share(j) > 0) sum -= raw[size_t(j)] * link[size_t(j)] / share(j);
      if (s.fade == Fade::gate && share(j) == 0) sum -= raw[size_t(j)] * behind(t, j);
    }
  }

  T behind(int64_t t, int64_t j) const {
    T product = 1;
    for (int64_t m = j + 1; m <= std::min(t, s.m - 1); ++m)
      if (kept(m)) product *= fade_of(m);
    return product;
  }
};

static inline double epsilon(DType dtype) {
  return dtype == DType::f32 ? 0x1p-23 : dtype == DType::f16 ? 0x1p-10 : 0x1p-7;
}

static inline std::string describe(const Sizes& s) {
  char text[200];
  std::snprintf(text, sizeof text, "(H %d/%d, %d x %d, F %d, E %d, mode %d%s, fade %d%s%s%s)", int(s.heads),
                int(s.heads_kv), int(s.n), int(s.m), int(s.f), int(s.e), int(s.mode), s.causal ? ", causal" : "",
                int(s.fade), s.masked ? ", masked" : "", s.state ? ", state" : "", s.normalize ? "" : ", sums");
  return text;
}

/// Error against double at most twice that of the plain formula in float, or one rounding of the output, or `floor`
/// times the largest value, or `floor` times the size of the terms that cancel in it.
static inline void check_budget(const char* what, const Sizes& s, const Array& got, const std::vector<double>& exact,
                                const std::vector<float>& plain, double floor = 1e-6, double terms = 0) {
  double error = 0, granted = 0, largest = 0;
  bool finite = true;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double value = got.get(int64_t(i));
    finite &= std::isfinite(value) && std::isfinite(exact[i]);
    error = std::max(error, std::fabs(value - exact[i]));
    granted = std::max(granted, std::fabs(plain[i] - exact[i]));
    largest = std::max(largest, std::fabs(exact[i]));
  }
  const double budget = std::max(2 * granted, epsilon(got.view.dtype) * largest) + floor * std::max(largest, terms);
  if (finite && error <= budget) return;
  char text[120];
  std::snprintf(text, sizeof text, "%s: error %.3g above %.3g, largest %.3g ", what, finite ? error : NAN, budget,
                largest);
  check::fail(__FILE__, __LINE__, text + describe(s));
}

static inline bool same_bits(const Array& a, const Array& b) {
  bool same = true;
  for (int64_t i = 0; i < a.view.numel(); ++i) same &= float_to_bits(a.get(i)) == float_to_bits(b.get(i));
  return same;
}

}  // namespace linear_test
