// The gradient of softmax_attention against its equations in double, on every row of kernels this machine can run.
#include "softmax_attention_bwd_reference.h"

using namespace softmax;

namespace {

void check_problem(Problem& p, const std::string& what, const Choice& choice = {}) {
  const Answers answers(p);
  check::for_each_isa([&](const std::string&) {
    // One thread owns whole heads; with many, queries and keys go to tasks of their own.
    for (int threads : {1, 16}) {
      backward(p, choice, threads);
      answers.compare(what, p);
    }
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

bool same_gradients(Problem& a, Problem& b) {
  const std::vector<Array*> left = gradients_of(a), right = gradients_of(b);
  bool same = true;
  for (size_t i = 0; i < left.size(); ++i) same &= same_bits(*left[i], *right[i]);
  return same;
}

bool is_zero(const Array& a) {
  bool zero = true;
  for (int64_t i = 0; i < a.size(); ++i) zero &= a.get(i) == 0.0f;
  return zero;
}

bool is_zero_row(const Array& a, int64_t row) {
  const int64_t dim = a.view.shape[a.view.rank - 1];
  bool zero = true;
  for (int64_t c = 0; c < dim; ++c) zero &= a.get(row * dim + c) == 0.0f;
  return zero;
}

}  // namespace

TEST(dims) {
  for (int64_t d : {1, 3, 16, 17, 64, 100})
    for (int64_t e : {1, 7, 16, 33, 64}) check_sizes({1, 1, 1, 21, d, e, {{37}}}, named("dims", d, e));
  check_sizes({1, 1, 1, 9, 512, 512, {{70}}}, "dims 512");
}

TEST(lengths) {
  for (int64_t n : {1, 7, 8, 31, 65, 130})
    for (int64_t m : {1, 5, 63, 64, 65, 129})
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
        check_sizes({2, 6, heads_kv, 33, 8, 20, {{75, causal(33, 75), bias_heads, false, 0.1}}, masked},
                    named("groups", heads_kv, bias_heads, masked));
}

TEST(dtypes) {
  const DType f32 = DType::f32, f16 = DType::f16, bf16 = DType::bf16;
  for (DType q : {f32, f16, bf16})
    for (DType k : {f32, f16, bf16})
      for (DType v : {f32, f16, bf16})
        for (DType out : {f32, bf16})
          check_sizes(
              {1, 2, 1, 19, 24, 17, {{70, causal(19, 70), 0, false, -0.1}}, k == v, Layout::dense, q, k, v, out},
              named("dtypes", int(q), int(k), int(v), int(out)));
}

TEST(out_may_be_rounded) {
  check::for_each_isa([](const std::string&) {
    Sizes s = {1, 2, 1, 19, 8, 17, {{70}}};
    s.out = DType::bf16;
    Problem p(s);
    p.forward();
    Array out({1, 2, 19, 17}, DType::f32), dq({1, 2, 19, 8}, DType::f32);
    for (int64_t i = 0; i < out.size(); ++i) out.set(i, p.out.get(i));
    SoftmaxAttentionArgs a = p.args();
    a.dout = core::operand(p.dout.view), a.dq = core::operand(p.dq.view);
    launch_bwd(a, 1);
    a.out = core::operand(out.view), a.dq = core::operand(dq.view);
    launch_bwd(a, 1);
    CHECK(same_bits(p.dq, dq) && !std::isnan(dq.get(0)));
  });
}

TEST(either_cotangent_alone) {
  const Sizes sizes = {2, 4, 2, 40, 12, 9, {{70, causal(40, 70), 2, true, -0.1}, {20}}, true};
  Problem by_out(sizes), by_lse(sizes);
  for (int64_t i = 0; i < by_out.dlse.size(); ++i) by_out.dlse.set(i, 0);
  for (int64_t i = 0; i < by_lse.dout.size(); ++i) by_lse.dout.set(i, 0);
  Choice choice;
  choice.dlse = false;
  check_problem(by_out, "dout alone", choice);
  choice.dlse = true, choice.dout = false;
  check_problem(by_lse, "dlse alone", choice);
  CHECK(is_zero(by_lse.sweeps[0].dv) && !is_zero(by_lse.sweeps[0].dk));
}

TEST(every_gradient_may_be_left_out) {
  check::for_each_isa([](const std::string&) {
    const Sizes s = {2, 4, 2, 70, 12, 9, {{130, causal(70, 130), 1, true, -0.1}, {20}}, true};
    Problem all(s);
    backward(all);
    for (int threads : {1, 16}) {
      for (int chosen = 0; chosen < 32; ++chosen) {
        const Choice choice = {true, true, !(chosen & 1), !(chosen & 2), !(chosen & 4), !(chosen & 8), !(chosen & 16)};
        Problem some(s);
        backward(some, choice, threads);
        bool same = choice.dq ? same_bits(some.dq, all.dq) : std::isnan(some.dq.get(0));
        for (size_t i = 0; i < 2; ++i) {
          const Sweep &a = some.sweeps[i], &b = all.sweeps[i];
          same &= choice.dk ? same_bits(a.dk, b.dk) : std::isnan(a.dk.get(0));
          same &= choice.dv ? same_bits(a.dv, b.dv) : std::isnan(a.dv.get(0));
          if (i == 1) continue;
          same &= choice.dkey_bias ? same_bits(a.dkey_bias, b.dkey_bias) : std::isnan(a.dkey_bias.get(0));
          same &= choice.dpair_bias ? same_bits(a.dpair_bias, b.dpair_bias) : std::isnan(a.dpair_bias.get(0));
        }
        CHECK(same);
      }
    }
  });
}

TEST(masked_tokens_have_no_effect) {
  check::for_each_isa([](const std::string&) {
    const Sizes s = {2, 2, 1, 70, 12, 12, {{140, causal(70, 140), 1, true, -0.1}, {30}}, true};
    Problem nan(s), zero(s), infinite(s);
    zero.fill_masked(0), infinite.fill_masked(INFINITY);
    for (Problem* p : {&nan, &zero, &infinite}) {
      for (int64_t i = 0; i < p->dlse.size(); ++i)
        if (!p->keep[size_t(i / 140 * 70 + i % 70)]) p->dlse.set(i, p == &zero ? 0 : NAN);
      backward(*p);
    }
    CHECK(same_gradients(nan, zero) && same_gradients(infinite, zero));
    for (int64_t i = 0; i < 2 * 2 * 70; ++i)
      if (!nan.keep[size_t(i / 140 * 70 + i % 70)]) CHECK(is_zero_row(nan.dq, i));
    for (int64_t i = 0; i < 2 * 140; ++i)
      if (!nan.sweeps[0].keep[size_t(i)]) CHECK(is_zero_row(nan.sweeps[0].dk, i) && is_zero_row(nan.sweeps[0].dv, i));
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
      backward(*p);
    }
    CHECK(same_gradients(nan, zero));
    for (int64_t m : {0, 3, 64, 139}) CHECK(is_zero_row(nan.sweeps[0].dk, m));
  });
}

// Such rows have lse = -inf, whose cotangent is nobody's business.
TEST(rows_that_see_nothing) {
  for (bool by_bias : {false, true}) {
    Problem p({1, 2, 1, 20, 6, 5, {{100, all_keys(), 1, true}, {70, all_keys(), 0, true}}});
    for (Sweep& w : p.sweeps) {
      for (int64_t m = 0; m < w.s.m; ++m) {
        if (by_bias && w.s.bias_heads) w.key_bias.set(m, -kInfinity);
        for (int64_t n : {0, 7, 8}) w.pair_bias.set(n * w.s.m + m, -kInfinity);
      }
    }
    for (int64_t n : {0, 7, 8}) p.dlse.set(n, NAN);
    check_problem(p, "rows that see nothing");
    for (int64_t n : {0, 7, 8}) CHECK(is_zero_row(p.dq, n));
  }
}

TEST(queries_depend_on_no_key_that_they_do_not_see) {
  check::for_each_isa([](const std::string&) {
    for (double changed : {3.0, double(NAN), kInfinity}) {
      for (int64_t token : {83, 64, 41, 8}) {
        const Sizes s = {1, 1, 1, 90, 10, 10, {{90, causal(90, 90), 1, true, -0.1}}};
        Problem before(s), after(s);
        Sweep& w = after.sweeps[0];
        for (int64_t n = token; n < 90; ++n)
          set_row(w.k, n, changed), set_row(w.v, n, changed), w.key_bias.set(n, changed);
        for (Problem* p : {&before, &after}) backward(*p);
        bool same = true;
        for (int64_t i = 0; i < token * 10; ++i) same &= before.dq.get(i) == after.dq.get(i);
        for (int64_t i = 0; i < token * 90; ++i)
          same &= before.sweeps[0].dpair_bias.get(i) == after.sweeps[0].dpair_bias.get(i);
        CHECK(same);
        CHECK(before.dq.get(token * 10) != after.dq.get(token * 10));
      }
    }
  });
}

TEST(keys_depend_on_no_query_that_does_not_see_them) {
  check::for_each_isa([](const std::string&) {
    for (double changed : {3.0, double(NAN), kInfinity}) {
      for (int64_t token : {0, 41, 64, 89}) {
        const Sizes s = {1, 1, 1, 90, 10, 10, {{90, band(2, 1, 0), 1, true, -0.1}}};
        Problem before(s), after(s);
        set_row(after.q, token, changed), set_row(after.dout, token, changed);
        for (Problem* p : {&before, &after}) backward(*p);
        const Sweep &a = before.sweeps[0], &b = after.sweeps[0];
        bool same = true, differs = false;
        for (int64_t m = 0; m < 90; ++m) {
          const bool seen = m >= token - 2 && m <= token + 1;
          bool equal = float_to_bits(a.dkey_bias.get(m)) == float_to_bits(b.dkey_bias.get(m));
          for (int64_t c = m * 10; c < m * 10 + 10; ++c)
            equal &= a.dk.get(c) == b.dk.get(c) && a.dv.get(c) == b.dv.get(c);
          same &= equal || seen, differs |= !equal && seen;
        }
        for (int64_t n = 0; n < 90; ++n)
          for (int64_t c = n * 10; c < n * 10 + 10; ++c) same &= n == token || before.dq.get(c) == after.dq.get(c);
        CHECK(same && differs);
      }
    }
  });
}

TEST(large_norms) {
  for (double spread : {1e-20, 3.0, 10.0, 30.0}) {
    Sizes sizes = {1, 1, 1, 40, 8, 6, {{200, all_keys(), 0, true, -0.125}, {50, causal(40, 50)}}};
    sizes.spread = spread;
    check_sizes(sizes, named("large norms", int64_t(spread)));
  }
}

TEST(strides_and_threads_do_not_change_bits) {
  check::for_each_isa([](const std::string&) {
    for (const VisibleRule& rule : {all_keys(), causal(300, 210), some_rules()[7]}) {
      Sizes s = {2, 4, 2, 300, 20, 12, {{310, rule, 2, true, -0.1}, {70, all_keys(), 1}}, true};
      Problem one(s);
      backward(one, {}, 1);
      s.layout = Layout::loose;
      for (int threads : {1, 2, 3, 16}) {
        Problem other(s);
        backward(other, {}, threads);
        CHECK(same_gradients(one, other));
      }
    }
  });
}

TEST(central_differences) {
  Problem p({1, 2, 1, 11, 7, 5, {{14, causal(11, 14), 2, true, -0.2}, {6, all_keys(), 1}}});
  const auto loss = [&] {
    const Reference<double> r(p);
    double sum = 0;
    for (size_t i = 0; i < r.out.size(); ++i) sum += r.out[i] * p.dout.values[i];
    for (size_t i = 0; i < r.lse.size(); ++i) sum += r.lse[i] * p.dlse.values[i];
    return sum;
  };
  std::vector<std::pair<Array*, Array*>> pairs = {{&p.q, &p.dq}};
  for (Sweep& w : p.sweeps)
    for (auto pair :
         {std::pair{&w.k, &w.dk}, {&w.v, &w.dv}, {&w.key_bias, &w.dkey_bias}, {&w.pair_bias, &w.dpair_bias}})
      pairs.push_back(pair);
  check::for_each_isa([&](const std::string&) {
    backward(p);
    for (auto [x, gradient] : pairs) {
      for (size_t i = 0; i < x->values.size(); i += 3) {
        const double kept = x->values[i], step = 1e-5;
        if (kept == -kInfinity) continue;
        x->values[i] = kept + step;
        const double above = loss();
        x->values[i] = kept - step;
        const double below = loss();
        x->values[i] = kept;
        CHECK_NEAR(gradient->get(int64_t(i)), (above - below) / (2 * step), 2e-5);
      }
    }
  });
}

TEST(empty) {
  check::for_each_isa([](const std::string&) {
    Problem keyless({1, 2, 1, 5, 4, 3, {{0}}}), sweepless({1, 2, 1, 5, 4, 3, {}}), nothing({0, 2, 1, 5, 4, 3, {{5}}});
    Problem queryless({1, 2, 1, 0, 4, 3, {{5, all_keys(), 2, true}}}), none({1, 0, 0, 5, 4, 3, {{5}}});
    Problem headless({1, 0, 1, 5, 4, 3, {{5}}});
    for (int threads : {1, 16})
      for (Problem* p : {&keyless, &sweepless, &queryless, &nothing, &none, &headless}) {
        backward(*p, {}, threads);
        for (Array* gradient : gradients_of(*p)) CHECK(is_zero(*gradient));
      }
    Problem partly({1, 2, 1, 5, 4, 3, {{0}, {7}, {0}}}), whole({1, 2, 1, 5, 4, 3, {{7}}});
    backward(partly), backward(whole);
    CHECK(same_bits(partly.dq, whole.dq) && same_bits(partly.sweeps[1].dk, whole.sweeps[0].dk));
  });
}

TEST(public_function) {
  Problem p({2, 4, 2, 40, 12, 9, {{60, band(30, 0, 20), 2, true, -0.1}}, true});
  const Answers answers(p);
  Sweep& w = p.sweeps[0];
  SoftmaxAttentionOptions options;
  options.key_bias = w.key_bias.view, options.pair_bias = w.pair_bias.view;
  options.key_norm_bias = -0.1, options.is_causal = true, options.window_left = 30, options.window_right = 5;
  options.key_mask = make_tensor(reinterpret_cast<const bool*>(w.keep.data()), {2, 60});
  options.query_mask = make_tensor(reinterpret_cast<const bool*>(p.keep.data()), {2, 40});
  const SoftmaxAttentionGradients gradients = {p.dq.view, w.dk.view, w.dv.view, w.dkey_bias.view, w.dpair_bias.view};
  check::for_each_isa([&](const std::string&) {
    const Queue queue = Queue::cpu(2);
    p.forward();
    // What is left out is formed again.
    for (const ConstTensor& out : {ConstTensor(p.out.view), ConstTensor()}) {
      for (const ConstTensor& lse : {ConstTensor(p.lse.view), ConstTensor()}) {
        for (Array* gradient : gradients_of(p)) std::fill(gradient->bytes.begin(), gradient->bytes.end(), 0xff);
        const int64_t bytes = softmax_attention_bwd_workspace_bytes(queue, p.dout.view, p.dlse.view, p.q.view, w.k.view,
                                                                    w.v.view, options, out, lse, gradients);
        std::vector<char> workspace(size_t(bytes), char(0xff));
        softmax_attention_bwd(queue, p.dout.view, p.dlse.view, p.q.view, w.k.view, w.v.view, options, out, lse,
                              gradients, {workspace.data(), bytes});
        answers.compare("public", p);
      }
    }
  });
}

TEST(windows_scale_and_no_values) {
  for (int64_t left : {int64_t(-1), int64_t(0), int64_t(7), INT64_MAX}) {
    for (int64_t right : {int64_t(-1), int64_t(0), int64_t(3), INT64_MAX}) {
      for (bool is_causal : {false, true}) {
        const int64_t bound = is_causal ? 0 : right;
        Problem p({1, 2, 1, 20, 6, 5, {{33, band(left > 99 ? 99 : left, bound > 99 ? 99 : bound, 13)}}});
        p.scale = 0.7f;
        for (int64_t i = 0; i < p.dout.size(); ++i) p.dout.set(i, 0);
        const Answers answers(p);
        Sweep& w = p.sweeps[0];
        SoftmaxAttentionOptions options;
        options.scale = 0.7, options.is_causal = is_causal;
        options.window_left = left, options.window_right = right;
        const SoftmaxAttentionGradients gradients = {p.dq.view, w.dk.view, {}, {}, {}};
        const Queue queue = Queue::cpu(2);
        const int64_t bytes = softmax_attention_bwd_workspace_bytes(queue, {}, p.dlse.view, p.q.view, w.k.view, {},
                                                                    options, {}, {}, gradients);
        std::vector<char> workspace(size_t(bytes), char(0xff));
        softmax_attention_bwd(queue, {}, p.dlse.view, p.q.view, w.k.view, {}, options, {}, {}, gradients,
                              {workspace.data(), bytes});
        std::fill(w.dv.bytes.begin(), w.dv.bytes.end(), 0);
        answers.compare(named("window", left, right, is_causal), p);
      }
    }
  }
}
