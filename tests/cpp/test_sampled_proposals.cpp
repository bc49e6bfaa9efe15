#include "arrays.h"
#include "subquad/error.h"
#include "subquad/sampled_proposals.h"

using namespace subquad;
using check::Array;
using check::Layout;

namespace {

constexpr double kScale = 0.3;

struct Sizes {
  int64_t batch, heads, heads_kv, samples, n, m, dim;
  bool shared_noise = false, scored = true;
  Layout layout = Layout::dense;
  DType dtype_q = DType::f32, dtype_k = DType::f32;
};

struct Problem {
  Sizes s;
  Array q, k, noise, w, dw, score, dq, dk;
  std::vector<int32_t> index;
  ConstTensor indices;

  explicit Problem(const Sizes& sizes, int64_t index_gap = 0)
      : s(sizes),
        q({s.batch, s.heads, s.n, s.dim}, s.dtype_q, s.layout),
        k({s.batch, s.heads_kv, s.m, s.dim}, s.dtype_k, s.layout),
        noise({s.shared_noise ? 1 : s.batch, s.heads, s.samples, s.n, s.dim}, DType::f32, s.layout),
        w({s.batch, s.heads, s.samples, s.n, s.dim}, DType::f32, s.layout),
        dw({s.batch, s.heads, s.samples, s.n, s.dim}, DType::f32, s.layout),
        score({s.batch, s.heads, s.samples, s.n}, DType::f32, s.layout),
        dq({s.batch, s.heads, s.n, s.dim}, s.dtype_q, s.layout),
        dk({s.batch, s.heads_kv, s.m, s.dim}, s.dtype_k, s.layout) {
    std::mt19937 random(11);
    for (Array* a : {&q, &k, &noise, &dw, &score}) a->fill_normal(random);
    const int64_t count = s.batch * s.heads * s.samples, row = s.n + index_gap;
    index.assign(size_t(count * row) + 1, 1 << 30);
    indices = make_tensor(index.data(), {s.batch, s.heads, s.samples, s.n});
    for (int i = 0; i < 3; ++i) indices.stride[i] = indices.stride[i] / std::max<int64_t>(s.n, 1) * row;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t n = 0; n < s.n; ++n) {
        const int64_t key = s.m == 0 ? -1 : int64_t(random() % uint32_t(s.m + 2)) - 2;
        index[size_t(i * row + n)] = int32_t(std::max<int64_t>(key, -1));
      }
  }

  int32_t key(int64_t sample) const {  // of the flat (b, h, s, n)
    const int64_t row = s.samples * s.heads == 0 ? 0 : indices.stride[2];
    return index[size_t(sample / s.n * row + sample % s.n)];
  }

  /// What no key was drawn for must have no effect.
  void poison() {
    for (int64_t i = 0; i < score.size(); ++i) {
      if (key(i) >= 0) continue;
      score.set(i, NAN);
      for (int64_t d = 0; d < s.dim; ++d) dw.set(i * s.dim + d, NAN);
    }
  }

  /// Calls f(sample, query row, key row) for the draws in the order (b, h, s, n).
  template <class F>
  void for_each_draw(F&& f) const {
    for (int64_t i = 0; i < score.size(); ++i) {
      const int64_t n = i % s.n, h = i / s.n / s.samples % s.heads, b = i / s.n / s.samples / s.heads;
      if (key(i) >= 0) f(i, (b * s.heads + h) * s.n + n, (b * s.heads_kv + h / (s.heads / s.heads_kv)) * s.m + key(i));
    }
  }

  template <class T>
  std::vector<double> samples(double noise_std) const {
    std::vector<double> out(w.values.size());
    for_each_draw([&](int64_t i, int64_t row, int64_t column) {
      for (int64_t d = 0; d < s.dim; ++d) {
        const size_t at = size_t(i * s.dim + d);
        const T mean = T(q.values[size_t(row * s.dim + d)]) + T(k.values[size_t(column * s.dim + d)]);
        out[at] = double(mean + T(noise_std) * T(noise.values[at % noise.values.size()]));
      }
    });
    return out;
  }

