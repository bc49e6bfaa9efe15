// linear_attention against the equations in double, on every row of kernels this machine can run.
#include "linear_attention_reference.h"
#include "subquad/error.h"

using namespace linear_test;

namespace {

void check_problem(const Sizes& sizes, double floor = 1e-6) {
  Problem p(sizes);
  const Reference<double> exact(p);
  const Reference<float> plain(p);
  check::for_each_isa([&](const std::string&) {
    p.forward();
    check_budget("out", p.s, p.out, exact.out, plain.out, floor);
  });
}

constexpr Mode kModes[] = {Mode::plain, Mode::logs, Mode::weights};
constexpr Fade kFades[] = {Fade::none, Fade::decay, Fade::gate};

}  // namespace

TEST(lengths) {
  for (Mode mode : kModes)
    for (bool causal : {false, true})
      for (int64_t n : {1, 63, 64, 65, 257}) check_problem({1, 1, 1, n, n, 12, 9, mode, causal});
  for (Mode mode : kModes)
    for (int64_t n : {1, 7, 70, 130})
      for (int64_t m : {1, 5, 64, 129}) check_problem({1, 1, 1, n, m, 9, 5, mode, true});
  check_problem({1, 1, 1, 90, 2500, 8, 5, Mode::logs, false});
  check_problem({1, 1, 1, 90, 2500, 8, 5, Mode::weights, false});
}

TEST(dims) {
  for (int64_t f : {1, 7, 16, 17, 64, 300})
    for (int64_t e : {1, 8, 17, 33, 64}) check_problem({1, 1, 1, 21, 70, f, e});
  check_problem({1, 1, 1, 5, 66, 8192, 3});
  check_problem({1, 1, 1, 70, 70, 5, 512});
}

TEST(gates_and_decays) {
  for (Mode mode : kModes)
    for (Fade fade : {Fade::decay, Fade::gate})
      for (bool masked : {false, true})
        for (int64_t n : {1, 65, 150}) check_problem({2, 2, 1, n, 150, 11, 6, mode, true, fade, masked});
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
      check_problem({1, 2, 2, 70, 70, 20, 17, Mode::plain, false, Fade::none, true, true, false, false, a, b});
    }
}

// One call, and two with the state handed on, in place.
TEST(a_call_cut_in_two) {
  const int64_t n = 140, f = 9, e = 5;
  for (Mode mode : kModes)
    for (Fade fade : kFades)
      for (int64_t cut : {1, 63, 64, 65, 139}) {
        Problem p({1, 1, 1, n, n, f, e, mode, true, fade, false, true, false, false, DType::f32, DType::f32, 3});
        const Reference<double> exact(p);
        const Reference<float> plain(p);
        const auto part = [&](ConstTensor t, int axis, int64_t from, int64_t to) {
          if (!t.defined()) return t;
          t.data = static_cast<const float*>(t.data) + from * t.stride[axis], t.shape[axis] = to - from;
          return t;
        };
        const Queue queue = Queue::cpu(2);
        check::for_each_isa([&](const std::string&) {
          for (int64_t from : {int64_t(0), cut}) {
            const int64_t to = from ? n : cut;
            LinearAttentionOptions o = p.options;
            o.gate = part(o.gate, 2, from, to), o.decay = part(o.decay, 2, from, to);
            o.key_log_weight = part(o.key_log_weight, 2, from, to);
            const ConstTensor fq = part(p.fq.view, 2, from, to), fk = part(p.fk.view, 2, from, to);
            const ConstTensor v = part(p.v.view, 2, from, to);
            Tensor out;
            static_cast<ConstTensor&>(out) = part(p.out.view, 2, from, to);
            const LinearAttentionState before = from ? p.new_state : LinearAttentionState();
            std::vector<char> space(
                size_t(linear_attention_workspace_bytes(queue, fq, fk, v, o, before, out, p.new_state)));
            linear_attention(queue, fq, fk, v, o, before, out, p.new_state, {space.data(), int64_t(space.size())});
          }
          check_budget("out", p.s, p.out, exact.out, plain.out);
        });
      }
}

