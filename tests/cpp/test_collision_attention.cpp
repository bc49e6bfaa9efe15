// collision_attention and its gradient against the equations in double, on every row of kernels this machine can run.
#include "collision_attention_reference.h"
#include "subquad/error.h"

using namespace collision;

namespace {

/// Rows wider than the CUDA kernels take.
bool too_wide(const Sizes& s) { return check::emulated() && std::max(s.d, s.e) > 256; }

/// Problems that would take the emulated row seconds.
bool too_long(const Sizes& s) { return check::emulated() && s.batch * s.heads * s.n * s.m > 12 * 40 * 80; }

/// The rules differ in one step for every pair, so that larger problems take turns where they are slow.
bool left_to_others(const Sizes& s, GradientRule rule) {
  const int64_t turn = s.n + s.m + s.d + s.e + s.causal + int64_t(s.dtype);
  return check::emulated() && s.n * s.m > 500 && (turn % 2 == 0) != (rule == GradientRule::exact);
}

void check_problem(const Sizes& sizes) {
  Problem p(sizes);
  for (GradientRule rule : {GradientRule::exact, GradientRule::lower_bound}) {
    const Reference<double> exact(p, rule, true);
    const Reference<float> plain(p, rule, true);
    check::for_each_isa([&](const std::string&) {
      if (too_wide(sizes) || too_long(sizes) || left_to_others(sizes, rule)) return;
      p.forward();
      p.backward(rule);
      check_budget("out", p.s, p.out, exact.out, plain.out);
      check_budget("dq", p.s, p.dq, exact.dq, plain.dq);
      check_budget("dk", p.s, p.dk, exact.dk, plain.dk);
      check_budget("dv", p.s, p.dv, exact.dv, plain.dv);
    });
  }
}

bool same_bits(const Array& a, const Array& b) {
  bool same = true;
  for (int64_t i = 0; i < a.view.numel(); ++i) same &= float_to_bits(a.get(i)) == float_to_bits(b.get(i));
  return same;
}

/// The elements [begin, end) of two arrays are the same, and none is NaN.
bool same_part(const Array& a, const Array& b, int64_t begin, int64_t end) {
  bool same = true;
  for (int64_t i = begin; i < end; ++i) same &= a.get(i) == b.get(i);
  return same;
}

}  // namespace

TEST(dims) {
  for (int64_t d : {1, 3, 7, 16, 17, 64, 100})
    for (int64_t e : {1, 3, 7, 16, 17, 64, 100}) check_problem({1, 1, 1, 21, 37, d, e});
  // Both sides of the borders of the tensor-core tiles: 16 columns, chunks of 64, slices of 128.
  for (auto [d, e] : {std::pair{63, 65}, {65, 64}, {127, 129}, {129, 128}, {193, 33}, {33, 193}, {256, 256}})
    check_problem({1, 1, 1, 18, 35, d, e});
  check_problem({1, 1, 1, 9, 70, 512, 512});
}

// Both sides of the borders of the tiles: 16 rows of a warp, 64 and 128 of a block, 32 and 64 columns of a tile.
TEST(tile_borders) {
  for (auto [n, m] : {std::pair{15, 31}, {16, 32}, {17, 33}, {63, 64}, {64, 97}, {65, 96}, {127, 16}, {129, 17}}) {
    for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      check_problem({1, 1, 1, n, m, 16, 16, 8, false, false, false, dtype});
      check_problem({1, 1, 1, n, m, 16, 16, 8, true, true, false, dtype});
    }
  }
}

TEST(lengths) {
  for (int64_t n : {1, 7, 8, 31, 65, 130})
    for (int64_t m : {1, 5, 16, 63, 64, 65, 129})
      for (bool causal : {false, true}) check_problem({1, 1, 1, n, m, 16, 8, 4, causal});
  check_problem({1, 1, 1, 600, 530, 8, 8, 8, true});
}

TEST(hash_bits) {
  for (int64_t bits = 1; bits <= 24; ++bits) check_problem({1, 1, 1, 12, 40, 6, 5, bits});
}

TEST(groups_and_masks) {
  for (int64_t heads_kv : {1, 2, 6}) {
    for (bool causal : {false, true}) {
      check_problem({2, 6, heads_kv, 33, 19, 8, 8, 8, causal});
      check_problem({1, 6, heads_kv, 33, 75, 8, 20, 8, causal, true});
    }
  }
}

