/// Problems for mixture_weights with their answers: the equations of the header, evaluated in double and in float.
#pragma once
#include "arrays.h"
#include "subquad/mixture_weights.h"

namespace mixture {

using namespace subquad;
using check::Array;
using check::Layout;

struct Sizes {
  int64_t batch, heads, n, c, repetitions, d;
  bool over_queries = true, masked = false;
  Layout layout = Layout::dense;
  DType dtype = DType::f32;
};

static inline std::string describe(const Sizes& s) {
  char text[120];
  std::snprintf(text, sizeof text, "B %d, H %d, N %d, C %d, R %d, D %d%s%s", int(s.batch), int(s.heads), int(s.n),
                int(s.c), int(s.repetitions), int(s.d), s.over_queries ? ", over queries" : "",
                s.masked ? ", masked" : "");
  return text;
}

struct Problem {
  Sizes s;
  Array q, q_bar, column_lse, balance, log_alpha, dlog_alpha, dq, dq_bar, dbalance;
  std::vector<char> keep;
  std::vector<int32_t> counts;
  MixtureWeightsOptions options;
  int64_t turn = 0;  // where the sums over D and C begin

  explicit Problem(const Sizes& sizes, double size = 1)
      : s(sizes),
        q({s.batch, s.heads, s.n, s.d}, s.dtype, s.layout),
        q_bar({s.batch, s.heads, s.c, s.d}, s.dtype, s.layout),
        column_lse({s.batch, s.heads, s.c}, DType::f32, s.layout),
        balance({s.batch, s.heads, s.c * s.repetitions}, DType::f32, s.layout),
        log_alpha({s.batch, s.heads, s.n, s.c * s.repetitions}, DType::f32, s.layout),
        dlog_alpha({s.batch, s.heads, s.n, s.c * s.repetitions}, DType::f32, s.layout),
        dq({s.batch, s.heads, s.n, s.d}, s.dtype, s.layout),
        dq_bar({s.batch, s.heads, s.c, s.d}, DType::f32, s.layout),
        dbalance({s.batch, s.heads, s.c * s.repetitions}, DType::f32, s.layout) {
    std::mt19937 random(1);
    std::normal_distribution<double> normal;
    q.fill_normal(random, size), q_bar.fill_normal(random, size);
    // A third of the samples has so little of its own that the floor often holds.
    for (int64_t i = 0; i < balance.size(); ++i) balance.set(i, i % 3 ? double(random() % 1000) / 2000 : 1e-3);
    keep.assign(size_t(s.batch * s.n), 1), counts.assign(size_t(s.batch * s.c), 2);
    options.alpha_coeff = 1.5, options.over_queries = s.over_queries;
    if (s.masked) {
      for (char& k : keep) k = random() % 10 < 7;
      for (int32_t& count : counts) count = random() % 10 < 7 ? 3 : 0;
      options.query_mask = make_tensor(reinterpret_cast<const bool*>(keep.data()), {s.batch, s.n});
      options.counts = make_tensor(static_cast<const int32_t*>(counts.data()), {s.batch, s.c});
    }
    set_column_lse();
    std::vector<double> alpha = weights<double>();
    // Neither may rounding decide whether the floor holds, nor one tiny weight make up the largest error.
    for (int64_t i = 0; i < dlog_alpha.size(); ++i)
      dlog_alpha.set(i, normal(random) * std::pow(std::fabs(alpha[size_t(i)]), alpha[size_t(i)] < 1 ? 2 : 0));
    if (s.masked) fill_hidden(NAN);
  }

  bool exists(int64_t b, int64_t c) const { return counts[size_t(b * s.c + c)] > 0; }
  bool kept(int64_t b, int64_t n) const { return keep[size_t(b * s.n + n)]; }
  int64_t samples() const { return s.c * s.repetitions; }