TEST(the_state_that_goes_out) {
  const int64_t m = 130, f = 7, e = 6;
  for (Fade fade : kFades) {
    Problem p({1, 1, 1, 3, m, f, e, Mode::logs, true, fade, true});
    check::for_each_isa([&](const std::string&) {
      p.forward();
      for (int64_t i = 0; i < f; ++i) {
        std::vector<double> s(e);
        double z = 0;
        for (int64_t t = 0; t < m; ++t) {
          if (!p.keep[size_t(t)]) continue;
          const double g = p.fade.values[size_t(t)], keep = fade == Fade::none ? 1 : g;
          const double phi = std::exp(p.fk.values[size_t(t * f + i)]) * (fade == Fade::gate ? 1 - g : 1);
          for (int64_t c = 0; c < e; ++c) s[size_t(c)] = keep * s[size_t(c)] + phi * p.v.values[size_t(t * e + c)];
          z = keep * z + phi;
        }
        const double unit = std::exp(double(p.new_shift.get(i)));
        CHECK_NEAR(p.new_z.get(i) * unit, z, 1e-5 * z);
        for (int64_t c = 0; c < e; ++c) CHECK_NEAR(p.new_s.get(i * e + c) * unit, s[size_t(c)], 1e-5 * z);
      }
    });
  }
  check::for_each_isa([&](const std::string&) {
    Problem nothing({1, 1, 1, 3, 0, f, e});
    nothing.forward();
    for (int64_t i = 0; i < f; ++i) CHECK(nothing.new_shift.get(i) == -INFINITY && nothing.new_z.get(i) == 0);
    Problem same({1, 1, 1, 3, 0, f, e, Mode::logs, true, Fade::none, false, true, false, true});
    same.forward();
    CHECK(same_bits(same.new_s, same.state_s) && same_bits(same.new_z, same.state_z));
    CHECK(same_bits(same.new_shift, same.state_shift));
  });
}

