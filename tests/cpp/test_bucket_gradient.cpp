#include <chrono>

#include "bucket_gradient_reference.h"
#include "subquad/error.h"

using namespace sampled;

namespace {

template <class T>
constexpr double kEps = std::is_same_v<T, float>  ? 0x1p-24
                        : std::is_same_v<T, half> ? 0x1p-11
                                                  : 0x1p-8;

template <class P, class T>
void check_side(const P& p, const std::vector<T>& gradient, bool of_query) {
  const Sizes& s = p.s;
  const int64_t heads = of_query ? s.heads_q : s.heads_kv, seq = of_query ? s.seq_q : s.seq_k;
  for (int64_t row = 0; row < s.batch * heads * seq; ++row) {
    const Row exact = sampled::gradient(p, of_query, row / seq / heads, row / seq % heads, row % seq);
    for (int64_t d = 0; d < s.dim_qk; ++d) {
      const double value = exact.value[size_t(d)], got = to_float(gradient[size_t(row * s.dim_qk + d)]);
      CHECK_NEAR(got, value, kEps<T> * (std::fabs(value) + 0x1p-14) + 1e-6 * exact.magnitude);
      if (exact.magnitude == 0) CHECK(got == 0);
    }
  }
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(T)));
}

/// Both rules, with and without causality and masks, for 1 to 3 threads.
template <class Code, class T, class G = T>
void check_all(Sizes s, unsigned draw) {
  for (const GradientRule rule : {GradientRule::lower_bound, GradientRule::exact})
    for (int variant = 0; variant < 4; ++variant) {
      s.rule = rule, s.causal = variant & 1, s.masked = variant & 2;
      const Problem<Code, T, G> p(s, draw + unsigned(variant));
      const Gradients<T> one = run(p, 1);
      check_side(p, one.dq, true), check_side(p, one.dk, false);
      for (int threads = 2; threads <= (check::emulated() ? 1 : 3); ++threads) {
        const Gradients<T> more = run(p, threads);
        CHECK(same_bits(one.dq, more.dq) && same_bits(one.dk, more.dk));
      }
    }
}

Sizes sizes(int64_t batch, int64_t heads_q, int64_t heads_kv, int64_t num_hashes, int64_t seq_q, int64_t seq_k,
            int64_t dim_qk, int64_t dim_v, int64_t hash_bits, int64_t num_samples, int64_t used_codes = 0) {
  Sizes s;
  s.batch = batch, s.heads_q = heads_q, s.heads_kv = heads_kv, s.num_hashes = num_hashes;
  s.seq_q = seq_q, s.seq_k = seq_k, s.dim_qk = dim_qk, s.dim_v = dim_v;
  s.hash_bits = hash_bits, s.num_samples = num_samples, s.used_codes = used_codes;
  return s;
}

}  // namespace

TEST(pairs_are_those_of_the_definition) {
  check::for_each_isa([](const std::string&) {
    check_all<uint16_t, float>(sizes(2, 4, 2, 5, 27, 31, 7, 9, 3, 4), 1);
    check_all<int32_t, float>(sizes(1, 1, 1, 9, 40, 40, 16, 16, 1, 3), 2);
    check_all<uint16_t, float>(sizes(1, 3, 1, 2, 1, 50, 33, 1, 2, 1), 3);
    check_all<uint16_t, float>(sizes(3, 2, 2, 1, 30, 12, 1, 64, 2, 7), 4);
    check_all<int32_t, float>(sizes(1, 2, 1, 3, 33, 29, 20, 17, 24, 2, 4), 5);
    check_all<uint16_t, float>(sizes(1, 1, 1, 4, 130, 70, 64, 64, 12, 4, 8), 6);
  });
}

TEST(sixteen_bit_arrays) {
  check::for_each_isa([](const std::string&) {
    check_all<uint16_t, half>(sizes(1, 2, 1, 3, 25, 25, 24, 8, 3, 4), 11);
    check_all<uint16_t, bfloat16>(sizes(1, 2, 2, 3, 25, 30, 17, 16, 2, 4), 12);
  });
}

