#include "ranked_problem.h"
#include "subquad/attention_divergence.h"

using namespace subquad;
using check::Array;
using check::Layout;
using check::Ranked;

namespace {

struct Sizes {
  int64_t b, h, hkv, ht, n, m, d, dt;
  bool masked = false, causal = false;
  DType dtype = DType::f32, dtype_teacher = DType::f32;
  Layout layout = Layout::dense;
  double norm = 1, scale = 0, scale_teacher = 0;
  double apart = -1;  // how far the student is from the teacher; below 0: nothing in common
};

struct Gradients {
  std::vector<double> dq, dk;
};

struct Problem {
  Sizes s;
  std::mt19937 random{17};
  Ranked ranked;
  Array q, k, qt, kt, kl, sse, dkl, dsse, dq, dk;
  bool has_dkl = true, has_dsse = true;

  explicit Problem(const Sizes& z)
      : s(z),
        ranked(z.b, z.n, z.m, z.masked, z.causal, random),
        q({z.b, z.h, z.n, z.d}, z.dtype, z.layout),
        k({z.b, z.hkv, z.m, z.d}, z.dtype, z.layout),
        qt({z.b, z.h, z.n, z.dt}, z.dtype_teacher, z.layout),
        kt({z.b, z.ht, z.m, z.dt}, z.dtype_teacher, z.layout),
        kl({z.b, z.h, z.n}, DType::f32, z.layout),
        sse({z.b, z.h, z.n}, DType::f32, z.layout),
        dkl({z.b, z.h, z.n}, DType::f32, z.layout),
        dsse({z.b, z.h, z.n}, DType::f32, z.layout),
        dq({z.b, z.h, z.n, z.d}, z.dtype, z.layout),
        dk({z.b, z.hkv, z.m, z.d}, z.dtype, z.layout) {
    for (Array* a : {&q, &qt}) a->fill_normal(random, z.norm);
    for (Array* a : {&k, &kt, &dkl, &dsse}) a->fill_normal(random);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; z.apart >= 0 && i < q.size(); ++i) q.set(i, qt.values[size_t(i)] + z.apart * normal(random));
    for (int64_t i = 0; z.apart >= 0 && i < k.size(); ++i) k.set(i, kt.values[size_t(i)]);
    spoil_unseen(ranked, q, k);
    spoil_unseen(ranked, qt, kt);
    for (int64_t i = 0; i < dkl.size(); ++i)
      if (ranked.count(i / s.n / s.h, i % s.n) == 0) dkl.set(i, NAN), dsse.set(i, NAN);
  }

  AttentionDivergenceOptions options() const {
    AttentionDivergenceOptions o;
    o.scale = s.scale, o.scale_teacher = s.scale_teacher;
    o.visible = ranked.visible(), o.positions = ranked.places();
    return o;
  }

  void run(int threads = 2) {
    const Queue queue = Queue::cpu(threads);
    for (Array* a : {&kl, &sse}) std::fill(a->bytes.begin(), a->bytes.end(), 0xff);
    const int64_t bytes =
        attention_divergence_workspace_bytes(queue, q.view, k.view, qt.view, kt.view, options(), kl.view, sse.view);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    attention_divergence(queue, q.view, k.view, qt.view, kt.view, options(), kl.view, sse.view,
                         {workspace.data(), bytes});
  }

  void run_bwd(int threads = 2) {
    const Queue queue = Queue::cpu(threads);
    const ConstTensor first = has_dkl ? ConstTensor(dkl.view) : ConstTensor();
    const ConstTensor second = has_dsse ? ConstTensor(dsse.view) : ConstTensor();
    for (Array* a : {&dq, &dk}) std::fill(a->bytes.begin(), a->bytes.end(), 0xff);
    const int64_t bytes = attention_divergence_bwd_workspace_bytes(queue, first, second, q.view, k.view, qt.view,
                                                                   kt.view, options(), dq.view, dk.view);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    attention_divergence_bwd(queue, first, second, q.view, k.view, qt.view, kt.view, options(), dq.view, dk.view,
                             {workspace.data(), bytes});
  }

  template <class T>
  check::SoftmaxRow<T> student(int64_t b, int64_t h, int64_t n) const {
    return check::SoftmaxRow<T>(check::logits_of_row<T>(ranked, q, k, s.scale, b, h, n));
  }
  template <class T>
  check::SoftmaxRow<T> teacher(int64_t b, int64_t h, int64_t n) const {
    return check::SoftmaxRow<T>(check::logits_of_row<T>(ranked, qt, kt, s.scale_teacher, b, h, n));
  }

