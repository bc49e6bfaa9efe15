/// Problems for sea_estimate with their answers: the equations of the header, one after the other, in double and in
/// float.
#pragma once
#include <memory>

#include "arrays.h"
#include "subquad/sea_estimate.h"

namespace sea_test {

using namespace check;

struct Sizes {
  int64_t batch = 1, heads = 1, seq = 1, dim = 8, features = 5, columns = 8;
  bool causal = true, masked = false;
  DType dtype = DType::f32;
  Layout layout = Layout::dense;
  int64_t positions = 0;  // 0: as many as tokens
  double size = 1;        // of q, k and v
  int64_t splits() const { return causal ? 2 : 4; }
  int64_t width() const { return columns / (causal ? 4 : 2); }
  int64_t channels() const { return splits() * heads; }
};

struct WeightArrays {
  std::vector<std::unique_ptr<Array>> arrays;
  SeaWeights weights;

  WeightArrays() = default;
  WeightArrays(const Sizes& s, unsigned seed) {
    std::mt19937 random(seed);
    const auto make = [&](ConstTensor& to, std::initializer_list<int64_t> shape, double scale, double mean = 0) {
      arrays.push_back(std::make_unique<Array>(shape, DType::f32));
      arrays.back()->fill_normal(random, scale);
      for (int64_t i = 0; mean != 0 && i < arrays.back()->size(); ++i)
        arrays.back()->set(i, arrays.back()->values[size_t(i)] + mean);
      to = arrays.back()->view;
    };
    const int64_t d = s.dim, w = s.width(), c = s.channels(), h = s.heads, k = s.columns;
    const double of_input = 1 / std::sqrt(3.0 * double(d)), of_width = 1 / std::sqrt(2.0 * double(d));
    const double of_taps = 1 / std::sqrt(9.0 * double(c) + 1);
    make(weights.projection, {s.features, d}, 1);
    make(weights.encoder_weight, {2 * d, 3 * d}, of_input), make(weights.encoder_bias, {2 * d}, 0.3);
    make(weights.encoder_norm_weight, {2 * d}, 0.2, 1), make(weights.encoder_norm_bias, {2 * d}, 0.2);
    make(weights.scaler_weight, {2, 2 * d}, 2 * of_width), make(weights.scaler_bias, {2}, 0.5);
    make(weights.row_weight, {s.splits() * w, 2 * d}, of_width), make(weights.row_bias, {s.splits() * w}, 0.3);
    make(weights.conv1_weight, {c, c, 3, 3}, 1.5 * of_taps), make(weights.conv1_bias, {c}, 0.2);
    make(weights.conv2_weight, {c, c, 3, 3}, 1.5 * of_taps), make(weights.conv2_bias, {c}, 0.2);
    make(weights.out_bias, {h}, 0.2);
    if (s.causal) {
      make(weights.position, {s.positions ? s.positions : s.seq, d}, 1);
      make(weights.row_norm_weight, {w}, 0.2, 1), make(weights.row_norm_bias, {w}, 0.2);
      make(weights.out_weight, {h, c}, 1 / std::sqrt(double(c) + 1));
      make(weights.norm_weight, {k}, 0.2, 1), make(weights.norm_bias, {k}, 0.2);
    } else {
      make(weights.out_weight, {h, c, 3, 3}, 2 * of_taps);
    }
  }
};

/// All arrays of one call.
struct Problem {
  Sizes s;
  WeightArrays own;
  SeaWeights weights;
  Array q, k, v, probs, row_scale, mix;
  std::vector<unsigned char> keep;
  Array state_s, state_z, rows1, rows2, new_s, new_z, new_rows1, new_rows2;
  std::vector<int32_t> count, new_count;
  SeaEstimateOptions options;
  SeaState state, new_state;

