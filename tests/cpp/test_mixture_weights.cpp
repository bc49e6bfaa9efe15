// mixture_weights and its gradient against the equations in double, on every row of kernels this machine can run.
#include "mixture_weights_reference.h"
#include "subquad/error.h"

namespace {

using namespace mixture;

bool same_bits(const Array& a, const Array& b) { return check::same_bits(a.floats(), b.floats()); }

double largest_error(const std::vector<float>& x, const std::vector<double>& exact) {
  double error = 0;
  for (size_t i = 0; i < exact.size(); ++i) error = std::max(error, std::fabs(x[i] - exact[i]));
  return error;
}

/// The errors of plain evaluations in float: the largest of a few orders of summation, for one may be right by luck.
struct Granted {
  double alpha = 0, dq = 0, dq_bar = 0, dbalance = 0;

  Granted(Problem& p, const std::vector<double>& weights, const Gradient<double>& exact) {
    for (p.turn = 0; p.turn < 5; ++p.turn) {
      const Gradient<float> plain(p);
      alpha = std::max(alpha, largest_error(p.weights<float>(), weights));
      dq = std::max(dq, largest_error(plain.dq, exact.dq));
      dq_bar = std::max(dq_bar, largest_error(plain.dq_bar, exact.dq_bar));
      dbalance = std::max(dbalance, largest_error(plain.dbalance, exact.dbalance));
    }
  }
};

/// The weights themselves, for near the floor a logarithm magnifies rounding.
void check_forward(const Problem& p, const std::vector<double>& exact, double granted) {
  for (size_t i = 0; i < exact.size(); ++i) {
    const int64_t j = int64_t(i) % p.samples(), row = int64_t(i) / p.samples(), b = row / p.s.n / p.s.heads;
    const double got = p.log_alpha.get(int64_t(i)), alpha = std::max(exact[i], 1e-8), log_alpha = std::log(alpha);
    if (!p.kept(b, row % p.s.n) || !p.exists(b, j % p.s.c))
      CHECK(got == -INFINITY);
    else if (exact[i] < -1e-4)
      CHECK_NEAR(got, log_alpha, 1e-6);
    else
      CHECK_NEAR(std::exp(got), alpha, 2 * granted + 0x1p-23 * alpha * (1 + std::fabs(log_alpha)));
  }
}

/// The error is at most twice that of the plain evaluations, and one rounding of the largest element.
void check_gradient(const std::string& what, const Array& got, const std::vector<double>& exact, double granted) {
  double largest = 0;
  for (double x : exact) largest = std::max(largest, std::fabs(x));
  const double budget = 2 * granted + check::epsilon(got.view.dtype) * largest;
  for (size_t i = 0; i < exact.size(); ++i) {
    if (std::fabs(got.get(int64_t(i)) - exact[i]) <= budget) continue;
    char text[120];
    std::snprintf(text, sizeof text, ": element %d is %.9g against %.9g, budget %.3g", int(i), got.get(int64_t(i)),
                  exact[i], budget);
    return check::fail(__FILE__, __LINE__, what + text);
  }
}

void check_problem(const Sizes& sizes, double size = 1) {
  Problem p(sizes, size);
  const std::vector<double> exact = p.weights<double>();
  const Gradient<double> gradient(p);
  const Granted granted(p, exact, gradient);
  const std::string where = " (" + describe(sizes) + ")";
  check::for_each_isa([&](const std::string&) {
    p.forward(), p.backward();
    check_forward(p, exact, granted.alpha);
    check_gradient("dq" + where, p.dq, gradient.dq, granted.dq);
    check_gradient("dq_bar" + where, p.dq_bar, gradient.dq_bar, granted.dq_bar);
    check_gradient("dbalance" + where, p.dbalance, gradient.dbalance, granted.dbalance);
  });
}

}  // namespace

TEST(sizes) {
  for (bool over_queries : {true, false}) {
    for (int64_t d : {1, 3, 7, 16, 17, 64, 100, 512}) check_problem({1, 1, 21, 9, 1, d, over_queries});
    for (int64_t c : {1, 2, 7, 8, 9, 16, 17, 49, 63, 64, 65, 130})
      for (int64_t n : {1, 8, 33, 65}) check_problem({n == 1 ? 5 : 1, 2, n, c, 1 + c % 3, 12, over_queries});
    check_problem({1, 1, 600, 49, 2, 16, over_queries});
  }
}