  /// kl and sse, row after row.
  template <class T>
  void answer(std::vector<double>& kls, std::vector<double>& sses) const {
    check::for_each_row(s.b, s.h, s.n, [&](int64_t b, int64_t h, int64_t n) {
      const auto x = student<T>(b, h, n), t = teacher<T>(b, h, n);
      T sum = 0, squares = 0;
      for (size_t r = 0; r < x.p.size(); ++r) {
        sum += t.p[r] * (t.log_p[r] - x.log_p[r]);
        squares += (x.p[r] - t.p[r]) * (x.p[r] - t.p[r]);
      }
      kls.push_back(double(sum)), sses.push_back(double(squares));
    });
  }

  template <class T>
  Gradients gradients() const {
    std::vector<T> to_q(q.values.size()), to_k(k.values.size());
    const T scale = T(s.scale == 0 ? 1 / std::sqrt(double(s.d)) : s.scale);
    check::for_each_row(s.b, s.h, s.n, [&](int64_t b, int64_t h, int64_t n) {
      const auto x = student<T>(b, h, n), t = teacher<T>(b, h, n);
      const size_t row = size_t((b * s.h + h) * s.n + n), dim = size_t(s.d);
      const T first = has_dkl ? T(dkl.values[row]) : T(0), second = has_dsse ? T(dsse.values[row]) : T(0);
      T mean = 0;
      for (size_t r = 0; r < x.p.size(); ++r) mean += x.p[r] * (x.p[r] - t.p[r]);
      for (size_t r = 0; r < x.p.size(); ++r) {
        const T e = x.p[r] - t.p[r], dx = scale * (first * e + 2 * second * x.p[r] * (e - mean));
        const size_t key = size_t((b * s.hkv + h / (s.h / s.hkv)) * s.m + ranked.key(b, int64_t(r)));
        for (size_t d = 0; d < dim; ++d) {
          to_q[row * dim + d] += dx * T(k.values[key * dim + d]);
          to_k[key * dim + d] += dx * T(q.values[row * dim + d]);
        }
      }
    });
    return {{to_q.begin(), to_q.end()}, {to_k.begin(), to_k.end()}};
  }
};

std::string name_of(const Sizes& s) {
  char text[120];
  std::snprintf(text, sizeof text, "n %d m %d d %d dt %d%s%s norm %g apart %g ", int(s.n), int(s.m), int(s.d),
                int(s.dt), s.masked ? " masked" : "", s.causal ? " causal" : "", s.norm, s.apart);
  return text;
}

void check_equation(const Sizes& sizes) {
  Problem p(sizes);
  std::vector<double> kl, sse, plain_kl, plain_sse;
  p.answer<double>(kl, sse), p.answer<float>(plain_kl, plain_sse);
  const Gradients exact = p.gradients<double>(), plain = p.gradients<float>();
  check::for_each_isa([&](const std::string&) {
    p.run(), p.run_bwd();
    CHECK_BUDGET(name_of(sizes) + "kl", p.kl, kl, plain_kl);
    CHECK_BUDGET(name_of(sizes) + "sse", p.sse, sse, plain_sse);
    CHECK_BUDGET(name_of(sizes) + "dq", p.dq, exact.dq, plain.dq);
    CHECK_BUDGET(name_of(sizes) + "dk", p.dk, exact.dk, plain.dk);
  });
}

}  // namespace

TEST(equation) {
  for (const bool masked : {false, true})
    for (const bool causal : {false, true}) {
      check_equation({2, 4, 2, 1, 37, 37, 16, 24, masked, causal});
      check_equation({3, 6, 2, 3, 70, 150, 33, 5, masked, causal, DType::f16, DType::bf16, Layout::loose});
      check_equation({1, 2, 1, 2, 150, 70, 64, 64, masked, causal, DType::bf16, DType::f32});
      check_equation({2, 2, 2, 1, 60, 300, 7, 130, masked, causal, DType::f32, DType::f16, Layout::loose, 1, 0.4, 0.2});
    }
  for (const int64_t m : {1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 129}) check_equation({1, 2, 1, 1, 40, m, 7, 9});
  for (const int64_t d : {1, 3, 8, 31, 512}) check_equation({1, 2, 1, 2, 40, 40, d, 512 / d, true, true});
}

