#include "arrays.h"
#include "subquad/error.h"
#include "subquad/softmax_sample.h"

using namespace subquad;
using check::Array;
using check::Layout;

namespace {

struct Sizes {
  int64_t batch, heads, heads_kv, samples, n, m, dim;
  bool masked = false;
  Layout layout = Layout::dense;
  DType dtype_q = DType::f32, dtype_k = DType::f32;
  double size = 1;  // of the elements of q
};

struct Problem {
  Sizes s;
  Array q, k;
  std::vector<char> keep;
  SoftmaxSampleOptions options;
  std::vector<float> uniforms;  // [H S, N, T + 1]
  int64_t tiles;

  explicit Problem(const Sizes& sizes)
      : s(sizes),
        q({s.batch, s.heads, s.n, s.dim}, s.dtype_q, s.layout),
        k({s.batch, s.heads_kv, s.m, s.dim}, s.dtype_k, s.layout),
        tiles((s.m + 63) / 64) {
    std::mt19937 random(21);
    q.fill_normal(random, s.size), k.fill_normal(random);
    options.num_samples = s.samples, options.seed = Seed(77);
    uniforms.resize(size_t(s.heads * s.samples * s.n * (tiles + 1)));
    random_uniform(Queue::cpu(1), options.seed, 8, make_tensor(uniforms.data(), {s.heads * s.samples, s.n, tiles + 1}));
    keep.assign(size_t(s.batch * s.m), 1);
    if (!s.masked) return;
    // Some tiles lose all their keys, and so does the last item.
    for (int64_t i = 0; i < s.batch * s.m; ++i)
      keep[size_t(i)] = random() % 3 != 0 && i % s.m / 64 % 3 != 0 && (s.batch == 1 || i / s.m != s.batch - 1);
    options.key_mask = make_tensor(reinterpret_cast<const bool*>(keep.data()), {s.batch, s.m});
    for (int64_t i = 0; i < k.size(); ++i)
      if (!keep[size_t(i / (s.heads_kv * s.m * s.dim) * s.m + i / s.dim % s.m)]) k.set(i, i % 2 ? NAN : INFINITY);
  }

  std::vector<int32_t> sample(int threads, int64_t gap = 0) const {
    const int64_t row = s.n + gap;
    std::vector<int32_t> memory(size_t(s.batch * s.heads * s.samples * row) + 1, -99), all;
    Tensor indices = make_tensor(memory.data(), {s.batch, s.heads, s.samples, s.n});
    indices.stride[2] = row, indices.stride[1] = row * s.samples, indices.stride[0] = row * s.samples * s.heads;
    const Queue queue = Queue::cpu(threads);
    const int64_t bytes = softmax_sample_workspace_bytes(queue, q.view, k.view, options, indices);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    softmax_sample(queue, q.view, k.view, options, indices, {workspace.data(), bytes});
    for (int64_t i = 0; i < s.batch * s.heads * s.samples * row; ++i)
      if (i % row < s.n)
        all.push_back(memory[size_t(i)]);
      else
        CHECK(memory[size_t(i)] == -99);
    return all;
  }

  /// The weights of the keys of one query relative to the largest; 0 where masked.
  std::vector<double> weights(int64_t b, int64_t h, int64_t n) const {
    const int64_t g = h / (s.heads / s.heads_kv);
    const double scale = options.scale > 0 ? options.scale : 1 / std::sqrt(double(s.dim));
    std::vector<double> w(static_cast<size_t>(s.m), -INFINITY);
    double largest = -1e300;
    for (int64_t m = 0; m < s.m; ++m) {
      if (!keep[size_t(b * s.m + m)]) continue;
      double x = 0;
      for (int64_t d = 0; d < s.dim; ++d)
        x += q.values[size_t(((b * s.heads + h) * s.n + n) * s.dim + d)] *
             k.values[size_t(((b * s.heads_kv + g) * s.m + m) * s.dim + d)];
      w[size_t(m)] = scale * x, largest = std::max(largest, scale * x);
    }
    for (double& x : w) x = std::exp(x - largest);
    return w;
  }

  /// The procedure of the header; false if a uniform is too close to a boundary to tell.
  bool draw(const std::vector<double>& w, const float* u, int64_t* key) const {
    double total = 0, sum = 0, chosen_sum = 0;
    int64_t chosen = -1;
    bool clear = true;
    const auto less = [&](double share, double whole, double part) {
      clear &= std::fabs(share * whole - part) >= 1e-5 * whole || part == 0;
      return share * whole < part;
    };
    for (int64_t t = 0; t < tiles; ++t) {
      double part = 0;
      for (int64_t m = 64 * t; m < std::min(s.m, 64 * t + 64); ++m) part += w[size_t(m)];
      total += part;
      if (less(double(u[t]), total, part)) chosen = t, chosen_sum = part;
    }
    *key = -1;
    for (int64_t m = 64 * chosen; chosen >= 0 && m < std::min(s.m, 64 * chosen + 64) && *key < 0; ++m) {
      sum += w[size_t(m)];
      if (less(double(u[tiles]), chosen_sum, sum)) *key = m;
    }
    return clear;
  }
};

void check_problem(const Sizes& s) {
  Problem p(s);
  const std::vector<int32_t> indices = p.sample(1, s.layout == Layout::loose ? 3 : 0);
  int64_t unclear = 0, wrong = 0, total = int64_t(indices.size());
  for (int64_t i = 0; i < total; ++i) {
    const int64_t n = i % s.n, l = i / s.n % (s.heads * s.samples), b = i / s.n / (s.heads * s.samples);
    int64_t key = -7;
    const bool clear = p.draw(p.weights(b, l / s.samples, n), &p.uniforms[size_t((l * s.n + n) * (p.tiles + 1))], &key);
    unclear += !clear;
    wrong += clear && key != indices[size_t(i)];
  }
  CHECK(wrong == 0);
  CHECK(unclear <= 2 + total * (p.tiles + 64) / 10000);
  for (const int threads : {2, 3, 16}) CHECK(p.sample(threads) == indices);
}

}  // namespace