  /// Everything that must have no effect.
  void fill_hidden(double x) {
    for (int64_t i = 0; i < q.size(); ++i)
      if (!kept(i / (s.heads * s.n * s.d), i / s.d % s.n)) q.set(i, x);
    for (int64_t i = 0; i < q_bar.size(); ++i)
      if (!exists(i / (s.heads * s.c * s.d), i / s.d % s.c)) q_bar.set(i, x);
    for (int64_t i = 0; i < column_lse.size(); ++i)
      if (!exists(i / (s.heads * s.c), i % s.c)) column_lse.set(i, x);
    for (int64_t i = 0; i < balance.size(); ++i)
      if (!exists(i / (s.heads * samples()), i % s.c)) balance.set(i, x);
    for (int64_t i = 0; i < dlog_alpha.size(); ++i)
      if (!exists(i / (s.heads * s.n * samples()), i % s.c) ||
          !kept(i / (s.heads * s.n * samples()), i / samples() % s.n))
        dlog_alpha.set(i, x);
  }

  double scale() const { return 1 / std::sqrt(double(s.d)); }

  template <class T>
  T score(int64_t head, int64_t n, int64_t c) const {
    T sum = 0;
    for (int64_t i = 0; i < s.d; ++i) {
      const int64_t d = (i + turn) % s.d;
      sum += T(q.values[size_t((head * s.n + n) * s.d + d)]) * T(q_bar.values[size_t((head * s.c + c) * s.d + d)]);
    }
    return T(scale()) * sum;
  }

  void set_column_lse() {
    for (int64_t i = 0; i < column_lse.size(); ++i) {
      double sum = 0;
      for (int64_t n = 0; n < s.n; ++n)
        if (kept(i / s.c / s.heads, n) && exists(i / s.c / s.heads, i % s.c))
          sum += std::exp(score<double>(i / s.c, n, i % s.c));
      column_lse.set(i, std::log(sum));
    }
  }

  /// t [B, H, N, C] by the equation; 0 where there is no query or landmark. A plain evaluation in T.
  template <class T>
  std::vector<T> t() const {
    std::vector<T> t(size_t(s.batch * s.heads * s.n * s.c));
    for (int64_t row = 0; row < s.batch * s.heads * s.n; ++row) {
      const int64_t head = row / s.n, b = head / s.heads;
      if (!kept(b, row % s.n)) continue;
      T largest = T(-INFINITY), sum = 0;
      for (int64_t c = 0; c < s.c; ++c)
        if (exists(b, c)) largest = std::max(largest, score<T>(head, row % s.n, c));
      for (int64_t c = 0; c < s.c; ++c) {
        if (!exists(b, c)) continue;
        const T shift = s.over_queries ? T(column_lse.values[size_t(head * s.c + c)]) : largest;
        sum += t[size_t(row * s.c + c)] = std::exp(score<T>(head, row % s.n, c) - shift);
      }
      for (int64_t c = 0; c < s.c && !s.over_queries; ++c)
        if (exists(b, c)) t[size_t(row * s.c + c)] /= sum;
    }
    return t;
  }

  template <class T>
  T mean(int64_t b, const T* row) const {
    T sum = 0, count = 0;
    for (int64_t c = 0; c < s.c; ++c)
      if (exists(b, c)) sum += row[c], count += 1;
    return sum / count;
  }

  /// alpha [B, H, N, J] before the floor; -1 for hidden ones.
  template <class T>
  std::vector<T> weights() const {
    const std::vector<T> t = this->t<T>();
    std::vector<T> alpha(size_t(s.batch * s.heads * s.n * samples()), T(-1));
    for (size_t i = 0; i < alpha.size(); ++i) {
      const int64_t j = int64_t(i) % samples(), row = int64_t(i) / samples(), head = row / s.n, c = j % s.c;
      if (!kept(head / s.heads, row % s.n) || !exists(head / s.heads, c)) continue;
      const T centred = t[size_t(row * s.c + c)] - mean(head / s.heads, &t[size_t(row * s.c)]);
      alpha[i] = T(balance.values[size_t(head * samples() + j)]) + T(options.alpha_coeff) * centred;
    }
    return alpha;
  }

