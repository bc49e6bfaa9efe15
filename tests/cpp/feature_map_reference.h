/// Problems for feature_map with their answers: the equations of the header, evaluated in double and in float.
#pragma once
#include <algorithm>
#include <random>

#include "check.h"
#include "subquad/feature_map.h"

namespace features {

using namespace subquad;

constexpr Features kAll[] = {Features::positive, Features::trig, Features::hyperbolic, Features::relu, Features::elu};

static inline bool exponential(Features f) { return f == Features::positive || f == Features::hyperbolic; }

/// An array of up to four axes with values that its dtype can hold; with a `gap`, rows lie apart and heads run faster
/// than tokens do.
struct Array {
  std::vector<double> values;
  std::vector<unsigned char> bytes;
  Tensor view;

  Array(std::initializer_list<int64_t> shape, DType dtype = DType::f32, int64_t gap = 0) {
    for (int64_t extent : shape) view.shape[view.rank++] = extent;
    view.dtype = dtype;
    int64_t order[4] = {0, 1, 2, 3}, step = 1;
    if (gap && view.rank == 4) std::swap(order[1], order[2]);
    for (int i = view.rank - 1; i >= 0; --i) {
      const int64_t axis = order[i];
      view.stride[axis] = step;
      step *= view.shape[axis] + (axis == view.rank - 1 ? gap : 0);
    }
    bytes.assign(size_t(step * dtype_bytes(dtype)) + 64, 0xff);
    view.data = bytes.data();
    values.resize(size_t(view.numel()));
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  int64_t at(int64_t i) const {
    int64_t offset = 0;
    for (int axis = view.rank - 1; axis >= 0; --axis)
      offset += i % view.shape[axis] * view.stride[axis], i /= view.shape[axis];
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
  void fill_normal(unsigned seed, double size) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal(0, size);
    for (int64_t i = 0; i < view.numel(); ++i) set(i, normal(random));
  }
};

struct Sizes {
  Features features;
  bool log = false;
  int64_t batch = 1, heads = 1, blocks = 1, n = 21, d = 16, f = 20;
  DType dtype = DType::f32;
  int64_t gap = 0;
  double size = 1, scale = 0;
  bool masked = false;

  int64_t outputs() const { return feature_dim(features, f, d); }
  double s() const { return scale == 0 ? 1 / std::sqrt(double(d)) : scale; }
};

struct Problem {
  Sizes s;
  Array x, projection, dout, dlog, out, log_factor, dx, dprojection;
  std::vector<char> keep;
  FeatureMapOptions options;

  explicit Problem(const Sizes& sizes)
      : s(sizes),
        x({s.batch, s.heads, s.n, s.d}, s.dtype, s.gap),
        projection({s.blocks, s.f, s.d}, DType::f32, s.gap),
        dout({s.batch, s.heads, s.n, s.outputs()}, s.dtype, s.gap),
        dlog({s.batch, s.heads, s.n}),
        out({s.batch, s.heads, s.n, s.outputs()}, s.dtype, s.gap),
        log_factor({s.batch, s.heads, s.n}),
        dx({s.batch, s.heads, s.n, s.d}, s.dtype, s.gap),
        dprojection({s.blocks, s.f, s.d}, DType::f32, s.gap) {
    x.fill_normal(1, s.size), projection.fill_normal(2, 1), dout.fill_normal(3, 1), dlog.fill_normal(4, 1);
    options.features = s.features, options.scale = s.scale, options.log = s.log;
    keep.assign(size_t(s.batch * s.n), 1);
    if (!s.masked) return;
    std::mt19937 random(5);
    for (char& k : keep) k = random() % 10 < 7;
    options.mask = make_tensor(reinterpret_cast<const bool*>(keep.data()), {s.batch, s.n});
    for (int64_t i = 0; i < x.view.numel(); ++i)
      if (!kept(i / s.d)) x.set(i, i % 2 ? NAN : INFINITY);
    for (int64_t i = 0; i < dout.view.numel(); ++i)
      if (!kept(i / s.outputs())) dout.set(i, NAN);
    for (int64_t i = 0; i < dlog.view.numel(); ++i)
      if (!kept(i)) dlog.set(i, NAN);
  }