TEST(follows_the_procedure) {
  check::for_each_isa([](const std::string&) {
    for (const bool masked : {false, true})
      for (const Layout layout : {Layout::dense, Layout::loose}) {
        for (const int64_t m : {1, 2, 63, 64, 65, 129, 321}) check_problem({2, 2, 1, 2, 33, m, 8, masked, layout});
        for (const int64_t dim : {1, 3, 7, 15, 16, 17, 64, 130, 512})
          check_problem({1, 1, 1, 1, 9, 200, dim, masked, layout});
        for (const DType dtype_q : {DType::f32, DType::f16, DType::bf16})
          for (const DType dtype_k : {DType::f32, DType::f16, DType::bf16})
            check_problem({2, 4, 2, 1, 10, 150, 24, masked, layout, dtype_q, dtype_k, 3});
      }
    check_problem({1, 2, 1, 11, 5, 150, 16});
    check_problem({1, 1, 1, 1, 600, 70, 4});
    check_problem({1, 2, 2, 2, 40, 700, 16, false, Layout::dense, DType::f32, DType::f32, 20});
  });
}

TEST(the_scale_is_used) {
  check::for_each_isa([](const std::string&) {
    Problem p({1, 1, 1, 1, 50, 300, 9});
    const std::vector<int32_t> by_default = p.sample(1);
    p.options.scale = 1 / std::sqrt(9.0);
    CHECK(p.sample(1) == by_default);
    p.options.scale = 1000;
    const std::vector<int32_t> greedy = p.sample(1);
    for (int64_t n = 0; n < 50; ++n) {
      const std::vector<double> w = p.weights(0, 0, n);
      CHECK(w[size_t(greedy[size_t(n)])] > 1e-6);
    }
    int64_t seed = 77;
    p.options.scale = 0, p.options.seed.value = 0, p.options.seed.pointer = &seed;
    CHECK(p.sample(1) == by_default);
    seed = 78;
    CHECK(p.sample(1) != by_default);
  });
}

/// Five standard deviations, over some hundred comparisons at a fixed seed.
TEST(frequencies_are_those_of_softmax) {
  check::for_each_isa([](const std::string&) {
    const int64_t count = 40000, m = 150;
    Problem p({1, 1, 1, 2, 1, m, 6, true});
    const std::vector<double> w = p.weights(0, 0, 0);
    double total = 0, collision = 0;
    for (const double x : w) total += x;
    std::vector<int32_t> indices(size_t(2 * count));
    ConstTensor q = p.q.view;
    q.shape[2] = count, q.stride[2] = 0;
    const Tensor out = make_tensor(indices.data(), {1, 1, 2, count});
    const int64_t bytes = softmax_sample_workspace_bytes(Queue::cpu(2), q, p.k.view, p.options, out);
    std::vector<char> workspace(static_cast<size_t>(bytes));
    softmax_sample(Queue::cpu(2), q, p.k.view, p.options, out, {workspace.data(), bytes});
    std::vector<double> seen(static_cast<size_t>(m));
    for (const int32_t key : indices) seen[size_t(key)] += 1;
    for (size_t i = 0; i < size_t(m); ++i) {
      const double share = w[i] / total, draws = 2.0 * double(count);
      CHECK_NEAR(seen[i], draws * share, 5 * std::sqrt(draws * share * (1 - share)));
      collision += share * share;
    }
    double equal = 0;
    for (size_t n = 0; n < size_t(count); ++n) equal += indices[n] == indices[n + size_t(count)];
    CHECK_NEAR(equal, double(count) * collision, 5 * std::sqrt(double(count) * collision * (1 - collision)));
  });
}

TEST(an_item_alone_is_the_item_of_a_batch) {
  check::for_each_isa([](const std::string&) {
    Problem batch({3, 2, 1, 2, 20, 200, 8}), alone({1, 2, 1, 2, 20, 200, 8});
    for (int64_t i = 0; i < alone.q.size(); ++i) alone.q.set(i, batch.q.values[size_t(i + alone.q.size())]);
    for (int64_t i = 0; i < alone.k.size(); ++i) alone.k.set(i, batch.k.values[size_t(i + alone.k.size())]);
    const std::vector<int32_t> all = batch.sample(2), own = alone.sample(1);
    CHECK(std::equal(own.begin(), own.end(), all.begin() + int64_t(own.size())));
  });
}