  template <class T>
  void gradients(std::vector<double>* to_q, std::vector<double>* to_k) const {
    std::vector<T> sum_q(q.values.size()), sum_k(k.values.size());
    for_each_draw([&](int64_t i, int64_t row, int64_t column) {
      const T factor = s.scored ? T(kScale) * T(score.values[size_t(i)]) : T(0);
      for (int64_t d = 0; d < s.dim; ++d) {
        const size_t in_q = size_t(row * s.dim + d), in_k = size_t(column * s.dim + d);
        const T plain = T(dw.values[size_t(i * s.dim + d)]);
        sum_q[in_q] += plain, sum_q[in_q] += factor * T(k.values[in_k]);
        sum_k[in_k] += plain, sum_k[in_k] += factor * T(q.values[in_q]);
      }
    });
    to_q->assign(sum_q.begin(), sum_q.end()), to_k->assign(sum_k.begin(), sum_k.end());
  }

  void backward(int threads) {
    const Queue queue = Queue::cpu(threads);
    const ConstTensor c = s.scored ? ConstTensor(score.view) : ConstTensor();
    const int64_t bytes =
        sampled_proposals_bwd_workspace_bytes(queue, dw.view, c, q.view, k.view, indices, kScale, dq.view, dk.view);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    sampled_proposals_bwd(queue, dw.view, c, q.view, k.view, indices, kScale, dq.view, dk.view,
                          {workspace.data(), bytes});
  }
};

void check_problem(const Sizes& s) {
  Problem p(s, s.layout == Layout::loose ? 5 : 0);
  p.poison();
  const double noise_std = 0.7;
  const std::vector<double> exact = p.samples<double>(noise_std), plain = p.samples<float>(noise_std);
  std::vector<double> exact_q, exact_k, plain_q, plain_k;
  p.gradients<double>(&exact_q, &exact_k);
  p.gradients<float>(&plain_q, &plain_k);
  std::vector<float> first[3];
  for (const int threads : {1, 2, 3, 16}) {
    sampled_proposals(Queue::cpu(threads), p.q.view, p.k.view, p.indices, p.noise.view, noise_std, p.w.view);
    p.backward(threads);
    CHECK_BUDGET("w", p.w, exact, plain);
    CHECK_BUDGET("dq", p.dq, exact_q, plain_q);
    CHECK_BUDGET("dk", p.dk, exact_k, plain_k);
    int i = 0;
    for (const Array* result : {&p.w, &p.dq, &p.dk}) {
      if (threads == 1) first[i] = result->floats();
      CHECK(check::same_bits(first[i++], result->floats()));
    }
  }
}

}  // namespace

TEST(matches_the_equations) {
  check::for_each_isa([](const std::string&) {
    for (const Layout layout : {Layout::dense, Layout::loose})
      for (const bool scored : {false, true}) {
        for (const int64_t dim : {1, 3, 7, 8, 15, 16, 17, 33, 64})
          check_problem({2, 4, 2, 3, 13, 9, dim, scored, scored, layout});
        for (const DType dtype_q : {DType::f32, DType::f16, DType::bf16})
          for (const DType dtype_k : {DType::f32, DType::f16, DType::bf16})
            check_problem({2, 2, 1, 2, 11, 7, 20, !scored, scored, layout, dtype_q, dtype_k});
        check_problem({1, 2, 2, 1, 700, 900, 64, false, scored, layout});
        check_problem({1, 3, 1, 2, 30, 1, 512, true, scored, layout});
        check_problem({3, 1, 1, 1, 1, 50, 5, false, scored, layout});
      }
  });
}

TEST(noise_may_be_left_out) {
  check::for_each_isa([](const std::string&) {
    Problem p({1, 2, 1, 2, 9, 5, 19});
    const std::vector<double> exact = p.samples<double>(0), plain = p.samples<float>(0);
    sampled_proposals(Queue::cpu(2), p.q.view, p.k.view, p.indices, ConstTensor(), 1, p.w.view);
    CHECK_BUDGET("w", p.w, exact, plain);
  });
}

TEST(central_differences) {
  check::for_each_isa([](const std::string&) {
    Problem p({1, 2, 1, 2, 4, 3, 2});
    p.backward(1);
    // The loss whose gradient the pass is: <dw, w> plus the scores times the logarithms of the drawn weights.
    const auto loss = [&] {
      const std::vector<double> w = p.samples<double>(0.7);
      double sum = 0;
      p.for_each_draw([&](int64_t i, int64_t row, int64_t column) {
        for (int64_t d = 0; d < 2; ++d)
          sum += p.dw.values[size_t(i * 2 + d)] * w[size_t(i * 2 + d)] + kScale * p.score.values[size_t(i)] *
                                                                             p.q.values[size_t(row * 2 + d)] *
                                                                             p.k.values[size_t(column * 2 + d)];
      });
      return sum;
    };
    for (const auto& pair : {std::pair<Array*, Array*>(&p.q, &p.dq), {&p.k, &p.dk}})
      for (int64_t i = 0; i < pair.first->size(); ++i) {
        double& x = pair.first->values[size_t(i)];
        const double kept = x;
        x = kept + 1e-3;
        const double above = loss();
        x = kept - 1e-3;
        const double below = loss();
        x = kept;
        CHECK_NEAR(pair.second->get(i), (above - below) / 2e-3, 2e-6);
      }
  });
}

