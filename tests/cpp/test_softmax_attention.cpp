// softmax_attention against its equations in double, on every row of kernels this machine can run.
#include "softmax_attention_reference.h"

using namespace softmax;

namespace {

void check_problem(Problem& p, const std::string& what) {
  const Reference<double> exact(p);
  const Reference<float> plain(p);
  check::for_each_isa([&](const std::string&) {
    p.forward();
    check_budget(what + ": out", p.out, exact.out, plain.out);
    check_budget(what + ": lse", p.lse, exact.lse, plain.lse, 1);
  });
}

void check_sizes(const Sizes& sizes, const std::string& what) {
  Problem p(sizes);
  check_problem(p, what);
}

template <class... Numbers>
std::string named(const char* name, Numbers... numbers) {
  std::string text = name;
  for (int64_t x : {int64_t(numbers)...}) text += " " + std::to_string(x);
  return text;
}

/// The elements [begin, end) of two arrays are the same, and none is NaN.
bool same_part(const Array& a, const Array& b, int64_t begin, int64_t end) {
  bool same = true;
  for (int64_t i = begin; i < end; ++i) same &= a.get(i) == b.get(i);
  return same;
}

std::vector<VisibleRule> some_rules() {
  return {all_keys(),
          causal(70, 150),
          band(20, 7, 0),
          band(-1, 30, 60),
          band(5, -1, -30),
          band(0, 0, 3),
          {Visible::block, false, 0, -1, -1, 32, 1},
          {Visible::block, true, 80, -1, -1, 50, 1},
          {Visible::block, true, -10, -1, -1, 7, 1},
          {Visible::before, false, 0, -1, -1, 16, 2},
          {Visible::before, false, 40, -1, -1, 12, 5},
          {Visible::after, false, 0, -1, -1, 16, 2},
          {Visible::after, false, -5, -1, -1, 9, 4},
          {Visible::cell, false, 0, -1, -1, 1, 3},
          {Visible::cell, false, 0, -1, -1, 1, 1}};
}

}  // namespace

TEST(dims) {
  for (int64_t d : {1, 3, 7, 16, 17, 64, 100})
    for (int64_t e : {1, 3, 7, 16, 17, 64, 100}) check_sizes({1, 1, 1, 21, d, e, {{37}}}, named("dims", d, e));
  check_sizes({1, 1, 1, 9, 512, 512, {{70}}}, "dims 512");
}

TEST(lengths) {
  for (int64_t n : {1, 7, 8, 31, 65, 130})
    for (int64_t m : {1, 5, 16, 63, 64, 65, 129})
      for (const VisibleRule& rule : {all_keys(), causal(n, m)})
        check_sizes({1, 1, 1, n, 16, 8, {{m, rule}}}, named("lengths", n, m, int(rule.kind)));
  check_sizes({1, 1, 1, 600, 8, 8, {{530, causal(600, 530)}}}, "lengths 600 530");
}

TEST(rules) {
  int index = 0;
  for (const VisibleRule& rule : some_rules()) {
    for (bool masked : {false, true})
      check_sizes({1, 2, 1, 70, 9, 20, {{150, rule, 1, true, -0.1}}, masked}, named("rules", index, masked));
    ++index;
  }
}

TEST(three_sweeps) {
  const std::vector<VisibleRule> rules = some_rules();
  for (size_t i = 0; i < rules.size(); ++i) {
    const SweepSizes first = {75, rules[i], 2, i % 2 == 0, -0.2}, second = {33, rules[(i + 4) % rules.size()]};
    const SweepSizes third = {140, rules[(i + 9) % rules.size()], 1, false, 0.05};
    check_sizes({2, 2, 1, 40, 12, 17, {first, second}, i % 3 == 0}, named("two sweeps", i));
    check_sizes({2, 2, 1, 40, 12, 17, {third, first, second}, i % 3 == 1}, named("three sweeps", i));
  }
}