  void forward(int threads = 2) {
    const Queue queue = Queue::cpu(threads);
    const ConstTensor lse = s.over_queries ? column_lse.view : ConstTensor();
    const int64_t bytes =
        mixture_weights_workspace_bytes(queue, q.view, q_bar.view, lse, balance.view, options, log_alpha.view);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    mixture_weights(queue, q.view, q_bar.view, lse, balance.view, options, log_alpha.view, {workspace.data(), bytes});
  }

  void backward(int threads = 2) {
    const Queue queue = Queue::cpu(threads);
    const ConstTensor lse = s.over_queries ? column_lse.view : ConstTensor();
    const int64_t bytes = mixture_weights_bwd_workspace_bytes(
        queue, dlog_alpha.view, q.view, q_bar.view, lse, balance.view, options, dq.view, dq_bar.view, dbalance.view);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    mixture_weights_bwd(queue, dlog_alpha.view, q.view, q_bar.view, lse, balance.view, options, dq.view, dq_bar.view,
                        dbalance.view, {workspace.data(), bytes});
  }
};

/// The gradient, evaluated plainly in T.
template <class T>
struct Gradient {
  std::vector<T> dq, dq_bar, dbalance;

  explicit Gradient(const Problem& p) : dq(p.q.values.size()), dq_bar(p.q_bar.values.size()) {
    const Sizes& s = p.s;
    const int64_t samples = p.samples(), rows = s.batch * s.heads * s.n;
    dbalance.resize(p.balance.values.size());
    const std::vector<T> t = p.t<T>(), alpha = p.weights<T>();
    std::vector<T> dt(t.size()), sums(size_t(s.batch * s.heads * s.c));
    for (int64_t row = 0; row < rows; ++row) {
      T* own = &dt[size_t(row * s.c)];
      for (int64_t j = 0; j < samples; ++j) {
        const T a = alpha[size_t(row * samples + j)];
        if (a <= T(1e-8)) continue;
        const T da = T(p.dlog_alpha.values[size_t(row * samples + j)]) / a;
        own[j % s.c] += da, dbalance[size_t(row / s.n * samples + j)] += da;
      }
      const T mean = p.mean(row / s.n / s.heads, own);
      for (int64_t c = 0; c < s.c; ++c) own[c] = T(p.options.alpha_coeff) * (own[c] - mean);
      for (int64_t c = 0; c < s.c; ++c)
        if (t[size_t(row * s.c + c)] != 0) sums[size_t(row / s.n * s.c + c)] += own[c] * t[size_t(row * s.c + c)];
    }
    for (int64_t row = 0; row < rows; ++row) add_row(p, row, &t[size_t(row * s.c)], &dt[size_t(row * s.c)], sums);
  }

 private:
  void add_row(const Problem& p, int64_t row, const T* t, const T* dt, const std::vector<T>& sums) {
    const int64_t width = p.s.c, dim = p.s.d, head = row / p.s.n;
    if (!p.kept(head / p.s.heads, row % p.s.n)) return;
    T along = 0;
    for (int64_t c = 0; c < width; ++c)
      if (t[c] != 0) along += t[c] * dt[c];
    for (int64_t i = 0; i < width; ++i) {
      const int64_t c = (i + p.turn) % width;
      if (!p.exists(head / p.s.heads, c)) continue;
      const T shift = p.s.over_queries ? sums[size_t(head * width + c)] : along;
      const T dscore = T(p.scale()) * t[c] * (dt[c] - shift);
      for (int64_t d = 0; d < dim; ++d) {
        dq[size_t(row * dim + d)] += dscore * T(p.q_bar.values[size_t((head * width + c) * dim + d)]);
        dq_bar[size_t((head * width + c) * dim + d)] += dscore * T(p.q.values[size_t(row * dim + d)]);
      }
    }
  }
};

}  // namespace mixture