  /// Row b, h, n of an array [B, H, N, ..].
  bool kept(int64_t row) const { return keep[size_t(row / (s.heads * s.n) * s.n + row % s.n)]; }

  bool elu() const { return s.features == Features::elu; }
  bool trig() const { return s.features == Features::trig; }

  void forward(int threads = 2) {
    const Queue queue = Queue::cpu(threads);
    const ConstTensor w = elu() ? ConstTensor() : projection.view;
    const Tensor log = trig() ? log_factor.view : Tensor();
    const int64_t bytes = feature_map_workspace_bytes(queue, x.view, w, options, out.view, log);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    feature_map(queue, x.view, w, options, out.view, log, {workspace.data(), bytes});
  }

  void backward(int threads = 2, bool want_x = true, bool want_projection = true) {
    const Queue queue = Queue::cpu(threads);
    const ConstTensor w = elu() ? ConstTensor() : projection.view, log = trig() ? dlog.view : Tensor();
    const Tensor to_x = want_x ? dx.view : Tensor(), to_w = want_projection && !elu() ? dprojection.view : Tensor();
    const int64_t bytes = feature_map_bwd_workspace_bytes(queue, dout.view, log, x.view, w, options, to_x, to_w);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    feature_map_bwd(queue, dout.view, log, x.view, w, options, to_x, to_w, {workspace.data(), bytes});
  }
};

/// The equations of the header, evaluated in T: double is the truth, float the plain formula; `turn` is where the sums
/// over the elements of a row begin.
template <class T>
struct Reference {
  std::vector<T> out, log_factor, dx, dprojection;

  explicit Reference(const Problem& p, int64_t turn = 0) : turn_(turn) {
    const Sizes& s = p.s;
    out.resize(p.out.values.size()), log_factor.resize(p.log_factor.values.size());
    dx.resize(p.x.values.size()), dprojection.resize(p.projection.values.size());
    for (int64_t row = 0; row < s.batch * s.heads * s.n; ++row) {
      if (!p.kept(row))
        leave_out(p, row);
      else if (p.elu())
        elements(p, row);
      else
        features(p, row, row / s.n % s.heads / (s.heads / s.blocks));
    }
  }

 private:
  int64_t turn_;

  void leave_out(const Problem& p, int64_t row) {
    const int64_t count = p.s.outputs();
    for (int64_t i = row * count; p.s.log && i < (row + 1) * count; ++i) out[size_t(i)] = -T(INFINITY);
    log_factor[size_t(row)] = -T(INFINITY);
  }

  void elements(const Problem& p, int64_t row) {
    for (int64_t i = row * p.s.d; i < (row + 1) * p.s.d; ++i) {
      const T x = T(p.x.values[size_t(i)]), g = T(p.dout.values[size_t(i)]);
      out[size_t(i)] = x > 0 ? x + 1 : std::exp(x);
      dx[size_t(i)] = x > 0 ? g : g * std::exp(x);
    }
  }