TEST(dtypes) {
  for (DType dtype : {DType::f16, DType::bf16}) {
    check_problem({2, 4, 2, 40, 70, 24, 17, 8, false, true, false, dtype});
    check_problem({1, 1, 1, 40, 70, 64, 64, 8, true, false, true, dtype});
    check_problem({1, 1, 1, 20, 40, 80, 136, 11, true, true, false, dtype});
  }
}

// The weights of many bits lie below what a half can hold, the sums in f32 do not.
TEST(small_weights_of_halves) {
  Sizes s = {1, 1, 1, 20, 70, 128, 16, 24, false, false, false, DType::f16};
  s.out = DType::f32;
  Problem p(s);
  for (int64_t i = 0; i < p.v.view.numel(); ++i) p.v.set(i, std::fabs(p.v.values[size_t(i)]));
  const Reference<double> exact(p, GradientRule::exact, false);
  double smallest = 1;
  for (double x : exact.out) smallest = std::min(smallest, x);
  CHECK(smallest < 0x1p-15);
  check::for_each_isa([&](const std::string&) {
    p.forward();
    for (size_t i = 0; i < exact.out.size(); ++i) CHECK_NEAR(p.out.get(int64_t(i)), exact.out[i], 1e-3 * exact.out[i]);
  });
}

TEST(masked_tokens_have_no_effect) {
  check::for_each_isa([](const std::string&) {
    const Sizes s = {2, 2, 1, 50, 140, 12, 12, 6, true, true};
    Problem nan(s), zero(s);
    zero.fill_masked(0);
    for (Problem* p : {&nan, &zero}) p->forward(), p->backward(GradientRule::exact);
    CHECK(same_bits(nan.out, zero.out));
    CHECK(same_bits(nan.dq, zero.dq) && same_bits(nan.dk, zero.dk) && same_bits(nan.dv, zero.dv));
    for (int64_t i = 0; i < nan.out.view.numel(); ++i)
      if (!nan.keep_q[size_t(i / (2 * 50 * 12) * 50 + i / 12 % 50)]) CHECK(nan.out.get(i) == 0.0f);
  });
}

TEST(causal_rows_depend_on_no_later_token) {
  check::for_each_isa([](const std::string&) {
    for (double changed : {3.0, double(NAN)}) {
      const int64_t n = 90, d = 10, end = n * d;
      const Sizes s = {1, 1, 1, n, n, d, d, 8, true};
      for (int64_t token : {83, 41, 8}) {
        Problem before(s), keys(s), queries(s);
        for (int64_t i = token * d; i < (token + 1) * d; ++i) {
          keys.k.set(i, changed), keys.v.set(i, changed);
          queries.q.set(i, changed), queries.dout.set(i, changed);
        }
        for (Problem* p : {&before, &keys, &queries}) p->forward(), p->backward(GradientRule::exact);
        CHECK(same_part(before.out, keys.out, 0, token * d));
        CHECK(same_part(before.dq, keys.dq, 0, token * d));
        CHECK(same_part(before.dk, queries.dk, (token + 1) * d, end));
        CHECK(same_part(before.dv, queries.dv, (token + 1) * d, end));
        for (int64_t row = token * d; row < end; row += d) CHECK(!same_part(before.out, keys.out, row, row + d));
      }
    }
  });
}

TEST(parallel_and_zero_rows) {
  for (double sign : {1.0, -1.0}) {
    for (int64_t d : {1, 2, 33}) {
      Problem p({1, 1, 1, 40, 40, d, 6, 5});
      for (int64_t i = 0; i < p.q.view.numel(); ++i) p.k.set(i, sign * p.q.values[size_t(i)]);
      for (int64_t c = 0; c < d; ++c)
        p.q.set(3 * d + c, 0), p.k.set(5 * d + c, 0), p.k.set(6 * d + c, p.q.values[size_t(c)]);
      for (GradientRule rule : {GradientRule::exact, GradientRule::lower_bound}) {
        const Reference<double> exact(p, rule, true);
        const Reference<float> plain(p, rule, true);
        check::for_each_isa([&](const std::string&) {
          p.forward();
          p.backward(rule);
          // Sums in another order may leave the cosine of equal rows a rounding below 1, where acos magnifies it.
          const double floor = check::emulated() ? double(p.s.bits) * std::acos(1 - 0x1p-23) / kPi : 1e-6;
          check_budget("out", p.s, p.out, exact.out, plain.out, floor);
          // A t that should be 0 is what rounding leaves of a difference, over a sine that is rounding itself.
          check_budget("dq", p.s, p.dq, exact.dq, plain.dq, 1e-3);
          check_budget("dk", p.s, p.dk, exact.dk, plain.dk, 1e-3);
          for (int64_t c = 0; c < d; ++c) CHECK(p.dq.get(3 * d + c) == 0.0f && p.dk.get(5 * d + c) == 0.0f);
        });
      }
    }
  }
}