TEST(student_close_to_its_teacher) {
  for (const double apart : {0.0, 1e-6, 1e-3, 0.1})
    for (const double norm : {1.0, 8.0}) {
      Sizes s = {1, 2, 2, 2, 60, 200, 16, 16, true, true};
      s.norm = norm, s.apart = apart;
      check_equation(s);
    }
  // The same rows: nothing is left, and nothing is negative zero or worse.
  Sizes same = {1, 2, 2, 2, 60, 200, 16, 16};
  same.apart = 0;
  Problem p(same);
  check::for_each_isa([&](const std::string&) {
    p.run(), p.run_bwd();
    for (const Array* a : {&p.kl, &p.sse, &p.dq, &p.dk})
      for (const float x : a->floats()) CHECK(x == 0);
  });
}

TEST(large_logits) {
  for (const double norm : {20.0, 1e5}) {
    Sizes s = {1, 2, 2, 2, 60, 200, 16, 16, true, true};
    s.norm = norm;
    check_equation(s);
  }
}

TEST(either_gradient_alone) {
  for (const bool first : {false, true}) {
    Problem p({2, 4, 2, 1, 45, 50, 16, 24, true, true});
    p.has_dkl = first, p.has_dsse = !first;
    const Gradients exact = p.gradients<double>(), plain = p.gradients<float>();
    check::for_each_isa([&](const std::string&) {
      p.run_bwd();
      CHECK_BUDGET("dq", p.dq, exact.dq, plain.dq);
      CHECK_BUDGET("dk", p.dk, exact.dk, plain.dk);
    });
  }
  Problem p({1, 2, 1, 1, 5, 6, 4, 4});
  p.has_dkl = p.has_dsse = false;
  p.run_bwd();
  for (const Array* a : {&p.dq, &p.dk})
    for (const float x : a->floats()) CHECK(x == 0);
}

TEST(central_differences) {
  Problem p({1, 4, 2, 1, 6, 9, 5, 3, false, true});
  p.run_bwd();
  const auto loss = [&] {
    std::vector<double> kl, sse;
    p.answer<double>(kl, sse);
    double sum = 0;
    for (size_t i = 0; i < kl.size(); ++i) sum += p.dkl.values[i] * kl[i] + p.dsse.values[i] * sse[i];
    return sum;
  };
  for (const auto& [x, gradient] : {std::pair{&p.q, &p.dq}, std::pair{&p.k, &p.dk}})
    for (int64_t i = 0; i < x->size(); ++i) {
      const double value = x->values[size_t(i)], step = 1e-5;
      x->values[size_t(i)] = value + step;
      const double above = loss();
      x->values[size_t(i)] = value - step;
      const double below = loss();
      x->values[size_t(i)] = value;
      CHECK_NEAR(gradient->get(i), (above - below) / (2 * step), 2e-6);
    }
}

TEST(threads_do_not_change_bits) {
  Problem p({2, 4, 2, 1, 300, 300, 20, 12, true, true});
  check::for_each_isa([&](const std::string&) {
    p.run(1), p.run_bwd(1);
    const std::vector<float> one[] = {p.kl.floats(), p.sse.floats(), p.dq.floats(), p.dk.floats()};
    for (const int threads : {2, 3, 16}) {
      p.run(threads), p.run_bwd(threads);
      int i = 0;
      for (const Array* a : {&p.kl, &p.sse, &p.dq, &p.dk}) CHECK(check::same_bits(one[i++], a->floats()));
    }
  });
}

TEST(later_tokens_have_no_effect) {
  check::for_each_isa([&](const std::string&) {
    Problem p({1, 2, 1, 2, 100, 100, 20, 12, false, true});
    p.run(), p.run_bwd();
    const std::vector<float> kl = p.kl.floats(), sse = p.sse.floats(), dq = p.dq.floats();
    for (Array* a : {&p.q, &p.k, &p.qt, &p.kt}) {
      const int64_t dim = a->view.shape[3];
      for (int64_t i = 0; i < a->size(); ++i)
        if (i / dim % 100 >= 60) a->set(i, i % 2 ? NAN : INFINITY);
    }
    p.run(), p.run_bwd();
    for (int64_t row = 0; row < 200; ++row) {
      const bool is_early = row % 100 < 60;
      CHECK(std::isnan(p.kl.get(row)) == !is_early);
      if (!is_early) continue;
      CHECK(p.kl.get(row) == kl[size_t(row)] && p.sse.get(row) == sse[size_t(row)]);
      for (int64_t i = row * 20; i < row * 20 + 20; ++i) CHECK(p.dq.get(i) == dq[size_t(i)]);
    }
  });
}