  explicit Problem(const Sizes& sizes, unsigned seed = 1)
      : s(sizes),
        own(sizes, seed),
        weights(own.weights),
        q({s.batch, s.heads, s.seq, s.dim}, s.dtype, s.layout),
        k({s.batch, s.heads, s.seq, s.dim}, s.dtype, s.layout),
        v({s.batch, s.heads, s.seq, s.dim}, s.dtype, s.layout),
        probs({s.batch, s.heads, s.seq, s.columns}, DType::f32, s.layout),
        row_scale({s.batch, s.heads, s.seq}, DType::f32),
        mix({s.batch, s.heads, s.seq}, DType::f32),
        keep(size_t(s.batch * s.seq), 1),
        state_s({s.batch, s.heads, s.features, 2 * s.dim}, DType::f32, s.layout),
        state_z({s.batch, s.heads, s.features}, DType::f32, s.layout),
        rows1({s.batch, s.channels(), 4, s.width()}, DType::f32, s.layout),
        rows2({s.batch, s.channels(), 4, s.width()}, DType::f32, s.layout),
        new_s({s.batch, s.heads, s.features, 2 * s.dim}, DType::f32, s.layout),
        new_z({s.batch, s.heads, s.features}, DType::f32, s.layout),
        new_rows1({s.batch, s.channels(), 4, s.width()}, DType::f32, s.layout),
        new_rows2({s.batch, s.channels(), 4, s.width()}, DType::f32, s.layout),
        count(size_t(s.batch)),
        new_count(size_t(s.batch), -1) {
    std::mt19937 random(seed + 1);
    for (Array* x : {&q, &k, &v}) x->fill_normal(random, s.size);
    options.is_causal = s.causal;
    if (s.masked) set_mask(random);
  }

  /// About a third of the tokens, NaN in all arrays; of item 1 the first and the last few.
  void set_mask(std::mt19937& random) {
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t n = 0; n < s.seq; ++n)
        mask_token(b, n, b == 1 ? n >= s.seq / 5 && n < s.seq - s.seq / 7 : random() % 3 != 0);
    use_mask();
  }
  void use_mask() { options.key_mask = make_tensor(reinterpret_cast<const bool*>(keep.data()), {s.batch, s.seq}); }
  void mask_token(int64_t b, int64_t n, bool kept, double value = NAN) {
    keep[size_t(b * s.seq + n)] = kept;
    for (int64_t h = 0; !kept && h < s.heads; ++h)
      for (int64_t d = 0; d < s.dim; ++d)
        for (Array* x : {&q, &k, &v}) x->set(((b * s.heads + h) * s.seq + n) * s.dim + d, value);
  }

  void use_state() {
    state.s = state_s.view, state.z = state_z.view, state.rows1 = rows1.view, state.rows2 = rows2.view;
    state.count = make_tensor(count.data(), {s.batch});
  }
  void use_new_state() {
    new_state.s = new_s.view, new_state.z = new_z.view, new_state.rows1 = new_rows1.view;
    new_state.rows2 = new_rows2.view, new_state.count = make_tensor(new_count.data(), {s.batch});
  }

  void run(int threads = 2) {
    const Queue queue = Queue::cpu(threads);
    std::vector<char> space(size_t(sea_estimate_workspace_bytes(queue, q.view, k.view, v.view, weights, options, state,
                                                                probs.view, row_scale.view, mix.view, new_state)));
    std::memset(space.data(), 0xff, space.size());
    for (Array* x : {&probs, &row_scale, &mix})
      for (int64_t i = 0; i < x->size(); ++i) x->set(i, NAN);
    sea_estimate(queue, q.view, k.view, v.view, weights, options, state, probs.view, row_scale.view, mix.view,
                 new_state, {space.data(), int64_t(space.size())});
  }
};

template <class Real>
Real sigmoid(Real x) {
  return 1 / (1 + std::exp(-x));
}

/// One item with its valid tokens alone, in `Real`. Arrays are row-major: x[(h T + t) n + i].
template <class Real>
struct Item {
  const Problem& p;
  const Sizes& s;
  const bool backwards;  // the order of the sums
  std::vector<int64_t> tokens;
  int64_t T;
  std::vector<Real> q, k, v, rows, probs, row_scale, mix;

  static std::vector<Real> all(const ConstTensor& t) {
    const float* data = static_cast<const float*>(t.data);
    return std::vector<Real>(data, data + t.numel());
  }

  Item(const Problem& problem, int64_t b, bool is_backwards = false) : p(problem), s(p.s), backwards(is_backwards) {
    for (int64_t n = 0; n < s.seq; ++n)
      if (p.keep[size_t(b * s.seq + n)]) tokens.push_back(n);
    T = int64_t(tokens.size());
    for (auto [from, to] : {std::pair{&p.q, &q}, {&p.k, &k}, {&p.v, &v}})
      for (int64_t h = 0; h < s.heads; ++h)
        for (int64_t t : tokens)
          for (int64_t d = 0; d < s.dim; ++d)
            to->push_back(Real(from->values[size_t(((b * s.heads + h) * s.seq + t) * s.dim + d)]));
    encode();
    s.causal ? decode_causal() : decode_bidirectional();
  }