// Later keys of the same chunk and of later ones: other values, larger by e^60 and e^300, NaN.
TEST(causal_rows_depend_on_no_later_key) {
  const int64_t n = 150, f = 20, e = 18;
  for (Mode mode : kModes)
    for (Fade fade : {Fade::none, Fade::gate}) {
      const Sizes s = {1, 2, 1, n, n, f, e, mode, true, fade};
      check::for_each_isa([&](const std::string&) {
        Problem before(s);
        before.forward();
        for (double change : {1.0, 60.0, 300.0, 5000.0, double(NAN)}) {
          for (int64_t token : {140, 100, 41, 3}) {
            Problem p(s);
            for (int64_t i = token * f; i < (token + 1) * f; ++i) p.fk.set(i, p.fk.values[size_t(i)] + change);
            for (int64_t i = token * e; i < (token + 1) * e; ++i) p.v.set(i, p.v.values[size_t(i)] + change);
            p.weight.set(token, p.weight.values[size_t(token)] + change);
            p.forward();
            for (int64_t h = 0; h < 2; ++h) {
              bool same = true, touched = false;
              for (int64_t i = 0; i < n * e; ++i) {
                const bool equal = p.out.get(h * n * e + i) == before.out.get(h * n * e + i);
                (i < token * e ? same : touched) &= i < token * e ? equal : true;
                if (i >= token * e && i < (token + 1) * e) touched |= !equal;
              }
              CHECK(same);
              CHECK(touched);
            }
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
        std::mt19937 random(3);
        for (int64_t i = 0; i < p.fk.view.numel(); ++i) p.fk.set(i, p.fk.values[size_t(i)] + level);
        // Some features of some keys far above the others, some not there at all.
        for (int64_t i = 0; i < p.fk.view.numel(); i += 1 + int64_t(random() % 300)) p.fk.set(i, level + 200);
        for (int64_t i = 1; i < p.fk.view.numel(); i += 1 + int64_t(random() % 100)) p.fk.set(i, -INFINITY);
        for (int64_t i = 0; i < p.fq.view.numel(); ++i) p.fq.set(i, p.fq.values[size_t(i)] - level / 2);
        const Reference<double> exact(p);
        const Reference<float> plain(p);
        check::for_each_isa([&](const std::string&) {
          p.forward();
          check_budget("out", p.s, p.out, exact.out, plain.out);
        });
      }
}

// Keys that rise by 50 at every step, so that every row needs shifts of its own; and decays that leave 1e-30 of the
// past.
TEST(steep_rises_and_decays) {
  const int64_t n = 100, f = 6;
  for (Mode mode : {Mode::logs, Mode::weights})
    for (Fade fade : kFades)
      for (double step : {50.0, -50.0, 0.0}) {
        Problem p({1, 1, 1, n, n, f, 5, mode, true, fade});
        for (int64_t i = 0; i < n * f && mode == Mode::logs; ++i)
          p.fk.set(i, p.fk.values[size_t(i)] + step * double(i / f));
        for (int64_t m = 0; m < n; ++m) p.weight.set(m, p.weight.values[size_t(m)] + step * double(m));
        for (int64_t m = 0; m < n; ++m) p.fade.set(m, m % 9 == 5 ? 1e-30 : m % 31 == 30 ? 0.0 : 0.999);
        const Reference<double> exact(p);
        const Reference<float> plain(p);
        check::for_each_isa([&](const std::string&) {
          p.forward();
          check_budget("out", p.s, p.out, exact.out, plain.out);
        });
      }
}

TEST(a_decay_over_many_chunks) {
  for (Mode mode : {Mode::logs, Mode::weights})
    for (double level : {0.0, -150.0}) {
      Problem p({1, 1, 1, 300, 1200, 4, 3, mode, true, Fade::decay});
      p.set_after_first(level, 0.8);
      const Reference<double> exact(p);
      const Reference<float> plain(p);
      check::for_each_isa([&](const std::string&) {
        p.forward();
        check_budget("out", p.s, p.out, exact.out, plain.out);
      });
    }
}

TEST(masked_keys_have_no_effect) {
  check::for_each_isa([](const std::string&) {
    for (Mode mode : kModes)
      for (bool causal : {false, true}) {
        const Sizes s = {2, 2, 1, 100, 140, 12, 12, mode, causal, causal ? Fade::gate : Fade::none, true};
        Problem nan(s), zero(s);
        zero.fill_masked(mode == Mode::logs ? 3000 : 7);
        nan.forward(), zero.forward();
        CHECK(same_bits(nan.out, zero.out));
        if (causal) CHECK(same_bits(nan.new_s, zero.new_s) && same_bits(nan.new_z, zero.new_z));
      }
  });
}

TEST(strides_and_threads_do_not_change_bits) {
  check::for_each_isa([](const std::string&) {
    for (Mode mode : kModes)
      for (bool causal : {false, true}) {
        Sizes s = {2, 4, 2, 300, 1210, 20, 12, mode, causal, causal ? Fade::decay : Fade::none, true};
        s.state = causal;
        Problem one(s);
        one.forward(1);
        s.strided = true;
        for (int threads : {1, 2, 3, 16}) {
          Problem other(s);
          other.forward(threads);
          CHECK(same_bits(one.out, other.out));
          if (causal) CHECK(same_bits(one.new_s, other.new_s) && same_bits(one.new_z, other.new_z));
        }
      }
  });
}

TEST(one_decay_for_a_head) {
  check::for_each_isa([](const std::string&) {
    Problem full({1, 2, 2, 90, 90, 8, 7, Mode::logs, true, Fade::decay}), constant({1, 2, 2, 90, 90, 8, 7});
    for (int64_t i = 0; i < 2 * 90; ++i) full.fade.set(i, i < 90 ? 0.9 : 0.75);
    const float values[] = {0.9f, 0.75f};
    constant.options.decay = make_tensor(values, {1, 2, 90});
    constant.options.decay.stride[1] = 1, constant.options.decay.stride[2] = 0;
    full.forward(), constant.forward();
    CHECK(same_bits(full.out, constant.out));
  });
}

TEST(rows_without_a_key_are_zero) {
  check::for_each_isa([](const std::string&) {
    for (Mode mode : kModes)
      for (bool causal : {false, true}) {
        Problem p({1, 1, 1, 70, 20, 4, 3, mode, causal, Fade::none, true});
        for (int64_t m = 0; m < 20; ++m) p.keep[size_t(m)] = causal && m == 19;
        if (!causal) p.fq.set(0, NAN);
        p.fk.set(19 * 4, mode == Mode::logs ? -2 : 1), p.v.set(19 * 3, 5);
        for (int64_t i = 0; i < 4; ++i) p.fk.set(19 * 4 + i, 1);
        for (int64_t i = 0; i < 3; ++i) p.v.set(19 * 3 + i, 5);
        p.weight.set(19, 1);
        p.forward();
        for (int64_t i = 0; i < 70 * 3; ++i) CHECK_NEAR(p.out.get(i), causal && i >= 69 * 3 ? 5 : 0, 1e-6);
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
        p->forward();
        for (int64_t i = 0; i < p->out.view.numel(); ++i) CHECK(p->out.get(i) == 0.0f);
      }
    }
  });
}

TEST(errors) {
  Problem p({1, 4, 2, 8, 9, 6, 5}), other({1, 3, 3, 8, 9, 7, 5}), wide({1, 1, 1, 1, 1, 1, 513});
  const auto with = [&](auto change) {
    LinearAttentionOptions options = p.options;
    LinearAttentionState state, next;
    change(options, state, next);
    linear_attention(Queue::cpu(1), p.fq.view, p.fk.view, p.v.view, options, state, p.out.view, next, {});
  };
  const Queue queue = Queue::cpu(1);
  const auto& o = p.options;
  CHECK_THROWS(with([](auto&, auto&, auto&) {}), "[linear_attention] workspace: expected at least ");
  CHECK_THROWS_AS(std::invalid_argument, with([&](auto& x, auto&, auto&) { x.key_log_weight = p.weight.view; }),
                  "[linear_attention] key_log_weight: expected none with log_features, got an array");
  CHECK_THROWS(with([](auto& x, auto&, auto&) { x.normalize = false; }),
               "[linear_attention] normalize: expected true with log_features or key_log_weight, got false");
  CHECK_THROWS(with([&](auto& x, auto&, auto&) { x.gate = x.decay = p.fade.view; }),
               "[linear_attention] decay: expected a gate or a decay, not both, got both");
  CHECK_THROWS(with([&](auto& x, auto&, auto&) { x.gate = p.fade.view, x.is_causal = false; }),
               "[linear_attention] gate: expected none unless is_causal, got an array");
  CHECK_THROWS(with([&](auto& x, auto&, auto&) { x.decay = other.fade.view; }),
               "[linear_attention] decay: expected shape [B, Hkv, M] = [1, 2, 9], got [1, 3, 9]");
  CHECK_THROWS(with([&](auto&, auto& s, auto&) { s.s = p.state_s.view, s.z = p.state_z.view; }),
               "[linear_attention] state.shift: expected an array, got none");
  CHECK_THROWS(with([&](auto& x, auto& s, auto&) {
                 s = {p.state_s.view, p.state_z.view, p.state_shift.view}, x.log_features = false;
               }),
               "[linear_attention] state.shift: expected none without log_features and key_log_weight, got an array");
  CHECK_THROWS(with([&](auto& x, auto&, auto& s) { s = p.new_state, x.is_causal = false; }),
               "[linear_attention] new_state: expected none unless is_causal, got a state");
  CHECK_THROWS(with([&](auto&, auto& s, auto& t) { s = t = p.new_state, t.z = p.new_shift.view; }),
               "[linear_attention] new_state.z: expected an output that shares no memory");
  CHECK_THROWS(linear_attention(queue, p.fq.view, other.fk.view, p.v.view, o, {}, p.out.view, {}, {}),
               "[linear_attention] fk: expected shape [B, Hkv, M, F], got [1, 3, 9, 7]");
  CHECK_THROWS(linear_attention(queue, wide.fq.view, wide.fk.view, wide.v.view, o, {}, wide.out.view, {}, {}),
               "[linear_attention] v: expected a value in [1, 512], got 513");
  CHECK_THROWS(linear_attention(queue, p.fq.view, p.fk.view, p.v.view, o, {}, p.dfq.view, {}, {}),
               "[linear_attention] out: expected shape [B, H, N, E] = [1, 4, 8, 5], got [1, 4, 8, 6]");
  for (float bad : {-0.5f, 1.5f, NAN}) {
    p.fade.set(11, bad);
    CHECK_THROWS(with([&](auto& x, auto&, auto&) { x.gate = p.fade.view; }),
                 "[linear_attention] gate: expected values in [0, 1], got " + std::to_string(bad) + " at [0, 1, 2]");
  }
}