TEST(earlier_queries_have_no_effect_on_later_keys) {
  check::for_each_isa([&](const std::string&) {
    Problem p({1, 2, 1, 2, 100, 100, 20, 12, false, true});
    p.run_bwd();
    const std::vector<float> dk = p.dk.floats();
    for (Array* a : {&p.q, &p.qt, &p.dkl}) {
      const int64_t dim = a == &p.dkl ? 1 : a->view.shape[3];
      for (int64_t i = 0; i < a->size(); ++i)
        if (i / dim % 100 < 40) a->set(i, NAN);
    }
    p.run_bwd();
    for (int64_t i = 0; i < 100 * 20; ++i) {
      if (i < 40 * 20) CHECK(std::isnan(p.dk.get(i)));
      if (i >= 40 * 20) CHECK(p.dk.get(i) == dk[size_t(i)]);
    }
  });
}

TEST(empty_inputs) {
  const auto run = [](const Sizes& sizes) {
    Problem p(sizes);
    p.run(), p.run_bwd();
    for (const Array* a : {&p.kl, &p.sse, &p.dq, &p.dk})
      for (const float x : a->floats()) CHECK(x == 0);
  };
  run({0, 2, 1, 2, 3, 4, 5, 2});
  run({2, 0, 0, 0, 3, 4, 5, 2});
  run({2, 2, 1, 2, 0, 4, 5, 2});
  run({2, 2, 1, 2, 3, 0, 5, 2});
}

TEST(errors) {
  Problem p({2, 4, 2, 1, 5, 6, 4, 3, true});
  const Queue queue = Queue::cpu(1);
  std::vector<char> workspace(1 << 20);
  const Workspace scratch = {workspace.data(), int64_t(workspace.size())};
  const auto call = [&](const Problem& f, ConstTensor k_teacher, const AttentionDivergenceOptions& options, Tensor kl) {
    attention_divergence(queue, f.q.view, f.k.view, f.qt.view, k_teacher, options, kl, f.sse.view, scratch);
  };
  AttentionDivergenceOptions options = p.options();
  CHECK_THROWS(call(p, p.k.view, options, p.kl.view), "[attention_divergence] k_teacher: expected shape");
  Array three({2, 3, 6, 3}, DType::f32);
  CHECK_THROWS(call(p, three.view, options, p.kl.view),
               "[attention_divergence] k_teacher: expected a number of heads that divides the 4 query heads, got 3");
  CHECK_THROWS(call(p, p.kt.view, options, p.sse.view), "[attention_divergence] kl: expected an output that shares");
  options.scale_teacher = INFINITY;
  CHECK_THROWS(call(p, p.kt.view, options, p.kl.view),
               "[attention_divergence] scale_teacher: expected a finite number above 0, got inf");
  options.scale_teacher = 1e-60;
  CHECK_THROWS(call(p, p.kt.view, options, p.kl.view),
               "[attention_divergence] scale_teacher: expected a finite number");
  options = p.options(), options.visible = {};
  CHECK_THROWS_AS(TypeMismatch, call(p, p.kt.view, options, p.kl.view),
                  "[attention_divergence] visible: expected an array, got none");
  options = p.options();
  p.ranked.counts[0] = 7;
  CHECK_THROWS(call(p, p.kt.view, options, p.kl.view),
               "[attention_divergence] visible: expected values in [0, 6], got 7 at [0, 0]");
  CHECK_THROWS(p.run_bwd(), "[attention_divergence_bwd] visible: expected values in [0, 6], got 7 at [0, 0]");
  p.ranked.counts.assign(14, 1);
  CHECK_THROWS(attention_divergence_bwd(queue, p.dkl.view, p.dsse.view, p.q.view, p.k.view, p.qt.view, p.kt.view,
                                        options, p.q.view, p.dk.view, scratch),
               "[attention_divergence_bwd] dq: expected an output that shares no memory");
  Array wrong({2, 4, 6}, DType::f32);
  CHECK_THROWS(attention_divergence_bwd(queue, wrong.view, {}, p.q.view, p.k.view, p.qt.view, p.kt.view, options,
                                        p.dq.view, p.dk.view, scratch),
               "[attention_divergence_bwd] dkl: expected shape [B, H, N] = [2, 4, 5], got [2, 4, 6]");
}
