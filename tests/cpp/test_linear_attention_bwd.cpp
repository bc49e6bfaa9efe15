// The gradient of linear_attention against the equations in double, on every row of kernels this machine can run.
#include "linear_attention_reference.h"

using namespace linear_test;

namespace {

constexpr Mode kModes[] = {Mode::plain, Mode::logs, Mode::weights};
constexpr Fade kFades[] = {Fade::none, Fade::decay, Fade::gate};

// Gradients of what is divided by the sum of weights are differences of terms of this size, and 0 for a single key.
constexpr double kTerms = 0.5;

void check_gradients(Problem& p, double floor = 1e-6) {
  const Reference<double> exact(p, true);
  const Reference<float> plain(p, true);
  check::for_each_isa([&](const std::string&) {
    p.backward();
    check_budget("dfq", p.s, p.dfq, exact.dfq, plain.dfq, floor, kTerms);
    check_budget("dfk", p.s, p.dfk, exact.dfk, plain.dfk, floor, kTerms);
    check_budget("dv", p.s, p.dv, exact.dv, plain.dv, floor, kTerms);
    if (p.s.mode == Mode::weights)
      check_budget("dkey_log_weight", p.s, p.dweight, exact.dweight, plain.dweight, floor, kTerms);
    if (p.gradients.dgate.defined()) check_budget("dgate", p.s, p.dfade, exact.dfade, plain.dfade, floor, kTerms);
  });
}

void check_problem(const Sizes& sizes) {
  Problem p(sizes);
  check_gradients(p);
}

}  // namespace

TEST(lengths) {
  for (Mode mode : kModes)
    for (bool causal : {false, true})
      for (int64_t n : {1, 63, 64, 65, 257}) check_problem({1, 1, 1, n, n, 12, 9, mode, causal});
  for (Mode mode : kModes)
    for (int64_t n : {1, 7, 70, 130})
      for (int64_t m : {1, 5, 64, 129}) check_problem({1, 1, 1, n, m, 9, 5, mode, true});
  check_problem({1, 1, 1, 1100, 1200, 4, 3, Mode::logs, false});
}

TEST(dims) {
  for (int64_t f : {1, 16, 17, 64, 300})
    for (int64_t e : {1, 17, 33, 64}) check_problem({1, 1, 1, 21, 70, f, e});
  check_problem({1, 1, 1, 70, 70, 5, 512});
}

TEST(gates_and_decays) {
  for (Mode mode : kModes)
    for (Fade fade : {Fade::decay, Fade::gate})
      for (bool masked : {false, true})
        for (int64_t n : {1, 65, 150}) check_problem({2, 2, 1, n, 150, 11, 6, mode, true, fade, masked});
  check_problem({1, 1, 1, 20, 400, 3, 4, Mode::logs, true, Fade::gate});
}

TEST(groups_masks_and_sums) {
  for (Mode mode : kModes)
    for (bool causal : {false, true})
      for (int64_t heads_kv : {1, 2, 6}) check_problem({2, 6, heads_kv, 33, 90, 8, 8, mode, causal, Fade::none, true});
  for (bool causal : {false, true})
    check_problem({1, 2, 1, 80, 90, 8, 8, Mode::plain, causal, Fade::none, true, false});
  for (Fade fade : {Fade::decay, Fade::gate})
    check_problem({1, 2, 1, 80, 90, 8, 8, Mode::plain, true, fade, true, false});
}

TEST(state_in) {
  for (Mode mode : kModes)
    for (Fade fade : kFades)
      for (auto [n, m] : {std::pair{1, 1}, {70, 70}, {100, 30}, {40, 90}, {20, 0}})
        check_problem({1, 2, 1, n, m, 11, 20, mode, true, fade, m > 1, true, true, true});
}

TEST(dtypes) {
  for (DType a : {DType::f32, DType::f16, DType::bf16})
    for (DType b : {DType::f32, DType::f16, DType::bf16}) {
      check_problem({1, 2, 2, 70, 70, 20, 17, Mode::logs, true, Fade::gate, false, true, true, false, a, b});
      check_problem({1, 2, 2, 70, 70, 20, 17, Mode::weights, false, Fade::none, true, true, false, false, a, b});
    }
}