TEST(groups_and_bias_heads) {
  for (int64_t heads_kv : {1, 2, 6})
    for (int64_t bias_heads : {int64_t(0), int64_t(1), heads_kv, int64_t(6)})
      for (bool masked : {false, true})
        check_sizes({2, 6, heads_kv, 33, 8, 20, {{75, causal(33, 75), bias_heads}}, masked},
                    named("groups", heads_kv, bias_heads, masked));
}

TEST(dtypes) {
  const DType f32 = DType::f32, f16 = DType::f16, bf16 = DType::bf16;
  for (DType q : {f32, f16, bf16})
    for (DType k : {f32, f16, bf16})
      for (DType v : {f32, f16, bf16})
        for (DType out : {f32, f16, bf16})
          check_sizes({1,
                       2,
                       1,
                       19,
                       24,
                       17,
                       {{70, causal(19, 70), 0, false, -0.1}},
                       k == v,
                       q == v ? Layout::loose : Layout::dense,
                       q,
                       k,
                       v,
                       out},
                      named("dtypes", int(q), int(k), int(v), int(out)));
}

// Values of one row as the only keys: the softmax of one logit is 1, whatever the logit.
TEST(one_key) {
  for (double spread : {1e-30, 1.0, 1e18}) {
    Problem p({1, 1, 1, 5, 3, 4, {{1}}});
    for (int64_t i = 0; i < p.q.size(); ++i) p.q.set(i, p.q.values[size_t(i)] * spread);
    check::for_each_isa([&](const std::string&) {
      p.forward();
      for (int64_t i = 0; i < p.out.size(); ++i) {
        const double value = p.sweeps[0].v.values[size_t(i % 4)];
        CHECK_NEAR(p.out.get(i), value, 0x1p-23 * std::fabs(value));
      }
    });
  }
}

// Logits from where exponentials change to where f32 ends; with ties, and signs so that all of a row may be negative.
TEST(huge_norms) {
  for (double spread : {3.0, 30.0, 100.0, 300.0, 1e4, 1e9, 3e18}) {
    for (int sign : {0, 1, -1}) {
      Sizes sizes = {1, 1, 1, 40, 8, 6, {{200, all_keys(), 0, true}, {50, causal(40, 50)}}};
      sizes.spread = spread;
      Problem p(sizes);
      for (int64_t i = 0; i < p.q.size() && sign; ++i) p.q.set(i, std::fabs(p.q.values[size_t(i)]));
      for (Sweep& w : p.sweeps)
        for (int64_t i = 0; i < w.k.size() && sign; ++i) w.k.set(i, sign * std::fabs(w.k.values[size_t(i)]));
      // The first and the last keys again somewhere else.
      for (int64_t c = 0; c < 8; ++c) p.sweeps[0].k.set(100 * 8 + c, p.sweeps[0].k.values[size_t(c)]);
      for (int64_t c = 0; c < 8; ++c) p.sweeps[1].k.set(c, p.sweeps[0].k.values[size_t(199 * 8 + c)]);
      check_problem(p, named("huge norms", int64_t(spread), sign));
    }
  }
}

// A maximum that grows from tile to tile, in small and in huge steps, over both signs.
TEST(growing_logits) {
  for (double step : {0.01, 1.0, 7.0, 100.0, 3e4, 1e35}) {
    for (double start : {-2.0, -0.5, 0.0}) {
      Problem p({1, 1, 1, 3, 1, 2, {{1000, all_keys(), 1}}});
      for (int64_t m = 0; m < 1000; ++m) p.sweeps[0].key_bias.set(m, (start * 500 + double(m)) * step);
      check_problem(p, named("growing", int64_t(step * 100), int64_t(start * 10)));
      for (int64_t m = 0; m < 1000; ++m) p.sweeps[0].key_bias.set(m, (start * 500 + double(999 - m)) * step);
      check_problem(p, named("shrinking", int64_t(step * 100), int64_t(start * 10)));
    }
  }
}