  /// sum of f(i), i < n
  template <class F>
  Real sum_of(int64_t n, F&& f) const {
    Real sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += f(backwards ? n - 1 - i : i);
    return sum;
  }

  /// u of one row, or the features themselves if causal.
  std::vector<Real> project(const Real* x) const {
    const std::vector<Real> w = all(p.weights.projection);
    const Real scale = Real(std::pow(double(s.dim), -0.25));
    std::vector<Real> u;
    for (int64_t i = 0; i < s.features; ++i) {
      const Real sum = sum_of(s.dim, [&](int64_t d) { return w[size_t(i * s.dim + d)] * x[d]; });
      u.push_back(s.causal ? std::max(sum * scale, Real(0)) + Real(1e-3) : sum * scale);
    }
    return u;
  }

  /// |x|^2 / (2 d^1/2)
  Real norm(const Real* x) const {
    return sum_of(s.dim, [&](int64_t d) { return x[d] * x[d]; }) / Real(2 * std::sqrt(double(s.dim)));
  }

  std::vector<Real> value_row(int64_t h, int64_t t) const {
    std::vector<Real> row(size_t(2 * s.dim), 0);
    for (int64_t d = 0; d < s.dim; ++d) {
      const double at = double(t) * double(s.dim - 1) / double(std::max<int64_t>(1, T - 1));
      row[size_t(d)] = s.causal ? all(p.weights.position)[size_t(t * s.dim + d)]
                                : Real(std::max(0.0, 1 - std::fabs(at - double(d))));
      row[size_t(s.dim + d)] = v[size_t((h * T + t) * s.dim + d)];
    }
    return row;
  }

  /// C, [T, 2d] of head h.
  std::vector<Real> attend(int64_t h) const {
    std::vector<std::vector<Real>> phi_q, phi_k, values;
    Real top = -INFINITY;
    const std::vector<Real> none;
    for (int64_t t = 0; t < T; ++t) {
      phi_q.push_back(project(&q[size_t((h * T + t) * s.dim)]));
      phi_k.push_back(project(&k[size_t((h * T + t) * s.dim)]));
      values.push_back(value_row(h, t));
      for (Real x : phi_k.back()) top = std::max(top, x);
    }
    const Real unit = 1 / std::sqrt(Real(s.features));
    for (int64_t t = 0; !s.causal && t < T; ++t) {
      const Real own = *std::max_element(phi_q[size_t(t)].begin(), phi_q[size_t(t)].end());
      const Real norm_q = norm(&q[size_t((h * T + t) * s.dim)]), norm_k = norm(&k[size_t((h * T + t) * s.dim)]);
      for (Real& u : phi_q[size_t(t)]) u = unit * (std::exp(u - norm_q - own) + Real(1e-4));
      for (Real& u : phi_k[size_t(t)]) u = unit * (std::exp(u - norm_k - top) + Real(1e-4));
    }
    std::vector<Real> sums(size_t(s.features * 2 * s.dim)), z(size_t(s.features), 0), out;
    const auto add = [&](int64_t t) {
      for (int64_t i = 0; i < s.features; ++i) {
        z[size_t(i)] += phi_k[size_t(t)][size_t(i)];
        for (int64_t j = 0; j < 2 * s.dim; ++j)
          sums[size_t(i * 2 * s.dim + j)] += phi_k[size_t(t)][size_t(i)] * values[size_t(t)][size_t(j)];
      }
    };
    for (int64_t t = 0; !s.causal && t < T; ++t) add(t);
    for (int64_t t = 0; t < T; ++t) {
      if (s.causal) add(t);
      const std::vector<Real>& phi = phi_q[size_t(t)];
      const Real total = sum_of(
          s.features, [&](int64_t i) { return phi[size_t(i)] * (z[size_t(i)] + (s.causal ? Real(1e-6) : Real(0))); });
      for (int64_t j = 0; j < 2 * s.dim; ++j)
        out.push_back(sum_of(s.features, [&](int64_t i) { return phi[size_t(i)] * sums[size_t(i * 2 * s.dim + j)]; }) /
                      total);
    }
    return out;
  }