// The CUDA kernels give a row to 8, 16 or 32 lanes, load it by 16 bytes where that is possible, and widen dout first
// where it is neither f32 nor of the type of q.
TEST(widths_and_types_on_both_sides_of_every_border) {
  check::for_each_isa([](const std::string&) {
    const int64_t widths[][2] = {{63, 8}, {64, 64}, {65, 4}, {8, 72}, {128, 120}, {16, 129}, {256, 136}, {255, 256}};
    for (const auto& [dim_qk, dim_v] : widths) {
      const Sizes s = sizes(1, 2, 1, 2, 9, 12, dim_qk, dim_v, 2, 2);
      check_all<uint16_t, float>(s, 101);
      check_all<int32_t, bfloat16>(s, 102);
      check_all<uint16_t, half, float>(s, 103);
    }
    for (const int64_t dim : {7, 40}) {
      const Sizes s = sizes(2, 2, 1, 2, 12, 9, dim, dim, 2, 2);
      check_all<uint16_t, bfloat16, float>(s, 111);
      check_all<uint16_t, bfloat16, half>(s, 112);
      check_all<uint16_t, half, bfloat16>(s, 113);
      check_all<uint16_t, float, half>(s, 114);
      check_all<uint16_t, float, bfloat16>(s, 115);
    }
  });
}

// A warp of the CUDA kernels makes up to 32 picks at a time, of several hashes or of a part of one.
TEST(picks_on_both_sides_of_every_border) {
  check::for_each_isa([](const std::string&) {
    check_all<uint16_t, float>(sizes(1, 1, 1, 37, 12, 10, 4, 4, 1, 1), 121);
    for (const int64_t samples : {5, 15, 16, 17, 32, 33, 64})
      check_all<int32_t, float>(sizes(1, 1, 1, 3, 18, 75, 4, 4, 1, samples), 122);
    for (const int64_t bits : {5, 8, 9, 11, 16, 17})
      check_all<int32_t, float>(sizes(1, 2, 2, 7, 25, 40, 4, 4, bits, 2, 8), 123);
  });
}

TEST(rows_near_each_other) {
  check::for_each_isa([](const std::string&) {
    for (const double likeness : {0.5, 0.9, 0.99, 0.999, -0.9, -0.999}) {
      Sizes s = sizes(1, 1, 1, 3, 24, 24, 16, 8, 2, 4);
      s.likeness = likeness;
      check_all<uint16_t, float>(s, 21);
    }
  });
}

// Equal and opposite rows have no tangent; their pairs contribute nothing, and nothing overflows.
TEST(parallel_rows_have_finite_gradients) {
  check::for_each_isa([](const std::string&) {
    Sizes s = sizes(1, 1, 1, 2, 16, 16, 8, 4, 1, 64);
    s.rule = GradientRule::exact;
    Problem<uint16_t, float> p(s, 31);
    for (size_t i = 0; i < p.q.size(); ++i)
      p.q[i] = p.q[i % 8] * float(1 + i / 8), p.k[i] = i % 16 < 8 ? p.q[i] : -p.q[i];
    const Gradients<float> got = run(p);
    for (const float x : got.dq) CHECK_NEAR(x, 0, 1e-3);
    for (const float x : got.dk) CHECK_NEAR(x, 0, 1e-3);
  });
}

// With S at least every bucket, the estimate is the sum over all pairs by how often their codes agree.
TEST(all_candidates_give_the_dense_formula) {
  check::for_each_isa([](const std::string&) {
    const Sizes s = sizes(1, 1, 1, 6, 40, 40, 12, 10, 2, 64);
    const Problem<uint16_t, float> p(s, 41);
    const Gradients<float> got = run(p);
    for (int64_t n = 0; n < s.seq_q; ++n) {
      const std::vector<double> raw = p.q_row(0, 0, n), own = unit(raw);
      const std::vector<double> g = p.row(p.dout, 1, s.seq_q, s.dim_v, 0, 0, n);
      std::vector<double> sum(size_t(s.dim_qk));
      for (int64_t m = 0; m < s.seq_k; ++m) {
        double agree = 0;
        for (int64_t r = 0; r < s.num_hashes; ++r) agree += p.code_q(0, 0, r, n) == p.code_k(0, 0, r, m);
        const double w = dot(g, p.row(p.v, 1, s.seq_k, s.dim_v, 0, 0, m)) * double(s.hash_bits) / 2;
        const std::vector<double> khat = unit(p.k_row(0, 0, m));
        for (size_t d = 0; d < sum.size(); ++d) sum[d] += agree / double(s.num_hashes) * w * khat[d];
      }
      const double along = dot(own, sum), length = std::sqrt(dot(raw, raw));
      for (size_t d = 0; d < sum.size(); ++d)
        CHECK_NEAR(got.dq[size_t(n) * sum.size() + d], (sum[d] - own[d] * along) / length, 2e-5 / length);
    }
  });
}