// Values at the ends of f32 and lengthy sums of them: weights are at most 1, and their sum is a mean.
TEST(huge_values) {
  for (double size : {1e34, 1e-30}) {
    Problem p({1, 1, 1, 9, 4, 5, {{1500}}});
    for (int64_t i = 0; i < p.sweeps[0].v.size(); ++i) p.sweeps[0].v.set(i, p.sweeps[0].v.values[size_t(i)] * size);
    check_problem(p, "huge values");
  }
}

TEST(large_norm_bias) {
  Sizes sizes = {1, 1, 1, 20, 16, 6, {{130, all_keys(), 0, false, -0.125}}};
  for (double spread : {10.0, 100.0, 1e15}) {
    sizes.spread = spread;
    check_sizes(sizes, named("norm bias", int64_t(spread)));
  }
}

TEST(masked_tokens_have_no_effect) {
  check::for_each_isa([](const std::string&) {
    const Sizes s = {2, 2, 1, 50, 12, 12, {{140, causal(50, 140), 1, true, -0.1}, {30}}, true};
    Problem nan(s), zero(s), infinite(s);
    zero.fill_masked(0), infinite.fill_masked(INFINITY);
    for (Problem* p : {&nan, &zero, &infinite}) p->forward();
    for (Problem* p : {&nan, &infinite}) CHECK(same_bits(p->out, zero.out) && same_bits(p->lse, zero.lse));
    for (int64_t i = 0; i < nan.lse.size(); ++i)
      if (!nan.keep[size_t(i / 100 * 50 + i % 50)]) CHECK(nan.lse.get(i) == -kInfinity && nan.out.get(i * 12) == 0.0f);
  });
}

TEST(keys_of_bias_minus_infinity_have_no_effect) {
  check::for_each_isa([](const std::string&) {
    const Sizes s = {1, 2, 1, 20, 6, 6, {{140, all_keys(), 2, false, -0.1}}};
    Problem nan(s), zero(s);
    for (Problem* p : {&nan, &zero}) {
      Sweep& w = p->sweeps[0];
      for (int64_t m : {0, 3, 64, 139}) {
        for (int64_t h : {0, 1}) w.key_bias.set(h * 140 + m, -kInfinity);
        set_row(w.k, m, p == &nan ? NAN : 0), set_row(w.v, m, p == &nan ? NAN : 0);
      }
      p->forward();
    }
    CHECK(same_bits(nan.out, zero.out) && same_bits(nan.lse, zero.lse));
  });
}

TEST(rows_that_see_nothing) {
  for (bool by_bias : {false, true}) {
    Problem p({1, 2, 1, 20, 6, 5, {{100, all_keys(), 1, true}, {70, all_keys(), 0, true}}});
    for (Sweep& w : p.sweeps) {
      for (int64_t m = 0; m < w.s.m; ++m) {
        if (by_bias && w.s.bias_heads) w.key_bias.set(m, -kInfinity);
        for (int64_t n : {0, 7, 8, 19})
          if (n < 19 || m < 60) w.pair_bias.set(n * w.s.m + m, -kInfinity);
      }
    }
    check_problem(p, "rows that see nothing");
    for (int64_t n : {0, 7, 8}) CHECK(p.lse.get(n) == -kInfinity && p.out.get(n * 5) == 0.0f);
    CHECK(p.lse.get(19) > -kInfinity);
  }
}

TEST(nan_and_infinity_reach_the_rows_that_see_them) {
  for (double bad : {double(NAN), kInfinity, -kInfinity}) {
    for (int64_t token : {0, 17, 63, 64, 149}) {
      for (const VisibleRule& rule : {all_keys(), causal(80, 150), band(9, 3, 40)}) {
        Problem keys({1, 1, 1, 80, 6, 5, {{150, rule, 0, false, -0.1}}}), values(keys.s), pairs(keys.s);
        keys.sweeps[0].k.set(token * 6 + 2, bad);
        check_problem(keys, named("key", token, int(rule.kind)));
        values.sweeps[0].v.set(token * 5 + 3, bad);
        check_problem(values, named("value", token, int(rule.kind)));
        if (token < 80) pairs.q.set(token * 6 + 1, bad);
        check_problem(pairs, named("query", token, int(rule.kind)));
      }
    }
  }
}