TEST(broken_logits_draw_a_valid_key_or_none) {
  check::for_each_isa([](const std::string&) {
    for (const double broken : {double(NAN), double(INFINITY), -double(INFINITY), 1e30, 3e38})
      for (const bool in_query : {false, true})
        for (const bool masked : {false, true}) {
          Problem p({1, 1, 1, 2, 40, 300, 4, masked});
          Array& x = in_query ? p.q : p.k;
          for (int64_t i = 0; i < x.size(); i += 7)
            if (in_query || p.keep[size_t(i / 4)]) x.set(i, broken);
          for (const int32_t key : p.sample(2)) CHECK(key >= -1 && key < 300 && (key < 0 || p.keep[size_t(key)]));
        }
  });
}

TEST(one_key_far_above_the_others_is_drawn) {
  check::for_each_isa([](const std::string&) {
    Problem p({1, 1, 1, 1, 30, 200, 2});
    for (int64_t m = 0; m < 200; ++m) p.k.set(2 * m, m == 77 ? 1e10 : -1e12), p.k.set(2 * m + 1, 0);
    for (int64_t n = 0; n < 30; ++n) p.q.set(2 * n, 1e10), p.q.set(2 * n + 1, 0);
    for (const int32_t key : p.sample(1)) CHECK(key == 77);
  });
}

TEST(empty_arrays) {
  check::for_each_isa([](const std::string&) {
    for (const int32_t key : Problem({2, 2, 1, 3, 5, 0, 4}).sample(2)) CHECK(key == -1);
    Problem none({1, 1, 1, 1, 70, 90, 4});
    none.s.masked = true, none.keep.assign(90, 0);
    none.options.key_mask = make_tensor(reinterpret_cast<const bool*>(none.keep.data()), {1, 90});
    for (const int32_t key : none.sample(2)) CHECK(key == -1);
    CHECK(Problem({0, 2, 1, 3, 5, 6, 4}).sample(2).empty());
    CHECK(Problem({2, 0, 0, 3, 5, 6, 4}).sample(2).empty());
    CHECK(Problem({2, 2, 1, 3, 0, 6, 4}).sample(2).empty());
  });
}

TEST(errors_name_what_is_wrong) {
  Problem p({2, 2, 1, 1, 3, 4, 5});
  std::vector<int32_t> memory(100);
  std::vector<char> workspace(100);
  const Queue queue = Queue::cpu(1);
  SoftmaxSampleOptions options;
  const Tensor q = p.q.view, k = p.k.view, out = make_tensor(memory.data(), {2, 2, 1, 3});
  const auto call = [&](const Tensor& a, const Tensor& b, const Tensor& indices) {
    softmax_sample(queue, a, b, options, indices, {workspace.data(), 100});
  };
  CHECK_THROWS_AS(std::invalid_argument,
                  call(q, make_tensor(reinterpret_cast<float*>(memory.data()), {2, 1, 4, 4}), out),
                  "[softmax_sample] k: expected shape [B, Hkv, M, D], got [2, 1, 4, 4]");
  CHECK_THROWS_AS(TypeMismatch, call(q, k, make_tensor(reinterpret_cast<float*>(memory.data()), {2, 2, 1, 3})),
                  "[softmax_sample] indices: expected dtype int32, got float32");
  CHECK_THROWS(call(q, k, make_tensor(memory.data(), {2, 2, 2, 3})),
               "[softmax_sample] indices: expected shape [B, H, S, N] = [2, 2, 1, 3], got [2, 2, 2, 3]");
  CHECK_THROWS(call(q, k, make_tensor(reinterpret_cast<int32_t*>(p.q.bytes.data()), {2, 2, 1, 3})),
               "[softmax_sample] indices: expected an output that shares no memory");
  CHECK_THROWS(call(q, k, out), "[softmax_sample] workspace: expected at least");
  options.scale = -1;
  CHECK_THROWS(call(q, k, out), "[softmax_sample] scale: expected a finite number above 0, or 0 for D^-1/2, got -1");
  options.scale = NAN;
  CHECK_THROWS(call(q, k, out), "[softmax_sample] scale: expected a finite number above 0");
  options.scale = 0, options.num_samples = 0;
  CHECK_THROWS(call(q, k, out), "[softmax_sample] num_samples: expected a value in [1, 2147483647], got 0");
  options.num_samples = 1;
  const bool mask[8] = {};
  options.key_mask = make_tensor(mask, {2, 3});
  CHECK_THROWS(call(q, k, out), "[softmax_sample] key_mask: expected shape [B, M] = [2, 4], got [2, 3]");
  options.key_mask = ConstTensor();
  const Array wide({2, 2, 3, 513}, DType::f32), wide_k({2, 1, 4, 513}, DType::f32);
  CHECK_THROWS_AS(Unsupported, call(wide.view, wide_k.view, out), "a head dimension above 512");
}