TEST(views_give_the_same_bits) {
  check::for_each_isa([](const std::string&) {
    for (const bool exact : {false, true}) {
      Sizes s = sizes(2, 4, 2, 3, 14, 17, 16, 24, 2, 3);
      s.rule = exact ? GradientRule::exact : GradientRule::lower_bound;
      const Problem<uint16_t, float> p(s, 131);
      Gradients<float> expected = run(p), out = expected;
      const Arrays a = arrays_of(p, out);
      Loose<float> dout(a.dout), q(a.q), k(a.k), v(a.v), dq(a.dq), dk(a.dk);
      Loose<uint16_t> codes_q(a.codes_q), codes_k(a.codes_k);
      call({dout.view, q.view, k.view, v.view, codes_q.view, codes_k.view, dq.view, dk.view}, options(p, nullptr), 1);
      for (size_t i = 0; i < out.dq.size(); ++i) CHECK(dq.at(int64_t(i)) == expected.dq[i]);
      for (size_t i = 0; i < out.dk.size(); ++i) CHECK(dk.at(int64_t(i)) == expected.dk[i]);
    }
  });
}

// Heads that share their rows by a stride of 0.
TEST(broadcast_rows) {
  check::for_each_isa([](const std::string&) {
    const Sizes s = sizes(1, 3, 3, 2, 10, 11, 8, 8, 2, 3);
    Problem<uint16_t, float> p(s, 141);
    for (size_t i = 0; i < p.v.size(); ++i) p.v[i] = p.v[i % size_t(s.seq_k * s.dim_v)];
    Gradients<float> expected = run(p), out = expected;
    Arrays a = arrays_of(p, out);
    a.v.stride[1] = 0;
    call(a, options(p, nullptr), 1);
    CHECK(same_bits(out.dq, expected.dq) && same_bits(out.dk, expected.dk));
  });
}

TEST(causal_rows_do_not_depend_on_later_tokens) {
  check::for_each_isa([](const std::string&) {
    for (const bool exact : {false, true}) {
      Sizes s = sizes(1, 1, 1, 3, 40, 40, 8, 8, 2, 3);
      s.rule = exact ? GradientRule::exact : GradientRule::lower_bound, s.causal = true;
      Problem<uint16_t, float> p(s, 151);
      const Gradients<float> before = run(p);
      const int64_t kept = 25;
      for (int64_t r = 0; r < s.num_hashes; ++r)
        for (int64_t m = kept; m < s.seq_k; ++m) p.codes_k[size_t(r * s.seq_k + m)] = uint16_t(m % 4);
      for (size_t i = size_t(kept * s.dim_qk); i < p.k.size(); ++i) p.k[i] = p.v[i] = 3;
      const Gradients<float> after = run(p);
      CHECK(std::memcmp(before.dq.data(), after.dq.data(), size_t(kept * s.dim_qk) * sizeof(float)) == 0);
      CHECK(!same_bits(before.dq, after.dq));
    }
  });
}

TEST(seed_from_memory_gives_the_same_bits) {
  check::for_each_isa([](const std::string&) {
    Problem<uint16_t, float> p(sizes(1, 2, 1, 3, 20, 20, 8, 8, 1, 3), 161);
    const int64_t seed = int64_t(p.seed);
    const Gradients<float> expected = run(p);
    p.seed = 5;
    const Gradients<float> got = run(p, 1, &seed);
    CHECK(same_bits(got.dq, expected.dq) && same_bits(got.dk, expected.dk));
    CHECK(!same_bits(run(p).dq, expected.dq));
  });
}

// A row of one number has no direction to turn to.
TEST(one_dimension_leaves_no_gradient) {
  check::for_each_isa([](const std::string&) {
    for (const bool exact : {false, true}) {
      Sizes s = sizes(1, 2, 1, 3, 40, 40, 1, 3, 1, 5);
      s.rule = exact ? GradientRule::exact : GradientRule::lower_bound;
      const Gradients<float> got = run(Problem<uint16_t, float>(s, 171));
      for (const float x : got.dq) CHECK(x == 0);
      for (const float x : got.dk) CHECK(x == 0);
    }
  });
}