TEST(rows_depend_on_no_token_they_do_not_see) {
  check::for_each_isa([](const std::string&) {
    for (double changed : {3.0, double(NAN), kInfinity}) {
      for (int64_t token : {83, 41, 8}) {
        const Sizes s = {1, 1, 1, 90, 10, 10, {{90, causal(90, 90), 1, true, -0.1}}};
        Problem before(s), after(s);
        Sweep& w = after.sweeps[0];
        set_row(w.k, token, changed), set_row(w.v, token, changed), w.key_bias.set(token, changed);
        for (int64_t n = 0; n < 90; ++n) w.pair_bias.set(n * 90 + token, n < token ? changed : 0);
        for (Problem* p : {&before, &after}) p->sweeps[0].key_bias.set(token, p == &after ? changed : 0), p->forward();
        CHECK(same_part(before.out, after.out, 0, token * 10));
        CHECK(same_part(before.lse, after.lse, 0, token));
        for (int64_t n = token; n < 90; ++n) CHECK(!same_part(before.out, after.out, n * 10, n * 10 + 10));
      }
    }
  });
}

TEST(a_query_alone_gives_the_same_bits) {
  check::for_each_isa([](const std::string&) {
    for (const VisibleRule& rule : some_rules()) {
      if (rule.kind == Visible::cell) continue;
      for (bool bad : {false, true}) {
        Problem p({1, 1, 1, 70, 10, 12, {{40, all_keys(), 0, false, -0.1}, {150, rule, 1, true}}});
        // The second sweep's values hold NaN that some rows see; the others go their own way round it.
        if (bad) p.sweeps[1].v.set(75 * 12 + 1, NAN);
        p.forward();
        for (int64_t n : {0, 3, 8, 33, 69}) {
          Array out({1, 1, 1, 12}, DType::f32), lse({1, 1, 1}, DType::f32);
          SoftmaxAttentionArgs a = p.args();
          a.seq_q = 1, a.out = core::operand(out.view), a.lse = core::operand(lse.view);
          a.q.data = static_cast<float*>(a.q.data) + n * a.q.stride[2];
          for (SoftmaxSweep& sweep : a.sweeps) {
            sweep.rule.offset += n;
            if (Operand& b = sweep.pair_bias; b.data) b.data = static_cast<float*>(b.data) + n * b.stride[2];
          }
          Problem::launch(a, 1);
          bool same = float_to_bits(lse.get(0)) == float_to_bits(p.lse.get(n));
          for (int64_t c = 0; c < 12; ++c) {
            const float alone = out.get(c), among = p.out.get(n * 12 + c);
            same &= float_to_bits(alone) == float_to_bits(among) || (std::isnan(alone) && std::isnan(among));
          }
          CHECK(same);
        }
      }
    }
  });
}

TEST(out_or_lse_alone) {
  check::for_each_isa([](const std::string&) {
    const Sizes s = {2, 2, 1, 30, 10, 12, {{100, causal(30, 100), 1, false, -0.1}, {9}}, true};
    Problem both(s), out(s), lse(s);
    both.forward(), out.forward(2, true, false), lse.forward(2, false, true);
    CHECK(same_bits(both.out, out.out) && same_bits(both.lse, lse.lse));
    CHECK(std::isnan(out.lse.get(0)) && std::isnan(lse.out.get(0)));
  });
}