// acos magnifies the rounding of a cosine near 1, so that the order of a sum over hundreds of products shows.
TEST(long_rows_close_to_parallel) {
  for (int64_t d : {256, 512}) {
    Problem p({1, 1, 1, 60, 60, d, 4, 8});
    std::mt19937 random(2);
    std::normal_distribution<double> noise(0, 1e-3);
    for (int64_t i = 0; i < p.q.view.numel(); ++i) p.k.set(i, p.q.values[size_t(i)] + noise(random));
    const Reference<double> exact(p, GradientRule::exact, true);
    const Reference<float> plain(p, GradientRule::exact, true);
    check::for_each_isa([&](const std::string&) {
      if (too_wide(p.s)) return;
      p.forward();
      p.backward(GradientRule::exact);
      check_budget("out", p.s, p.out, exact.out, plain.out);
      check_budget("dq", p.s, p.dq, exact.dq, plain.dq);
      check_budget("dk", p.s, p.dk, exact.dk, plain.dk);
    });
  }
}

TEST(any_length_of_row) {
  for (auto [dtype, factor] : {std::pair{DType::f32, 1e30},
                               {DType::f32, 1e-30},
                               {DType::f32, 1e-43},
                               {DType::bf16, 1e30},
                               {DType::bf16, 1e-30}}) {
    Problem p({1, 1, 1, 20, 30, 9, 9, 8, false, false, false, dtype});
    for (int64_t i = 0; i < p.q.view.numel(); ++i) p.q.set(i, p.q.values[size_t(i)] * factor);
    for (int64_t i = 0; i < p.k.view.numel() / 2; ++i) p.k.set(i, p.k.values[size_t(i)] * factor);
    const Reference<double> exact(p, GradientRule::exact, false);
    const Reference<float> plain(p, GradientRule::exact, false);
    check::for_each_isa([&](const std::string&) {
      p.forward();
      check_budget("out", p.s, p.out, exact.out, plain.out);
    });
  }
}

// Every element of the output is u of one key.
TEST(probability_of_one_bit) {
  const int64_t m = 5000, e = 250;
  Problem p({1, 1, 1, 1, m, 2, e, 1});
  p.q.set(0, 1), p.q.set(1, 0);
  for (int64_t j = 0; j < m; ++j) {
    const double angle = kPi * double(j) / double(m);
    p.k.set(2 * j, std::cos(angle)), p.k.set(2 * j + 1, std::sin(angle));
    for (int64_t c = 0; c < e; ++c) p.v.set(j * e + c, j == 7 + c * 19);
  }
  check::for_each_isa([&](const std::string&) {
    p.forward(1);
    for (int64_t c = 0; c < e; ++c) {
      const double x = p.k.values[size_t(2 * (7 + c * 19))], y = p.k.values[size_t(2 * (7 + c * 19) + 1)];
      // The header bounds the error of u itself; two roundings of x come on top.
      const double from_x = 0x1p-23 * std::fabs(x) / (kPi * y / std::hypot(x, y));
      CHECK_NEAR(p.out.get(c), 1 - std::atan2(y, x) / kPi, 2e-7 + from_x);
    }
  });
}

TEST(strides_and_threads_do_not_change_bits) {
  check::for_each_isa([](const std::string&) {
    for (bool causal : {false, true}) {
      Sizes s = {2, 4, 2, 300, 210, 20, 12, 8, causal, true};
      if (check::emulated()) s.n = 70, s.m = 50;
      Problem one(s);
      one.forward(1), one.backward(GradientRule::exact, 1);
      s.strided = true;
      for (int threads : {1, 2, 3, 16}) {
        // The kernels know nothing of the queue's threads.
        if (check::emulated() && threads > 1) break;
        Problem other(s);
        other.forward(threads), other.backward(GradientRule::exact, threads);
        CHECK(same_bits(one.out, other.out) && same_bits(one.dq, other.dq));
        CHECK(same_bits(one.dk, other.dk) && same_bits(one.dv, other.dv));
      }
    }
  });
}

