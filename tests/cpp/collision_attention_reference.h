/// Problems for collision_attention with their answers: the equations of the header, evaluated in double and in float.
#pragma once
#include <algorithm>
#include <random>

#include "check.h"
#include "subquad/collision_attention.h"

namespace collision {

using namespace subquad;

constexpr double kPi = 3.14159265358979323846;

/// An array [B, H, N, D] with values that its dtype can hold; strided: a view of [B, N, H, D + 3].
struct Array {
  std::vector<double> values;
  std::vector<unsigned char> bytes;
  Tensor view;

  Array() = default;
  Array(std::initializer_list<int64_t> shape, DType dtype, bool strided = false) {
    for (int64_t extent : shape) view.shape[view.rank++] = extent;
    view.dtype = dtype;
    const int64_t gap = strided ? 3 : 0, row = view.shape[3] + gap;
    view.stride[3] = 1;
    view.stride[2] = strided ? row * view.shape[1] : row;
    view.stride[1] = strided ? row : row * view.shape[2];
    view.stride[0] = row * view.shape[1] * view.shape[2];
    bytes.assign(size_t(view.shape[0] * view.stride[0] * dtype_bytes(dtype)) + 64, 0xff);
    view.data = bytes.data();
    values.resize(size_t(view.numel()));
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  Array(Array&&) = default;

  int64_t at(int64_t i) const {
    int64_t offset = 0;
    for (int axis = 3; axis >= 0; --axis) offset += i % view.shape[axis] * view.stride[axis], i /= view.shape[axis];
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
  double* row(int64_t b, int64_t h, int64_t n) {
    return &values[size_t(((b * view.shape[1] + h) * view.shape[2] + n) * view.shape[3])];
  }
};

struct Sizes {
  int64_t batch, heads, heads_kv, n, m, d, e;
  int64_t bits = 8;
  bool causal = false, masked = false, strided = false;
  DType dtype = DType::f32, out = DType::none;  // none: like dtype
};

struct Problem {
  Sizes s;
  Array q, k, v, dout, out, dq, dk, dv;
  std::vector<char> keep_k, keep_q;
  CollisionAttentionOptions options;

  explicit Problem(const Sizes& sizes, unsigned seed = 1)
      : s(sizes),
        q({s.batch, s.heads, s.n, s.d}, s.dtype, s.strided),
        k({s.batch, s.heads_kv, s.m, s.d}, s.dtype, s.strided),
        v({s.batch, s.heads_kv, s.m, s.e}, s.dtype, s.strided),
        dout({s.batch, s.heads, s.n, s.e}, DType::f32, s.strided),
        out({s.batch, s.heads, s.n, s.e}, s.out == DType::none ? s.dtype : s.out, s.strided),
        dq({s.batch, s.heads, s.n, s.d}, s.dtype, s.strided),
        dk({s.batch, s.heads_kv, s.m, s.d}, s.dtype, s.strided),
        dv({s.batch, s.heads_kv, s.m, s.e}, s.dtype, s.strided) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (Array* a : {&q, &k, &v, &dout})
      for (int64_t i = 0; i < a->view.numel(); ++i) a->set(i, normal(random));
    keep_k.assign(size_t(s.batch * s.m), 1), keep_q.assign(size_t(s.batch * s.n), 1);
    options.hash_bits = s.bits, options.is_causal = s.causal;
    if (!s.masked) return;
    for (char& keep : keep_k) keep = random() % 10 < 6;
    for (char& keep : keep_q) keep = random() % 10 < 8;
    options.key_mask = make_tensor(reinterpret_cast<const bool*>(keep_k.data()), {s.batch, s.m});
    options.query_mask = make_tensor(reinterpret_cast<const bool*>(keep_q.data()), {s.batch, s.n});
    fill_masked(NAN);
  }

  void fill_masked(double x) {
    for (int64_t i = 0; i < k.view.numel(); ++i)
      if (!keep_k[size_t(i / (s.heads_kv * s.m * s.d) * s.m + i / s.d % s.m)]) k.set(i, x);
    for (int64_t i = 0; i < v.view.numel(); ++i)
      if (!keep_k[size_t(i / (s.heads_kv * s.m * s.e) * s.m + i / s.e % s.m)]) v.set(i, x);
    for (int64_t i = 0; i < q.view.numel(); ++i)
      if (!keep_q[size_t(i / (s.heads * s.n * s.d) * s.n + i / s.d % s.n)]) q.set(i, x);
    for (int64_t i = 0; i < dout.view.numel(); ++i)
      if (!keep_q[size_t(i / (s.heads * s.n * s.e) * s.n + i / s.e % s.n)]) dout.set(i, x);
  }

  bool sees(int64_t b, int64_t i, int64_t j) const {
    return keep_q[size_t(b * s.n + i)] && keep_k[size_t(b * s.m + j)] && (!s.causal || j <= i + s.m - s.n);
  }

  void forward(int threads = 2) {
    const Queue queue = Queue::cpu(threads);
    const int64_t bytes = collision_attention_workspace_bytes(queue, q.view, k.view, v.view, options, out.view);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    collision_attention(queue, q.view, k.view, v.view, options, out.view, {workspace.data(), bytes});
  }

  void backward(GradientRule rule, int threads = 2) {
    const Queue queue = Queue::cpu(threads);
    const int64_t bytes = collision_attention_bwd_workspace_bytes(queue, dout.view, q.view, k.view, v.view, options,
                                                                  rule, dq.view, dk.view, dv.view);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    collision_attention_bwd(queue, dout.view, q.view, k.view, v.view, options, rule, dq.view, dk.view, dv.view,
                            {workspace.data(), bytes});
  }
};

/// The equations of the header, evaluated in T: double is the truth, float the plain formula.
template <class T>
struct Reference {
  std::vector<T> out, dq, dk, dv;