TEST(central_differences) {
  for (Mode mode : kModes)
    for (Fade fade : kFades)
      for (bool state : {false, true}) {
        Problem p({1, 2, 1, 14, 11, 5, 4, mode, true, fade, false, mode != Mode::plain, false, state});
        for (double& g : p.fade.values) g = 0.4 + 0.5 * g;
        for (int64_t i = 0; i < p.fade.view.numel(); ++i) p.fade.set(i, p.fade.values[size_t(i)]);
        const auto loss = [&] {
          const Reference<double> r(p);
          double sum = 0;
          for (size_t i = 0; i < r.out.size(); ++i) sum += r.out[i] * p.dout.values[i];
          return sum;
        };
        std::vector<std::pair<Array*, Array*>> pairs = {{&p.fq, &p.dfq}, {&p.fk, &p.dfk}, {&p.v, &p.dv}};
        if (mode == Mode::weights) pairs.push_back({&p.weight, &p.dweight});
        if (fade != Fade::none) pairs.push_back({&p.fade, &p.dfade});
        check::for_each_isa([&](const std::string&) {
          p.backward();
          for (auto [x, gradient] : pairs) {
            for (size_t i = 0; i < x->values.size(); i += 3) {
              const double kept = x->values[i], step = 1e-5;
              x->values[i] = kept + step;
              const double above = loss();
              x->values[i] = kept - step;
              const double below = loss();
              x->values[i] = kept;
              const double slope = (above - below) / (2 * step);
              CHECK_NEAR(gradient->get(int64_t(i)), slope, 2e-5 * (1 + std::fabs(slope)));
            }
          }
        });
      }
}

TEST(huge_logarithms) {
  const int64_t n = 130, f = 10;
  for (bool causal : {true, false})
    for (Fade fade : kFades)
      for (double level : {-10000.0, -1000.0, 1000.0, 10000.0}) {
        if (!causal && fade != Fade::none) continue;
        Problem p({1, 2, 1, n, n, f, 6, Mode::logs, causal, fade});
        // The gradient of a decay of 0 that hides a key of e^200 is out of the range of float.
        p.gradients.dgate = Tensor();
        std::mt19937 random(3);
        for (int64_t i = 0; i < p.fk.view.numel(); ++i) p.fk.set(i, p.fk.values[size_t(i)] + level);
        for (int64_t i = 0; i < p.fk.view.numel(); i += 1 + int64_t(random() % 300)) p.fk.set(i, level + 200);
        for (int64_t i = 1; i < p.fk.view.numel(); i += 1 + int64_t(random() % 100)) p.fk.set(i, -INFINITY);
        for (int64_t i = 0; i < p.fq.view.numel(); ++i) p.fq.set(i, p.fq.values[size_t(i)] - level / 2);
        check_gradients(p);
      }
}

TEST(a_decay_over_many_chunks) {
  for (Mode mode : {Mode::logs, Mode::weights})
    for (double level : {0.0, -150.0}) {
      Problem p({1, 1, 1, 300, 1200, 4, 3, mode, true, Fade::decay});
      p.set_after_first(level, 0.8);
      check_gradients(p);
    }
}

// Keys that rise or fall by 50 at every step, so that rows and states need shifts of their own; and decays that leave
// 1e-30 of the past, whose own gradient is out of the range of float.
TEST(steep_rises_and_decays) {
  const int64_t n = 100, f = 6;
  for (Mode mode : {Mode::logs, Mode::weights})
    for (Fade fade : kFades)
      for (double step : {50.0, -50.0, 0.0}) {
        Problem p({1, 1, 1, n, n, f, 5, mode, true, fade});
        if (step != 0) p.gradients.dgate = Tensor();
        for (int64_t i = 0; i < n * f && mode == Mode::logs; ++i)
          p.fk.set(i, p.fk.values[size_t(i)] + step * double(i / f));
        for (int64_t m = 0; m < n; ++m) p.weight.set(m, p.weight.values[size_t(m)] + step * double(m));
        for (int64_t m = 0; m < n; ++m) p.fade.set(m, m % 9 == 5 ? 1e-30 : m % 31 == 30 ? 0.0 : 0.999);
        check_gradients(p);
      }
}

TEST(masked_keys_have_no_effect) {
  check::for_each_isa([](const std::string&) {
    for (Mode mode : kModes)
      for (bool causal : {false, true}) {
        const Sizes s = {2, 2, 1, 100, 140, 12, 12, mode, causal, causal ? Fade::gate : Fade::none, true};
        Problem nan(s), zero(s);
        zero.fill_masked(mode == Mode::logs ? 3000 : 7);
        nan.backward(), zero.backward();
        CHECK(same_bits(nan.dfq, zero.dfq) && same_bits(nan.dfk, zero.dfk) && same_bits(nan.dv, zero.dv));
        if (mode == Mode::weights) CHECK(same_bits(nan.dweight, zero.dweight));
        if (causal) CHECK(same_bits(nan.dfade, zero.dfade));
        for (int64_t i = 0; i < nan.dv.view.numel(); ++i)
          if (!nan.keep[size_t(i / (140 * 12) * 140 + i / 12 % 140)]) CHECK(nan.dv.get(i) == 0 && nan.dfk.get(i) == 0);
      }
  });
}