TEST(empty_arrays) {
  check::for_each_isa([](const std::string&) {
    for (const Sizes& s : {Sizes{0, 2, 1, 2, 3, 4, 5}, Sizes{2, 0, 0, 2, 3, 4, 5}, Sizes{2, 0, 1, 2, 3, 4, 5},
                           Sizes{2, 2, 1, 0, 3, 4, 5}, Sizes{2, 2, 1, 2, 0, 4, 5}, Sizes{2, 2, 1, 2, 3, 0, 5}}) {
      Problem p(s);
      p.backward(2);
      for (const float x : p.dq.floats()) CHECK(x == 0);
      for (const float x : p.dk.floats()) CHECK(x == 0);
      sampled_proposals(Queue::cpu(2), p.q.view, p.k.view, p.indices, p.noise.view, 1, p.w.view);
      for (const float x : p.w.floats()) CHECK(x == 0);
    }
  });
}

TEST(errors_name_what_is_wrong) {
  Problem p({2, 2, 1, 2, 3, 4, 5});
  const Queue queue = Queue::cpu(1);
  const auto forward = [&](const Tensor& q, const Tensor& k, const ConstTensor& noise, const Tensor& w) {
    sampled_proposals(queue, q, k, p.indices, noise, 1, w);
  };
  const auto backward = [&](const Tensor& dq, const Tensor& dk) {
    std::vector<char> memory(10000);
    sampled_proposals_bwd(queue, p.dw.view, p.score.view, p.q.view, p.k.view, p.indices, 1, dq, dk,
                          {memory.data(), 10000});
  };
  const Tensor q = p.q.view, k = p.k.view, w = p.w.view, noise = p.noise.view;
  float* data = reinterpret_cast<float*>(p.k.bytes.data());
  CHECK_THROWS_AS(std::invalid_argument, forward(q, make_tensor(data, {2, 1, 4, 4}), noise, w),
                  "[sampled_proposals] k: expected shape [B, Hkv, M, D], got [2, 1, 4, 4]");
  CHECK_THROWS(forward(q, make_tensor(data, {2, 3, 1, 5}), noise, w),
               "[sampled_proposals] k: expected a number of heads that divides the 2 query heads, got 3");
  CHECK_THROWS(forward(q, k, make_tensor(data, {2, 2, 1, 3, 5}), w),
               "[sampled_proposals] noise: expected shape [B, H, S, N, D] = [2, 2, 2, 3, 5], got [2, 2, 1, 3, 5]");
  CHECK_THROWS(forward(q, k, noise, p.noise.view), "[sampled_proposals] w: expected an output that shares no memory");
  CHECK_THROWS_AS(TypeMismatch, forward(q, k, noise, make_tensor(reinterpret_cast<half*>(data), {2, 2, 2, 3, 5})),
                  "[sampled_proposals] w: expected dtype float32, got float16");
  const Array wide({2, 2, 3, 513}, DType::f32), wide_k({2, 1, 4, 513}, DType::f32);
  const Array wide_w({2, 2, 2, 3, 513}, DType::f32);
  CHECK_THROWS_AS(Unsupported, forward(wide.view, wide_k.view, ConstTensor(), wide_w.view),
                  "a head dimension above 512");
  CHECK_THROWS(backward(p.k.view, p.dk.view), "[sampled_proposals_bwd] dq: expected shape [B, H, N, D] = [2, 2, 3, 5]");
  CHECK_THROWS(backward(p.dq.view, p.k.view), "[sampled_proposals_bwd] dk: expected an output that shares no memory");
  p.index[7] = 4;
  CHECK_THROWS(forward(q, k, noise, w),
               "[sampled_proposals] indices: expected values in [-1, 4), got 4 at [0, 1, 0, 1]");
  p.index[7] = -2;
  CHECK_THROWS(backward(p.dq.view, p.dk.view),
               "[sampled_proposals_bwd] indices: expected values in [-1, 4), got -2 at [0, 1, 0, 1]");
}