  void layer_norm(Real* x, int64_t n, const ConstTensor& weight, const ConstTensor& bias) const {
    const std::vector<Real> w = all(weight), b = all(bias);
    const Real mean = sum_of(n, [&](int64_t i) { return x[i]; }) / Real(n);
    const Real square = sum_of(n, [&](int64_t i) { return (x[i] - mean) * (x[i] - mean); }) / Real(n);
    for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - mean) / std::sqrt(square + Real(1e-5)) * w[size_t(i)] + b[size_t(i)];
  }

  std::vector<Real> linear(const std::vector<Real>& x, const ConstTensor& weight, const ConstTensor& bias) const {
    const std::vector<Real> w = all(weight);
    const int64_t n = int64_t(x.size());
    std::vector<Real> y = all(bias);
    for (size_t i = 0; i < y.size(); ++i)
      y[i] += sum_of(n, [&](int64_t j) { return w[i * x.size() + size_t(j)] * x[size_t(j)]; });
    return y;
  }

  void encode() {
    rows.resize(size_t(T * s.channels() * s.width()));
    for (int64_t h = 0; h < s.heads; ++h) {
      const std::vector<Real> c = attend(h);
      for (int64_t t = 0; t < T; ++t) {
        std::vector<Real> x(c.begin() + t * 2 * s.dim, c.begin() + (t + 1) * 2 * s.dim);
        for (int64_t d = 0; d < s.dim; ++d) x.push_back(v[size_t((h * T + t) * s.dim + d)]);
        std::vector<Real> z = linear(x, p.weights.encoder_weight, p.weights.encoder_bias);
        layer_norm(z.data(), 2 * s.dim, p.weights.encoder_norm_weight, p.weights.encoder_norm_bias);
        for (Real& y : z) y = y / 2 * (1 + std::erf(y / std::sqrt(Real(2))));
        const std::vector<Real> logits = linear(z, p.weights.scaler_weight, p.weights.scaler_bias);
        row_scale.push_back(sigmoid(logits[0])), mix.push_back(sigmoid(logits[1]));
        std::vector<Real> r = linear(z, p.weights.row_weight, p.weights.row_bias);
        for (int64_t i = 0; i < s.splits(); ++i) {
          Real* from = r.data() + i * s.width();
          if (s.causal) layer_norm(from, s.width(), p.weights.row_norm_weight, p.weights.row_norm_bias);
          std::copy(from, from + s.width(), &rows[size_t((t * s.channels() + h * s.splits() + i) * s.width())]);
        }
      }
    }
  }

  /// A 3 x 3 convolution of x [steps, in, width] to [ceil(steps / stride), out, width], with taps that lie `time` and
  /// `space` apart, from `first` steps before the present one on; zeros outside.
  std::vector<Real> convolve(const std::vector<Real>& x, int64_t steps, int64_t width, const ConstTensor& weight,
                             const ConstTensor& bias, int64_t stride, int64_t first, int64_t apart) const {
    const int64_t out = weight.shape[0], in = weight.shape[1];
    const std::vector<Real> w = all(weight), b = all(bias);
    std::vector<Real> y;
    for (int64_t t = 0; t < steps; t += stride)
      for (int64_t o = 0; o < out; ++o)
        for (int64_t j = 0; j < width; ++j) {
          y.push_back(b[size_t(o)] + sum_of(in * 9, [&](int64_t i) {
                        const int64_t c = i / 9, tap = i % 9;
                        const int64_t at = t - first + tap / 3 * apart, column = j + (tap % 3 - 1) * apart;
                        const bool inside = at >= 0 && at < steps && column >= 0 && column < width;
                        return inside ? w[size_t(o * in * 9 + i)] * x[size_t((at * in + c) * width + column)] : 0;
                      }));
        }
    return y;
  }

  static std::vector<Real> relu(std::vector<Real> x) {
    for (Real& y : x) y = std::max(y, Real(0));
    return x;
  }

  void softmax_row(std::vector<Real> x, int64_t h, int64_t t) {
    const Real top = *std::max_element(x.begin(), x.end());
    Real sum = 0;
    for (Real& y : x) sum += y = std::exp(y - top);
    probs.resize(size_t(s.heads * T * s.columns));
    for (int64_t j = 0; j < s.columns; ++j) probs[size_t((h * T + t) * s.columns + j)] = x[size_t(j)] / sum;
  }

  void decode_causal() {
    const int64_t c = s.channels(), w = s.width(), K = s.columns;
    const SeaWeights& from = p.weights;
    const std::vector<Real> first = relu(convolve(rows, T, w, from.conv1_weight, from.conv1_bias, 1, 4, 2));
    const std::vector<Real> second = relu(convolve(first, T, w, from.conv2_weight, from.conv2_bias, 1, 4, 2));
    const std::vector<Real> weight = all(from.out_weight), bias = all(from.out_bias);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t h = 0; h < s.heads; ++h) {
        std::vector<Real> wide(size_t(K + 2), bias[size_t(h)]), x;
        for (int64_t j = 0; j < K; ++j)
          for (int64_t i = 0; i < c; ++i)
            wide[size_t(j + 1)] += weight[size_t(h * c + i)] * second[size_t((t * c + i) * w + j / 4)];
        for (int64_t j = 0; j < K; ++j) {
          const int64_t lo = j * (K + 2) / K, hi = ((j + 1) * (K + 2) + K - 1) / K;
          Real sum = 0;
          for (int64_t i = lo; i < hi; ++i) sum += wide[size_t(i)];
          x.push_back(sum / Real(hi - lo));
        }
        layer_norm(x.data(), K, from.norm_weight, from.norm_bias);
        softmax_row(x, h, t);
      }
  }

  /// x at a coordinate of the bilinear rule: two neighbours and the weight of the second.
  static void neighbours(double at, int64_t n, int64_t& low, int64_t& high, double& weight) {
    at = std::max(at, 0.0);
    low = std::min(int64_t(at), n - 1), high = std::min(low + 1, n - 1);
    weight = at - double(low);
  }

  void decode_bidirectional() {
    const int64_t c = s.channels(), w = s.width(), K = s.columns, half = (T + 1) / 2;
    if (T == 0) return;
    const SeaWeights& from = p.weights;
    const std::vector<Real> first = relu(convolve(rows, T, w, from.conv1_weight, from.conv1_bias, 2, 1, 1));
    const std::vector<Real> second = relu(convolve(first, half, w, from.conv2_weight, from.conv2_bias, 1, 1, 1));
    std::vector<Real> twice;
    for (int64_t t = 0; t < 2 * half; ++t)
      twice.insert(twice.end(), &second[size_t(t / 2 * c * w)], &second[size_t(t / 2 * c * w)] + c * w);
    const std::vector<Real> y = convolve(twice, 2 * half, w, from.out_weight, from.out_bias, 1, 1, 1);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t h = 0; h < s.heads; ++h) {
        std::vector<Real> x;
        int64_t t0, t1, j0, j1;
        double a, b;
        neighbours((double(t) + 0.5) * double(2 * half) / double(T) - 0.5, 2 * half, t0, t1, a);
        for (int64_t j = 0; j < K; ++j) {
          neighbours((double(j) + 0.5) * double(w) / double(K) - 0.5, w, j0, j1, b);
          const auto at = [&](int64_t step, int64_t column) { return y[size_t((step * s.heads + h) * w + column)]; };
          x.push_back((1 - Real(a)) * ((1 - Real(b)) * at(t0, j0) + Real(b) * at(t0, j1)) +
                      Real(a) * ((1 - Real(b)) * at(t1, j0) + Real(b) * at(t1, j1)));
        }
        softmax_row(x, h, t);
      }
  }
};

/// The answers for all items, zeros for masked tokens.
struct Answers {
  std::vector<double> probs, row_scale, mix;
};

template <class Real>
Answers answers(const Problem& p, bool backwards = false) {
  const Sizes& s = p.s;
  Answers a;
  a.probs.resize(size_t(s.batch * s.heads * s.seq * s.columns));
  a.row_scale.resize(size_t(s.batch * s.heads * s.seq)), a.mix = a.row_scale;
  for (int64_t b = 0; b < s.batch; ++b) {
    const Item<Real> item(p, b, backwards);
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t t = 0; t < item.T; ++t) {
        const int64_t to = (b * s.heads + h) * s.seq + item.tokens[size_t(t)], from = h * item.T + t;
        a.row_scale[size_t(to)] = double(item.row_scale[size_t(from)]);
        a.mix[size_t(to)] = double(item.mix[size_t(from)]);
        for (int64_t j = 0; j < s.columns; ++j)
          a.probs[size_t(to * s.columns + j)] = double(item.probs[size_t(from * s.columns + j)]);
      }
  }
  return a;
}

}  // namespace sea_test
