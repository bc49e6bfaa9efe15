// mixture_proposals and its gradient against the equations in double, on every row of kernels this machine can run.
#include "mixture_proposals_reference.h"
#include "subquad/error.h"

namespace {

using namespace mixture;

/// The largest errors of plain evaluations in float in a few orders of summation, for one may be right by luck.
struct Granted {
  double w = 0, keys = 0, log_density = 0, balance = 0, dmu = 0;

  Granted(Problem& p, const Reference<double>& exact) {
    for (p.turn = 0; p.turn < 5; ++p.turn) {
      const Reference<float> plain(p);
      include(w, plain.w, exact.w), include(keys, plain.keys, exact.keys), include(dmu, plain.dmu, exact.dmu);
      include(log_density, plain.log_density, exact.log_density), include(balance, plain.balance, exact.balance);
    }
  }

 private:
  static void include(double& error, const std::vector<float>& plain, const std::vector<double>& exact) {
    for (size_t i = 0; i < exact.size(); ++i)
      if (std::isfinite(exact[i])) error = std::max(error, std::fabs(plain[i] - exact[i]));
  }
};

/// The error is at most twice that of the plain evaluations, and one rounding of the largest element.
void check_result(const std::string& what, const Array& got, const std::vector<double>& exact, double granted) {
  double largest = 0;
  for (double x : exact)
    if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
  const double budget = 2 * granted + 0x1p-23 * largest;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double value = got.get(int64_t(i));
    if (value == exact[i] || std::fabs(value - exact[i]) <= budget) continue;
    char text[120];
    std::snprintf(text, sizeof text, ": element %d is %.9g against %.9g, budget %.3g", int(i), value, exact[i], budget);
    return check::fail(__FILE__, __LINE__, what + text);
  }
}

void check_problem(const Sizes& sizes) {
  Problem p(sizes);
  const Reference<double> exact(p);
  const Granted granted(p, exact);
  const std::string where = describe(sizes);
  check::for_each_isa([&](const std::string&) {
    p.forward(), p.backward(p.cotangents());
    check_result("w" + where, p.w, exact.w, granted.w);
    check_result("log_density" + where, p.log_density, exact.log_density, granted.log_density);
    if (sizes.mis == Mis::biased) check_result("keys" + where, p.keys, exact.keys, granted.keys);
    if (sizes.mis == Mis::opt) check_result("balance" + where, p.balance, exact.balance, granted.balance);
    check_result("dmu" + where, p.dmu, exact.dmu, granted.dmu);
  });
}

bool same_bits(const Array& a, const Array& b) { return check::same_bits(a.floats(), b.floats()); }

constexpr Mis kRules[] = {Mis::opt, Mis::bh, Mis::biased};
constexpr Noise kNoises[] = {Noise::none, Noise::own, Noise::shared, Noise::antithetic};

}  // namespace

TEST(sizes) {
  for (Mis mis : kRules) {
    for (int64_t d : {1, 3, 7, 16, 17, 33, 64, 100, 512}) check_problem({1, 2, 1, 9, 2, d, mis});
    for (int64_t c : {1, 2, 7, 8, 9, 16, 17, 32, 33, 49, 64, 65, 130}) check_problem({1, 2, 1, c, 1 + c % 3, 12, mis});
  }
}

TEST(noise_groups_layouts_and_dtypes) {
  for (Mis mis : kRules)
    for (Noise noise : kNoises)
      for (DType dtype : {DType::f32, DType::f16, DType::bf16})
        for (Layout layout : {Layout::dense, Layout::loose})
          for (bool missing : {false, true}) check_problem({3, 4, 2, 11, 2, 20, mis, noise, missing, layout, dtype});
}

TEST(far_apart_landmarks) {
  for (Mis mis : kRules)
    for (double size : {3.0, 10.0})
      check_problem({1, 1, 1, 20, 4, 32, mis, Noise::own, false, Layout::dense, DType::f32, size});
}