TEST(masks_strides_and_dtypes) {
  for (bool over_queries : {true, false})
    for (Layout layout : {Layout::dense, Layout::loose})
      for (DType dtype : {DType::f32, DType::f16, DType::bf16})
        check_problem({3, 2, 70, 21, 2, 20, over_queries, true, layout, dtype});
}

TEST(large_scores) {
  for (double size : {4.0, 12.0}) {
    check_problem({1, 1, 40, 20, 1, 16, false}, size);
    check_problem({1, 1, 40, 20, 1, 16, true}, size);
  }
}

TEST(hidden_values_have_no_effect) {
  check::for_each_isa([](const std::string&) {
    for (bool over_queries : {true, false}) {
      Problem nan({2, 2, 70, 30, 2, 12, over_queries, true}), zero(nan.s);
      zero.fill_hidden(0);
      for (Problem* p : {&nan, &zero}) p->forward(), p->backward();
      CHECK(same_bits(nan.log_alpha, zero.log_alpha) && same_bits(nan.dq, zero.dq));
      CHECK(same_bits(nan.dq_bar, zero.dq_bar) && same_bits(nan.dbalance, zero.dbalance));
      for (int64_t i = 0; i < nan.dq.size(); ++i)
        if (!nan.kept(i / (2 * 70 * 12), i / 12 % 70)) CHECK(nan.dq.get(i) == 0);
      for (int64_t i = 0; i < nan.dbalance.size(); ++i)
        if (!nan.exists(i / (2 * 60), i % 30)) CHECK(nan.dbalance.get(i) == 0);
    }
  });
}

TEST(the_floor_has_no_gradient) {
  Problem p({1, 1, 5, 4, 1, 3, false});
  for (int64_t i = 0; i < p.balance.size(); ++i) p.balance.set(i, -5);
  for (int64_t i = 0; i < p.dlog_alpha.size(); ++i) p.dlog_alpha.set(i, double(i) + 1);
  check::for_each_isa([&](const std::string&) {
    p.forward(), p.backward();
    for (int64_t i = 0; i < p.log_alpha.size(); ++i) CHECK_NEAR(p.log_alpha.get(i), std::log(1e-8), 1e-6);
    for (const Array* x : {&p.dq, &p.dq_bar, &p.dbalance})
      for (int64_t i = 0; i < x->size(); ++i) CHECK(x->get(i) == 0);
  });
}

TEST(nothing_exists) {
  check::for_each_isa([](const std::string&) {
    for (bool over_queries : {true, false}) {
      Problem p({1, 1, 9, 5, 1, 4, over_queries, true}), queryless(p.s);
      std::fill(p.counts.begin(), p.counts.end(), 0);
      std::fill(queryless.keep.begin(), queryless.keep.end(), 0);
      queryless.set_column_lse();
      for (Problem* problem : {&p, &queryless}) {
        problem->forward(), problem->backward();
        for (int64_t i = 0; i < problem->log_alpha.size(); ++i) CHECK(problem->log_alpha.get(i) == -INFINITY);
        for (const Array* x : {&problem->dq, &problem->dq_bar, &problem->dbalance})
          for (int64_t i = 0; i < x->size(); ++i) CHECK(x->get(i) == 0);
      }
    }
  });
}

TEST(threads_do_not_change_bits) {
  check::for_each_isa([](const std::string&) {
    for (bool over_queries : {true, false}) {
      Problem one({1, 3, 700, 49, 2, 20, over_queries, true});
      one.forward(1), one.backward(1);
      for (int threads : {2, 3, 16}) {
        Problem other(one.s);
        other.forward(threads), other.backward(threads);
        CHECK(same_bits(one.log_alpha, other.log_alpha) && same_bits(one.dq, other.dq));
        CHECK(same_bits(one.dq_bar, other.dq_bar) && same_bits(one.dbalance, other.dbalance));
      }
    }
  });
}