  void features(const Problem& p, int64_t row, int64_t block) {
    const Sizes& s = p.s;
    const T root = T(std::sqrt(s.s())), scale = T(s.s()), count = T(s.f);
    const double* x = &p.x.values[size_t(row * s.d)];
    const double *g = &p.dout.values[size_t(row * s.outputs())], *g2 = g + (s.outputs() > s.f ? s.f : 0);
    T *y = &out[size_t(row * s.outputs())], *y2 = y + s.f;
    T norm = 0, dnorm = p.trig() ? T(p.dlog.values[size_t(row)]) : T(0);
    for (int64_t d = 0; d < s.d; ++d) norm += T(x[(d + turn_) % s.d]) * T(x[(d + turn_) % s.d]);
    norm *= scale / 2;
    log_factor[size_t(row)] = norm;
    for (int64_t i = 0; i < s.f; ++i) {
      const double* w = &p.projection.values[size_t((block * s.f + i) * s.d)];
      T a = 0, da = 0;
      for (int64_t d = 0; d < s.d; ++d) a += T(w[(d + turn_) % s.d]) * T(x[(d + turn_) % s.d]);
      a *= root;
      if (exponential(s.features)) {
        const bool two = s.features == Features::hyperbolic;
        const T factor = 1 / std::sqrt(two ? 2 * count : count);
        const T plus = s.log ? 1 : std::exp(a - norm) * factor, minus = s.log ? 1 : std::exp(-a - norm) * factor;
        y[i] = s.log ? a - norm : plus;
        if (two) y2[i] = s.log ? -a - norm : minus;
        da = T(g[i]) * plus - (two ? T(g2[i]) * minus : T(0));
        dnorm -= T(g[i]) * plus + (two ? T(g2[i]) * minus : T(0));
      } else if (s.features == Features::trig) {
        y[i] = std::sin(a) / std::sqrt(count), y2[i] = std::cos(a) / std::sqrt(count);
        da = T(g[i]) * y2[i] - T(g2[i]) * y[i];
      } else {
        y[i] = std::max(T(0), a) + T(1e-3) / std::sqrt(count);
        da = a > 0 ? T(g[i]) : T(0);
      }
      for (int64_t d = 0; d < s.d; ++d) {
        dx[size_t(row * s.d + d)] += root * da * T(w[d]);
        dprojection[size_t((block * s.f + i) * s.d + d)] += root * da * T(x[d]);
      }
    }
    for (int64_t d = 0; d < s.d; ++d) dx[size_t(row * s.d + d)] += dnorm * scale * T(x[d]);
  }
};

template <class T>
using Part = std::vector<T> Reference<T>::*;

/// The truth, and the plain formula with its sums in four orders: where one large feature decides the largest error, a
/// single order is a poor sample of it.
struct Answers {
  Reference<double> exact;
  std::vector<Reference<float>> plain;

  explicit Answers(const Problem& p) : exact(p) {
    for (int64_t turn = 0; turn < 4; ++turn) plain.emplace_back(p, turn * (p.s.d / 4) + turn);
  }
};

/// Error against double at most twice that of the plain formula in float, plus one rounding of the output.
static inline void check_budget(const char* what, const Sizes& s, const Array& got, const Answers& answers,
                                Part<double> exact_part, Part<float> plain_part) {
  const std::vector<double>& exact = answers.exact.*exact_part;
  double error = 0, granted = 0, largest = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    if (std::isinf(exact[i]) && got.get(int64_t(i)) == exact[i]) continue;
    const double difference = std::fabs(got.get(int64_t(i)) - exact[i]);
    error = difference <= error ? error : difference;  // NaN stays
    for (const Reference<float>& plain : answers.plain)
      granted = std::max(granted, std::fabs((plain.*plain_part)[i] - exact[i]));
    largest = std::max(largest, std::fabs(exact[i]));
  }
  const DType dtype = got.view.dtype;
  const double rounding = dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
  if (error <= 2 * granted + rounding * largest) return;
  char text[200];
  std::snprintf(text, sizeof text, "%s: error %.3g, plain %.3g, largest %.3g (map %d%s, N %d, D %d, F %d)", what, error,
                granted, largest, int(s.features), s.log ? " log" : "", int(s.n), int(s.d), int(s.f));
  check::fail(__FILE__, __LINE__, text);
}

static inline void check_answers(const Problem& p, const Answers& answers) {
  using Exact = Reference<double>;
  using Plain = Reference<float>;
  check_budget("out", p.s, p.out, answers, &Exact::out, &Plain::out);
  check_budget("dx", p.s, p.dx, answers, &Exact::dx, &Plain::dx);
  if (p.trig()) check_budget("log_factor", p.s, p.log_factor, answers, &Exact::log_factor, &Plain::log_factor);
  if (!p.elu()) check_budget("dprojection", p.s, p.dprojection, answers, &Exact::dprojection, &Plain::dprojection);
}

/// Calls f(sizes) for every map, as features and as logarithms.
template <class F>
static void for_each_map(F&& f) {
  for (Features features : kAll)
    for (bool log : {false, true})
      if (!log || exponential(features)) f(Sizes{features, log});
}

static inline void expect_same(const Array& a, const Array& b, const char* what) {
  if (a.bytes != b.bytes) check::fail(__FILE__, __LINE__, what);
}

}  // namespace features