// Gradients of queries depend on no later key, those of keys and values on no earlier query.
TEST(causal_gradients) {
  const int64_t n = 150, f = 20, e = 18;
  for (Mode mode : kModes)
    for (Fade fade : {Fade::none, Fade::gate}) {
      const Sizes s = {1, 1, 1, n, n, f, e, mode, true, fade};
      check::for_each_isa([&](const std::string&) {
        for (int64_t token : {140, 100, 41, 3}) {
          Problem before(s);
          before.fade.set(token, 0.7);
          before.backward();
          for (double change : {1.0, 60.0, 300.0, double(NAN)}) {
            Problem keys(s), queries(s);
            keys.fade.set(token, 0.7), queries.fade.set(token, 0.7);
            for (int64_t i = token * f; i < (token + 1) * f; ++i) {
              keys.fk.set(i, keys.fk.values[size_t(i)] + change);
              queries.fq.set(i, queries.fq.values[size_t(i)] + change);
            }
            for (int64_t i = token * e; i < (token + 1) * e; ++i) {
              keys.v.set(i, keys.v.values[size_t(i)] + change);
              queries.dout.set(i, queries.dout.values[size_t(i)] + change);
            }
            keys.weight.set(token, keys.weight.values[size_t(token)] + change);
            keys.backward(), queries.backward();
            bool same = true;
            for (int64_t i = 0; i < token * f; ++i) same &= keys.dfq.get(i) == before.dfq.get(i);
            for (int64_t i = (token + 1) * f; i < n * f; ++i) same &= queries.dfk.get(i) == before.dfk.get(i);
            for (int64_t i = (token + 1) * e; i < n * e; ++i) same &= queries.dv.get(i) == before.dv.get(i);
            CHECK(same);
            CHECK(!same_bits(keys.dfq, before.dfq) && !same_bits(queries.dfk, before.dfk));
          }
        }
      });
    }
}

TEST(strides_and_threads_do_not_change_bits) {
  check::for_each_isa([](const std::string&) {
    for (Mode mode : kModes)
      for (bool causal : {false, true}) {
        Sizes s = {2, 4, 2, 1100, 210, 20, 12, mode, causal, causal ? Fade::decay : Fade::none, true};
        s.state = causal;
        Problem one(s);
        one.backward(1);
        s.strided = true;
        for (int threads : {1, 2, 3, 16}) {
          Problem other(s);
          other.backward(threads);
          CHECK(same_bits(one.dfq, other.dfq) && same_bits(one.dfk, other.dfk) && same_bits(one.dv, other.dv));
          if (mode == Mode::weights) CHECK(same_bits(one.dweight, other.dweight));
          if (causal) CHECK(same_bits(one.dfade, other.dfade));
        }
      }
  });
}

TEST(empty) {
  check::for_each_isa([](const std::string&) {
    for (bool causal : {false, true}) {
      Problem keyless({1, 2, 1, 5, 0, 4, 3, Mode::logs, causal}), queryless({1, 2, 1, 0, 5, 4, 3, Mode::logs, causal});
      Problem nothing({0, 2, 1, 5, 5, 4, 3, Mode::logs, causal}), headless({1, 0, 1, 5, 5, 4, 3, Mode::logs, causal});
      Problem no_heads({1, 0, 0, 5, 5, 4, 3, Mode::logs, causal});
      for (Problem* p : {&keyless, &queryless, &nothing, &headless, &no_heads}) {
        p->backward();
        for (const Array* x : {&p->dfq, &p->dfk, &p->dv})
          for (int64_t i = 0; i < x->view.numel(); ++i) CHECK(x->get(i) == 0.0f);
      }
    }
  });
}

TEST(errors) {
  Problem p({1, 4, 2, 8, 9, 6, 5}), other({1, 3, 3, 8, 9, 7, 5});
  const Queue queue = Queue::cpu(1);
  const auto with = [&](auto change) {
    LinearAttentionOptions options = p.options;
    LinearAttentionGradients to = p.gradients;
    change(options, to);
    linear_attention_bwd(queue, p.dout.view, p.fq.view, p.fk.view, p.v.view, options, {}, to, {});
  };
  CHECK_THROWS(with([](auto&, auto&) {}), "[linear_attention_bwd] workspace: expected at least ");
  CHECK_THROWS(with([](auto&, auto& to) { to.dv = Tensor(); }),
               "[linear_attention_bwd] dv: expected an array, got none");
  CHECK_THROWS(with([&](auto&, auto& to) { to.dgate = p.dfade.view; }),
               "[linear_attention_bwd] dgate: expected none without gate and decay, got an array");
  CHECK_THROWS(with([&](auto&, auto& to) { to.dkey_log_weight = p.dweight.view; }),
               "[linear_attention_bwd] dkey_log_weight: expected none without key_log_weight, got an array");
  CHECK_THROWS(with([&](auto&, auto& to) { to.dfk = other.dfk.view; }),
               "[linear_attention_bwd] dfk: expected shape [B, H, N, F] = [1, 2, 9, 6], got [1, 3, 9, 7]");
  CHECK_THROWS(with([&](auto&, auto& to) { to.dfk = p.fk.view; }),
               "[linear_attention_bwd] dfk: expected an output that shares no memory");
  p.fade.set(3, 2);
  CHECK_THROWS(with([&](auto& o, auto&) { o.decay = p.fade.view; }),
               "[linear_attention_bwd] decay: expected values in [0, 1], got 2.000000 at [0, 0, 3]");
}