TEST(missing_landmarks_have_no_effect) {
  check::for_each_isa([](const std::string&) {
    for (Mis mis : kRules) {
      Problem nan({2, 2, 1, 13, 4, 18, mis, Noise::antithetic, true}), zero(nan.s);
      zero.fill_hidden(0);
      for (Problem* p : {&nan, &zero}) p->forward(), p->backward(p->cotangents());
      CHECK(same_bits(nan.w, zero.w) && same_bits(nan.keys, zero.keys) && same_bits(nan.balance, zero.balance));
      CHECK(same_bits(nan.log_density, zero.log_density) && same_bits(nan.dmu, zero.dmu));
      for (int64_t i = 0; i < nan.log_density.size(); ++i) {
        if (nan.sampled(i)) continue;
        CHECK(nan.log_density.get(i) == INFINITY && nan.w.get(i * 18 + 3) == 0);
        if (mis == Mis::biased) CHECK(nan.keys.get(i * 18 + 3) == 0);
        if (mis == Mis::opt) CHECK(nan.balance.get(i) == 0);
      }
    }
  });
}

TEST(nothing_exists) {
  check::for_each_isa([](const std::string&) {
    Problem p({1, 1, 1, 5, 2, 4, Mis::opt, Noise::own, true});
    std::fill(p.counts.begin(), p.counts.end(), 0);
    p.forward(), p.backward(p.cotangents());
    for (int64_t i = 0; i < p.w.size(); ++i) CHECK(p.w.get(i) == 0);
    for (int64_t i = 0; i < p.balance.size(); ++i) CHECK(p.balance.get(i) == 0 && p.log_density.get(i) == INFINITY);
    for (int64_t i = 0; i < p.dmu.size(); ++i) CHECK(p.dmu.get(i) == 0);
  });
}

TEST(cotangents_left_out_are_zero) {
  check::for_each_isa([](const std::string&) {
    for (Mis mis : kRules) {
      Problem p({1, 2, 2, 9, 2, 6, mis}), zero(p.s);
      MixtureProposalsCotangents all = p.cotangents();
      for (ConstTensor MixtureProposalsCotangents::* member :
           {&MixtureProposalsCotangents::dw, &MixtureProposalsCotangents::dkeys,
            &MixtureProposalsCotangents::dlog_density, &MixtureProposalsCotangents::dbalance}) {
        if (!(all.*member).defined()) continue;
        MixtureProposalsCotangents some = all;
        some.*member = ConstTensor();
        p.backward(some);
        std::vector<float> zeros(size_t((all.*member).numel()));
        some.*member = all.*member;
        (some.*member).data = zeros.data();
        zero.backward(some);
        CHECK(same_bits(p.dmu, zero.dmu));
      }
    }
  });
}

// Two samples of a pair lie on both sides of their landmark.
TEST(antithetic_pairs) {
  Problem p({1, 2, 2, 5, 2, 7, Mis::opt, Noise::antithetic});
  check::for_each_isa([&](const std::string&) {
    p.forward();
    for (int64_t i = 0; i < 2 * 5 * 7; ++i) {
      const int64_t head = i / 35, first = head * 70 + i % 35;
      CHECK_NEAR((p.w.get(first) + p.w.get(first + 35)) / 2, p.q_bar.values[size_t(i)] + p.k_bar.values[size_t(i)],
                 1e-6);
      CHECK(p.w.get(first) != p.w.get(first + 35));
    }
  });
}

TEST(threads_do_not_change_bits) {
  check::for_each_isa([](const std::string&) {
    Problem one({2, 2, 1, 49, 8, 20, Mis::opt, Noise::own, true});
    one.forward(1), one.backward(one.cotangents(), 1);
    for (int threads : {2, 3, 16}) {
      Problem other(one.s);
      other.forward(threads), other.backward(other.cotangents(), threads);
      CHECK(same_bits(one.w, other.w) && same_bits(one.log_density, other.log_density));
      CHECK(same_bits(one.balance, other.balance) && same_bits(one.dmu, other.dmu));
    }
  });
}

TEST(central_differences) {
  for (Mis mis : kRules) {
    Problem p({1, 1, 1, 6, 2, 5, mis, Noise::own, true});
    p.fill_hidden(0);
    const auto loss = [&] {
      const Reference<double> r(p);
      double sum = 0;
      for (size_t i = 0; i < r.w.size(); ++i) {
        sum += r.w[i] * p.dw.values[i];
        if (mis == Mis::biased) sum += r.keys[i] * p.dkeys.values[i];
      }
      for (size_t i = 0; i < r.balance.size(); ++i) {
        if (p.sampled(int64_t(i))) sum += r.log_density[i] * p.dlog_density.values[i];
        if (mis == Mis::opt) sum += r.balance[i] * p.dbalance.values[i];
      }
      return sum;
    };
    check::for_each_isa([&](const std::string&) {
      p.backward(p.cotangents());
      for (size_t i = 0; i < p.q_bar.values.size(); ++i) {
        const double kept = p.q_bar.values[i], step = 1e-5;
        p.q_bar.values[i] = kept + step;
        const double above = loss();
        p.q_bar.values[i] = kept - step;
        const double below = loss();
        p.q_bar.values[i] = kept;
        CHECK_NEAR(p.dmu.get(int64_t(i)), (above - below) / (2 * step), 1e-5);
      }
    });
  }
}