TEST(strides_and_threads_do_not_change_bits) {
  check::for_each_isa([](const std::string&) {
    for (const VisibleRule& rule : {all_keys(), causal(300, 210), some_rules()[7]}) {
      Sizes s = {2, 4, 2, 300, 20, 12, {{210, rule, 2, true, -0.1}, {70, all_keys(), 4}}, true};
      Problem one(s);
      one.forward(1);
      s.layout = Layout::loose;
      for (int threads : {1, 2, 3, 16}) {
        Problem other(s);
        other.forward(threads);
        CHECK(same_bits(one.out, other.out) && same_bits(one.lse, other.lse));
      }
    }
  });
}

TEST(strides_of_zero_and_below) {
  check::for_each_isa([](const std::string&) {
    Problem p({1, 2, 2, 20, 5, 6, {{30}}});
    SoftmaxAttentionArgs a = p.args();
    // One key head for both, and the queries backwards.
    a.sweeps[0].k.stride[1] = 0;
    a.q.data = static_cast<float*>(a.q.data) + 19 * a.q.stride[2], a.q.stride[2] = -a.q.stride[2];
    Problem::launch(a, 1);
    Problem q({1, 2, 2, 20, 5, 6, {{30}}});
    for (int64_t i = 0; i < q.q.size(); ++i)
      q.q.set(i, p.q.values[size_t(i / 100 * 100 + (19 - i / 5 % 20) * 5 + i % 5)]);
    for (int64_t i = 0; i < 150; ++i) q.sweeps[0].k.set(150 + i, p.sweeps[0].k.values[size_t(i)]);
    q.forward();
    CHECK(same_bits(p.out, q.out) && same_bits(p.lse, q.lse));
  });
}

TEST(empty) {
  check::for_each_isa([](const std::string&) {
    Problem keyless({1, 2, 1, 5, 4, 3, {{0}}}), sweepless({1, 2, 1, 5, 4, 3, {}});
    Problem partly({1, 2, 1, 5, 4, 3, {{0}, {7}, {0}}}), whole({1, 2, 1, 5, 4, 3, {{7}}});
    for (Problem* p : {&keyless, &sweepless}) {
      p->forward();
      for (int64_t i = 0; i < 30; ++i) CHECK(p->out.get(i) == 0.0f && p->lse.get(i / 3) == -kInfinity);
    }
    partly.forward(), whole.forward();
    CHECK(same_bits(partly.out, whole.out));
    Problem queryless({1, 2, 1, 0, 4, 3, {{5}}}), nothing({0, 2, 1, 5, 4, 3, {{5}}}),
        headless({1, 0, 1, 5, 4, 3, {{5}}});
    Problem none({1, 0, 0, 5, 4, 3, {{5}}});
    for (Problem* p : {&queryless, &nothing, &headless, &none}) p->forward();
  });
}

TEST(public_function) {
  Problem p({2, 4, 2, 40, 12, 9, {{60, causal(40, 60), 2, true, -0.1}}, true});
  const Reference<double> exact(p);
  const Reference<float> plain(p);
  Sweep& w = p.sweeps[0];
  SoftmaxAttentionOptions options;
  options.key_bias = w.key_bias.view, options.pair_bias = w.pair_bias.view;
  options.key_norm_bias = -0.1, options.is_causal = true;
  options.key_mask = make_tensor(reinterpret_cast<const bool*>(w.keep.data()), {2, 60});
  options.query_mask = make_tensor(reinterpret_cast<const bool*>(p.keep.data()), {2, 40});
  check::for_each_isa([&](const std::string&) {
    const Queue queue = Queue::cpu(2);
    const int64_t bytes =
        softmax_attention_workspace_bytes(queue, p.q.view, w.k.view, w.v.view, options, p.out.view, p.lse.view);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    softmax_attention(queue, p.q.view, w.k.view, w.v.view, options, p.out.view, p.lse.view, {workspace.data(), bytes});
    check_budget("public out", p.out, exact.out, plain.out);
    check_budget("public lse", p.lse, exact.lse, plain.lse, 1);
  });
}