  Reference(Problem& p, GradientRule rule, bool backward) {
    const Sizes& s = p.s;
    out.resize(p.out.values.size()), dq.resize(p.q.values.size());
    dk.resize(p.k.values.size()), dv.resize(p.v.values.size());
    const std::vector<T> qhat = unit(p.q), khat = unit(p.k);
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t h = 0; h < s.heads; ++h)
        for (int64_t i = 0; i < s.n; ++i)
          for (int64_t j = 0; j < s.m; ++j)
            if (p.sees(b, i, j)) add_pair(p, rule, backward, qhat, khat, b, h, i, j);
    if (!backward) return;
    project(p.q, qhat, dq);
    project(p.k, khat, dk);
  }

 private:
  static T norm(const double* row, int64_t d) {
    double largest = 0;
    for (int64_t c = 0; c < d; ++c) largest = std::max(largest, std::fabs(row[c]));
    if (largest == 0) return 0;
    T sum = 0;
    for (int64_t c = 0; c < d; ++c) sum += T(row[c] / largest) * T(row[c] / largest);
    return T(std::sqrt(sum) * largest);
  }

  static std::vector<T> unit(const Array& x) {
    const int64_t d = x.view.shape[3];
    std::vector<T> y(x.values.size());
    for (size_t i = 0; i < y.size(); ++i) {
      const T length = norm(&x.values[i / size_t(d) * size_t(d)], d);
      y[i] = length == 0 ? T(0) : T(x.values[i]) / length;
    }
    return y;
  }

  void add_pair(Problem& p, GradientRule rule, bool backward, const std::vector<T>& qhat, const std::vector<T>& khat,
                int64_t b, int64_t h, int64_t i, int64_t j) {
    const Sizes& s = p.s;
    const int64_t g = h / (s.heads / s.heads_kv);
    const int64_t row = (b * s.heads + h) * s.n + i, column = (b * s.heads_kv + g) * s.m + j;
    const T *a = &qhat[size_t(row * s.d)], *c = &khat[size_t(column * s.d)];
    const double *v = &p.v.values[size_t(column * s.e)], *g_out = &p.dout.values[size_t(row * s.e)];
    T x = 0, w = 0;
    for (int64_t t = 0; t < s.d; ++t) x += a[t] * c[t];
    x = std::min(T(1), std::max(T(-1), x));
    const T u = 1 - std::acos(x) / T(kPi), weight = T(std::pow(u, T(s.bits)));
    for (int64_t t = 0; t < s.e; ++t) out[size_t(row * s.e + t)] += weight * T(v[t]);
    if (!backward) return;
    for (int64_t t = 0; t < s.e; ++t) dv[size_t(column * s.e + t)] += weight * T(g_out[t]), w += T(g_out[t]) * T(v[t]);
    const T square = (1 - x) * (1 + x);
    T slope = weight * T(s.bits) / 2;
    if (rule == GradientRule::exact)
      slope = square < T(1e-8) ? T(0) : T(s.bits) / T(kPi) * T(std::pow(u, T(s.bits - 1))) / std::sqrt(square);
    for (int64_t t = 0; t < s.d; ++t) dq[size_t(row * s.d + t)] += w * slope * c[t];
    for (int64_t t = 0; t < s.d; ++t) dk[size_t(column * s.d + t)] += w * slope * a[t];
  }

  static void project(const Array& x, const std::vector<T>& unit, std::vector<T>& gradient) {
    const int64_t d = x.view.shape[3];
    for (size_t i = 0; i < unit.size(); i += size_t(d)) {
      const T length = norm(&x.values[i], d);
      T along = 0;
      for (int64_t t = 0; t < d; ++t) along += unit[i + size_t(t)] * gradient[i + size_t(t)];
      for (int64_t t = 0; t < d; ++t) {
        T& y = gradient[i + size_t(t)];
        y = length == 0 ? T(0) : (y - along * unit[i + size_t(t)]) / length;
      }
    }
  }
};

static inline double epsilon(DType dtype) {
  return dtype == DType::f32 ? 0x1p-23 : dtype == DType::f16 ? 0x1p-10 : 0x1p-7;
}

/// Error against double at most twice that of the plain formula in float, or one rounding of the output, or `floor`
/// times the largest value.
static inline void check_budget(const char* what, const Sizes& s, const Array& got, const std::vector<double>& exact,
                                const std::vector<float>& plain, double floor = 1e-6) {
  double error = 0, granted = 0, largest = 0;
  bool finite = true;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double value = got.get(int64_t(i));
    finite &= std::isfinite(value);
    error = std::max(error, std::fabs(value - exact[i]));
    granted = std::max(granted, std::fabs(plain[i] - exact[i]));
    largest = std::max(largest, std::fabs(exact[i]));
  }
  const double budget = std::max(2 * granted, epsilon(got.view.dtype) * largest) + floor * largest;
  if (finite && error <= budget) return;
  char text[200];
  std::snprintf(text, sizeof text, "%s: error %.3g above %.3g (H %d/%d, %d x %d, D %d, E %d, tau %d%s%s)", what,
                finite ? error : NAN, budget, int(s.heads), int(s.heads_kv), int(s.n), int(s.m), int(s.d), int(s.e),
                int(s.bits), s.causal ? ", causal" : "", s.masked ? ", masked" : "");
  check::fail(__FILE__, __LINE__, text);
}

}  // namespace collision