TEST(empty) {
  check::for_each_isa([](const std::string&) {
    for (const Sizes& s : {Sizes{0, 2, 1, 5, 2, 4}, Sizes{1, 0, 1, 5, 2, 4}, Sizes{1, 2, 1, 0, 2, 4},
                           Sizes{1, 2, 1, 5, 0, 4}, Sizes{1, 2, 1, 0, 1, 4, Mis::bh, Noise::none}}) {
      Problem p(s);
      p.forward(), p.backward(p.cotangents());
      for (int64_t i = 0; i < p.dmu.size(); ++i) CHECK(p.dmu.get(i) == 0);
    }
  });
}

TEST(errors) {
  Problem p({1, 4, 2, 5, 2, 6}), groups({1, 4, 3, 5, 2, 6}), wide({1, 1, 1, 1, 1, 513}), odd({1, 4, 2, 5, 3, 6});
  const Queue queue = Queue::cpu(1);
  const auto with = [&](auto change) {
    MixtureProposalsOptions o = p.options;
    MixtureProposals r = p.results();
    change(o, r);
    mixture_proposals(queue, p.q_bar.view, p.k_bar.view, p.noise.view, o, r, {});
  };
  CHECK_THROWS_AS(std::invalid_argument, with([](auto& o, auto&) { o.scale = -2; }),
                  "[mixture_proposals] scale: expected a finite value above 0, or 0 for D^-1/2, got -2");
  CHECK_THROWS(with([](auto& o, auto&) { o.noise_std = INFINITY; }), "noise_std: expected a finite float32, got inf");
  CHECK_THROWS(with([](auto& o, auto&) { o.mis = Mis(7); }), "mis: expected opt, bh or biased, got 7");
  CHECK_THROWS(with([](auto& o, auto&) { o.antithetic = true; }), "noise: expected J / 2 rows for J = 10, got 10");
  CHECK_THROWS(with([&](auto& o, auto&) { o.counts = make_tensor(p.counts.data(), {5, 1}); }),
               "[mixture_proposals] counts: expected shape [B, C] = [1, 5], got [5, 1]");
  CHECK_THROWS(with([&](auto&, auto& r) { r.keys = p.keys.view; }),
               "[mixture_proposals] keys: expected none unless mis is biased, got an array");
  CHECK_THROWS_AS(TypeMismatch, with([](auto&, auto& r) { r.balance = Tensor(); }),
                  "[mixture_proposals] balance: expected an array, got none");
  CHECK_THROWS(with([&](auto&, auto& r) { r.w = odd.w.view; }), "noise: expected J rows for J = 15, got 10");
  CHECK_THROWS(with([](auto&, auto& r) { r.balance = r.log_density; }),
               "log_density: expected an output that shares no memory");
  CHECK_THROWS(with([](auto&, auto&) {}), "[mixture_proposals] workspace: expected at least ");
  CHECK_THROWS(groups.forward(), "k_bar: expected a number of heads that divides the 4 query heads, got 3");
  CHECK_THROWS_AS(Unsupported, wide.forward(), "for a head dimension above 512");
  CHECK_THROWS(mixture_proposals(queue, p.q_bar.view, p.k_bar.view, {}, p.options, p.results(), {}),
               "[mixture_proposals] w: expected without noise J = C = 5, got 10");
  const Array uneven({1, 4, 7, 6}, DType::f32), dmu({1, 4, 5, 6}, DType::f32);
  CHECK_THROWS(mixture_proposals_bwd(queue, {}, p.q_bar.view, p.k_bar.view, uneven.view, p.options, dmu.view, {}),
               "[mixture_proposals_bwd] noise: expected J a multiple of C = 5, got 7");
  CHECK_THROWS(mixture_proposals_bwd(queue, p.cotangents(), p.q_bar.view, p.k_bar.view, p.noise.view, p.options,
                                     p.q_bar.view, {}),
               "[mixture_proposals_bwd] dmu: expected an output that shares no memory");
}