TEST(central_differences) {
  Problem p({1, 2, 1, 11, 14, 7, 5, 6});
  const auto loss = [&] {
    const Reference<double> r(p, GradientRule::exact, false);
    double sum = 0;
    for (size_t i = 0; i < r.out.size(); ++i) sum += r.out[i] * p.dout.values[i];
    return sum;
  };
  check::for_each_isa([&](const std::string&) {
    p.backward(GradientRule::exact);
    for (auto [x, gradient] : {std::pair{&p.q, &p.dq}, {&p.k, &p.dk}, {&p.v, &p.dv}}) {
      for (size_t i = 0; i < x->values.size(); i += 5) {
        const double kept = x->values[i], step = 1e-5;
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
    Problem keyless({1, 2, 1, 5, 0, 4, 3}), queryless({1, 2, 1, 0, 5, 4, 3}), nothing({0, 2, 1, 5, 5, 4, 3});
    Problem headless({1, 0, 1, 5, 5, 4, 3});
    for (Problem* p : {&keyless, &queryless, &nothing, &headless}) {
      p->forward(), p->backward(GradientRule::exact);
      for (const Array* a : {&p->out, &p->dq, &p->dk, &p->dv})
        for (int64_t i = 0; i < a->view.numel(); ++i) CHECK(a->get(i) == 0.0f);
    }
  });
}

TEST(errors) {
  Problem p({1, 4, 2, 8, 9, 6, 5}), other({1, 3, 3, 8, 9, 7, 5}), wide({1, 1, 1, 1, 1, 513, 1});
  const auto with = [&](auto change) {
    CollisionAttentionOptions options = p.options;
    change(options);
    collision_attention(Queue::cpu(1), p.q.view, p.k.view, p.v.view, options, p.out.view, {});
  };
  const Queue queue = Queue::cpu(1);
  const auto& o = p.options;
  CHECK_THROWS_AS(std::invalid_argument, with([](auto& x) { x.hash_bits = 25; }),
                  "[collision_attention] hash_bits: expected a value in [1, 24], got 25");
  CHECK_THROWS(with([&](auto& x) { x.key_mask = make_tensor(reinterpret_cast<const bool*>(p.keep_k.data()), {1, 8}); }),
               "[collision_attention] key_mask: expected shape [B, M] = [1, 9], got [1, 8]");
  CHECK_THROWS_AS(TypeMismatch, with([&](auto& x) { x.query_mask = make_tensor(p.keep_q.data(), {1, 8}); }),
                  "[collision_attention] query_mask: expected dtype bool, got ");
  CHECK_THROWS(with([](auto&) {}), "[collision_attention] workspace: expected at least ");
  CHECK_THROWS(collision_attention(queue, p.q.view, other.k.view, p.v.view, o, p.out.view, {}),
               "[collision_attention] k: expected shape [B, Hkv, M, D], got [1, 3, 9, 7]");
  CHECK_THROWS_AS(Unsupported, collision_attention(queue, wide.q.view, wide.k.view, wide.v.view, o, wide.out.view, {}),
                  "for a head dimension above 512");
  CHECK_THROWS(collision_attention(queue, p.q.view, p.k.view, p.v.view, o, p.dq.view, {}),
               "[collision_attention] out: expected shape [B, H, N, E] = [1, 4, 8, 5], got [1, 4, 8, 6]");
  CHECK_THROWS(collision_attention_bwd(queue, p.dout.view, p.q.view, p.k.view, p.v.view, o, GradientRule::exact,
                                       p.dq.view, p.k.view, p.dv.view, {}),
               "[collision_attention_bwd] dk: expected an output that shares no memory");
  CHECK_THROWS_AS(TypeMismatch,
                  collision_attention_bwd(queue, p.dout.view, p.q.view, p.k.view, p.v.view, o, GradientRule::exact,
                                          Tensor(), p.dk.view, p.dv.view, {}),
                  "[collision_attention_bwd] dq: expected an array, got none");
}