TEST(zero_rows_and_extreme_lengths) {
  check::for_each_isa([](const std::string&) {
    for (const bool exact : {false, true}) {
      Sizes s = sizes(1, 2, 1, 3, 20, 20, 9, 6, 2, 4);
      s.rule = exact ? GradientRule::exact : GradientRule::lower_bound;
      Problem<uint16_t, float> p(s, 51);
      for (int64_t d = 0; d < s.dim_qk; ++d) {
        p.q[size_t(3 * s.dim_qk + d)] = 0, p.k[size_t(7 * s.dim_qk + d)] = -0.0f;
        p.q[size_t(5 * s.dim_qk + d)] *= 0x1p-100f, p.k[size_t(2 * s.dim_qk + d)] *= 0x1p100f;
        p.q[size_t(6 * s.dim_qk + d)] *= 0x1p21f, p.k[size_t(3 * s.dim_qk + d)] *= 0x1p-24f;
        p.q[size_t(7 * s.dim_qk + d)] *= 0x1p125f, p.k[size_t(4 * s.dim_qk + d)] *= 0x1p-60f;
      }
      for (int64_t e = 0; e < s.dim_v; ++e) p.dout[size_t(9 * s.dim_v + e)] = e % 2 ? 0 : -0.0f;
      const Gradients<float> got = run(p);
      check_side(p, got.dq, true), check_side(p, got.dk, false);
      // Of a length whose inverse is no float, and of a multiple of 2^-149: the gradient of the key itself may
      // overflow.
      for (int64_t d = 0; d < s.dim_qk; ++d)
        p.k[size_t(8 * s.dim_qk + d)] *= 0x1p-75f, p.k[size_t(8 * s.dim_qk + d)] *= 0x1p-70f;
      check_side(p, run(p).dq, true);
      // Weights of pairs that leave the range of floats if a row is divided by its length after them.
      for (int64_t d = 0; d < s.dim_qk; ++d)
        p.k[size_t(9 * s.dim_qk + d)] *= 0x1p-42f, p.q[size_t(5 * s.dim_qk + d)] *= 0x1p100f;
      for (float& x : p.dout) x *= 0x1p100f;
      check_side(p, run(p).dq, true);
    }
  });
}

// A query without gradient gets none even from a key whose value is NaN.
TEST(rows_without_gradient_are_skipped) {
  check::for_each_isa([](const std::string&) {
    Problem<uint16_t, float> p(sizes(1, 1, 1, 2, 10, 10, 8, 4, 1, 64), 61);
    for (int64_t e = 0; e < 4; ++e) p.dout[size_t(2 * 4 + e)] = 0, p.v[size_t(5 * 4 + e)] = NAN;
    const Gradients<float> got = run(p);
    for (int64_t d = 0; d < 8; ++d) CHECK(got.dq[size_t(2 * 8 + d)] == 0);
  });
}

// Over seeds, the sampled gradient has the gradient from all candidates as its mean.
TEST(sampling_is_unbiased) {
  for (const GradientRule rule : {GradientRule::lower_bound, GradientRule::exact}) {
    Sizes s = sizes(1, 2, 1, 2, 24, 30, 4, 3, 2, 64);
    s.rule = rule;
    s.causal = true;
    Problem<uint16_t, float> p(s, 71);
    const Gradients<float> all = run(p);
    p.s.num_samples = 3;
    const int draws = 3000;
    std::vector<double> sum(all.dq.size() + all.dk.size()), squares(sum.size());
    for (int64_t draw = 0; draw < draws; ++draw) {
      const int64_t seed = 1000 + draw;
      const Gradients<float> got = run(p, 1, &seed);
      for (size_t i = 0; i < sum.size(); ++i) {
        const double x = i < got.dq.size() ? got.dq[i] : got.dk[i - got.dq.size()];
        sum[i] += x, squares[i] += x * x;
      }
    }
    double largest = 0, total = 0;
    for (size_t i = 0; i < sum.size(); ++i) {
      const double mean = sum[i] / draws, variance = std::max(0.0, squares[i] / draws - mean * mean);
      const double expected = i < all.dq.size() ? all.dq[i] : all.dk[i - all.dq.size()];
      const double z = (mean - expected) / (std::sqrt(variance / draws) + 1e-5);
      largest = std::max(largest, std::fabs(z)), total += z * z;
    }
    // 312 scores: one beyond 5 has probability 2e-4 if they are normal.
    CHECK(largest < 5);
    CHECK_NEAR(total / double(sum.size()), 1, 0.5);
  }
}

TEST(one_bucket_for_all_stays_linear) {
  check::for_each_isa([](const std::string&) {
    for (const bool causal : {false, true}) {
      const int64_t tokens = check::emulated() ? 2000 : 20000;
      Sizes s = sizes(1, 1, 1, 2, tokens, tokens, 8, 8, 24, 4, 1);
      s.rule = GradientRule::exact, s.causal = causal;
      const Problem<int32_t, float> p(s, 81);
      const auto start = std::chrono::steady_clock::now();
      const Gradients<float> got = run(p);
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      // The work is 0.05 s; by pairs it would be a minute.
      CHECK(check::emulated() || seconds.count() < 5);
      for (const int64_t n : {int64_t(0), int64_t(3), int64_t(777), tokens - 1}) {
        const Row exact = sampled::gradient(p, true, 0, 0, n);
        for (size_t d = 0; d < 8; ++d) CHECK_NEAR(got.dq[size_t(n) * 8 + d], exact.value[d], 1e-6 * exact.magnitude);
      }
    }
  });
}