TEST(central_differences) {
  for (bool over_queries : {true, false}) {
    Problem p({1, 1, 11, 6, 2, 5, over_queries});
    const auto loss = [&] {
      const std::vector<double> kept = p.column_lse.values;
      for (int64_t c = 0; over_queries && c < p.s.c; ++c) {
        double sum = 0;
        for (int64_t n = 0; n < p.s.n; ++n) sum += std::exp(p.score<double>(0, n, c));
        p.column_lse.values[size_t(c)] = std::log(sum);
      }
      const std::vector<double> alpha = p.weights<double>();
      p.column_lse.values = kept;
      double sum = 0;
      for (size_t i = 0; i < alpha.size(); ++i) sum += std::log(std::max(alpha[i], 1e-8)) * p.dlog_alpha.values[i];
      return sum;
    };
    check::for_each_isa([&](const std::string&) {
      p.backward();
      for (auto [x, gradient] : {std::pair{&p.q, &p.dq}, {&p.q_bar, &p.dq_bar}, {&p.balance, &p.dbalance}}) {
        for (size_t i = 0; i < x->values.size(); ++i) {
          const double kept = x->values[i], step = 1e-5;
          x->values[i] = kept + step;
          const double above = loss();
          x->values[i] = kept - step;
          const double below = loss();
          x->values[i] = kept;
          const double slope = (above - below) / (2 * step);
          CHECK_NEAR(gradient->get(int64_t(i)), slope, 3e-5 * (1 + std::fabs(slope)));
        }
      }
    });
  }
}

TEST(empty) {
  check::for_each_isa([](const std::string&) {
    for (const Sizes& s : {Sizes{1, 2, 0, 5, 2, 4}, Sizes{1, 2, 5, 0, 2, 4}, Sizes{1, 2, 5, 5, 0, 4},
                           Sizes{0, 2, 5, 5, 2, 4}, Sizes{1, 0, 5, 5, 2, 4}}) {
      Problem p(s);
      p.forward(), p.backward();
      for (const Array* x : {&p.dq, &p.dq_bar, &p.dbalance})
        for (int64_t i = 0; i < x->size(); ++i) CHECK(x->get(i) == 0);
    }
  });
}

TEST(errors) {
  Problem p({1, 2, 8, 5, 2, 6}), wide({1, 1, 1, 1, 1, 513});
  const Queue queue = Queue::cpu(1);
  const auto with = [&](auto change) {
    MixtureWeightsOptions o = p.options;
    change(o);
    mixture_weights(queue, p.q.view, p.q_bar.view, p.column_lse.view, p.balance.view, o, p.log_alpha.view, {});
  };
  CHECK_THROWS_AS(std::invalid_argument, with([](auto& o) { o.scale = -1; }),
                  "[mixture_weights] scale: expected a finite value above 0, or 0 for D^-1/2, got -1");
  CHECK_THROWS(with([](auto& o) { o.alpha_coeff = NAN; }), "[mixture_weights] alpha_coeff: expected a finite float32");
  CHECK_THROWS(with([](auto& o) { o.over_queries = false; }),
               "[mixture_weights] column_lse: expected none unless over_queries, got an array");
  CHECK_THROWS(with([&](auto& o) { o.counts = make_tensor(p.counts.data(), {1, 4}); }),
               "[mixture_weights] counts: expected shape [B, C] = [1, 5], got [1, 4]");
  CHECK_THROWS_AS(TypeMismatch, with([&](auto& o) { o.query_mask = make_tensor(p.counts.data(), {1, 8}); }),
                  "[mixture_weights] query_mask: expected dtype bool, got int32");
  CHECK_THROWS(with([](auto&) {}), "[mixture_weights] workspace: expected at least ");
  const Array odd({1, 2, 9}, DType::f32);
  CHECK_THROWS(
      mixture_weights(queue, p.q.view, p.q_bar.view, p.column_lse.view, odd.view, p.options, p.log_alpha.view, {}),
      "[mixture_weights] balance: expected J a multiple of C = 5, got 9");
  CHECK_THROWS_AS(TypeMismatch,
                  mixture_weights(queue, p.q.view, p.q_bar.view, {}, p.balance.view, p.options, p.log_alpha.view, {}),
                  "[mixture_weights] column_lse: expected an array, got none");
  CHECK_THROWS_AS(Unsupported, wide.forward(), "for a head dimension above 512");
  CHECK_THROWS(mixture_weights_bwd(queue, p.dlog_alpha.view, p.q.view, p.q_bar.view, p.column_lse.view, p.balance.view,
                                   p.options, p.dq.view, p.q_bar.view, p.dbalance.view, {}),
               "[mixture_weights_bwd] dq_bar: expected an output that shares no memory");
}