TEST(empty_sides) {
  check::for_each_isa([](const std::string&) {
    for (const auto& s :
         {sizes(1, 2, 1, 3, 0, 9, 8, 4, 3, 4), sizes(1, 2, 1, 3, 9, 0, 8, 4, 3, 4), sizes(0, 2, 1, 3, 9, 9, 8, 4, 3, 4),
          sizes(2, 0, 0, 3, 9, 9, 8, 4, 3, 4), sizes(2, 0, 3, 3, 9, 9, 8, 4, 3, 4)}) {
      const Problem<uint16_t, float> p(s, 91);
      const Gradients<float> got = run(p, 2);
      for (const float x : got.dq) CHECK(x == 0);
      for (const float x : got.dk) CHECK(x == 0);
    }
  });
}

TEST(errors_name_what_is_wrong) {
  const Sizes good = sizes(1, 2, 1, 3, 5, 6, 8, 4, 3, 4);
  const auto with = [&](auto change) {
    Problem<uint16_t, float> p(good, 1);
    change(p);
    run(p);
  };
  CHECK_THROWS(with([](auto& p) { p.s.hash_bits = 25; }),
               "[bucket_gradient] hash_bits: expected a value in [1, 24], got 25");
  CHECK_THROWS(with([](auto& p) { p.s.num_samples = 0; }),
               "[bucket_gradient] num_samples: expected a value in [1, 64], got 0");
  CHECK_THROWS(with([](auto& p) { p.s.num_samples = 65; }),
               "[bucket_gradient] num_samples: expected a value in [1, 64]");
  CHECK_THROWS_AS(std::invalid_argument, with([](auto& p) { p.codes_k[13] = 8; }),
                  "[bucket_gradient] codes_k: expected values in [0, 8), got 8 at [0, 0, 2, 1]");
  CHECK_THROWS(with([](auto& p) { p.codes_q[17] = 99; }),
               "[bucket_gradient] codes_q: expected values in [0, 8), got 99 at [0, 1, 0, 2]");
  CHECK_THROWS_AS(Unsupported, run(Problem<uint16_t, float>(sizes(1, 1, 1, 1, 2, 2, 8, 513, 3, 4), 1)),
                  "[bucket_gradient] no kernel on cpu");
  std::vector<float> x(500), dq(80), dk(48);
  std::vector<uint16_t> codes(30);
  const Queue queue = Queue::cpu(1);
  BucketGradientOptions o;
  o.hash_bits = 3;
  const auto call = [&](const ConstTensor& k, const ConstTensor& codes_q, const Tensor& out) {
    bucket_gradient(queue, make_tensor(x.data(), {1, 2, 5, 4}), make_tensor(x.data(), {1, 2, 5, 8}), k,
                    make_tensor(x.data(), {1, 1, 6, 4}), codes_q, make_tensor(codes.data(), {1, 1, 3, 6}), o, out,
                    make_tensor(dk.data(), {1, 1, 6, 8}), Workspace());
  };
  const Tensor k = make_tensor(x.data(), {1, 1, 6, 8}), codes_q = make_tensor(codes.data(), {1, 2, 3, 5});
  const Tensor out = make_tensor(dq.data(), {1, 2, 5, 8});
  CHECK_THROWS(call(make_tensor(x.data(), {1, 1, 6, 7}), codes_q, out),
               "[bucket_gradient] k: expected shape [B, Hkv, M, D]");
  CHECK_THROWS_AS(TypeMismatch, call(make_tensor(reinterpret_cast<half*>(x.data()), {1, 1, 6, 8}), codes_q, out),
                  "[bucket_gradient] k: expected dtype float32, got float16");
  CHECK_THROWS(call(k, make_tensor(codes.data(), {1, 2, 3, 4}), out),
               "[bucket_gradient] codes_q: expected shape [B, H, R, N]");
  CHECK_THROWS(call(k, codes_q, make_tensor(x.data(), {1, 2, 5, 8})),
               "[bucket_gradient] dq: expected an output that shares no memory with another argument");
  CHECK_THROWS(call(k, codes_q, out), "[bucket_gradient] workspace: expected at least");
}
