// sea_estimate against the equations in double, on every row of kernels this machine can run.
#include <array>

#include "sea_reference.h"
#include "subquad/error.h"

using namespace sea_test;

namespace {

/// The answers in double, and in float with the sums forwards and backwards: where a norm divides by little, one of
/// them alone may be lucky.
struct Expected {
  Answers exact, plain[2];

  explicit Expected(const Problem& p) : exact(answers<double>(p)), plain{answers<float>(p), answers<float>(p, true)} {}

  /// At most twice the largest error of the float evaluation, or `floor` of it.
  void check_one(const char* what, const Array& got, std::vector<double> Answers::* member, double floor) const {
    double granted = floor;
    const std::vector<double>& values = exact.*member;
    for (const Answers& one : plain)
      for (size_t i = 0; i < values.size(); ++i) granted = std::fmax(granted, std::fabs((one.*member)[i] - values[i]));
    for (size_t i = 0; i < values.size(); ++i) {
      const double value = got.get(int64_t(i)), error = std::fabs(value - values[i]);
      if (error <= 2 * granted) continue;
      char text[160];
      std::snprintf(text, sizeof text, ": element %d is %.9g against %.9g, error %.3g above %.3g", int(i), value,
                    values[i], error, 2 * granted);
      return fail(__FILE__, __LINE__, what + std::string(text));
    }
  }

  void check(const Problem& p, double floor) const {
    check_one("probs", p.probs, &Answers::probs, floor);
    check_one("row_scale", p.row_scale, &Answers::row_scale, floor);
    check_one("mix", p.mix, &Answers::mix, floor);
  }
};

// The smallest error that a float evaluation of the whole chain is granted.
constexpr double kFloor = 5e-7;

void check_problem(const Sizes& sizes) {
  Problem p(sizes);
  const Expected expected(p);
  check::for_each_isa([&](const std::string&) {
    p.run();
    expected.check(p, kFloor);
  });
}

/// The tokens [from, to) of x.
Tensor part(Tensor x, int64_t from, int64_t to) {
  const int64_t skipped = from * x.stride[2] * dtype_bytes(x.dtype);
  x.data = static_cast<const unsigned char*>(x.data) + skipped, x.shape[2] = to - from;
  return x;
}

/// One call per piece [cuts[i], cuts[i + 1]), with the state handed on.
void run_in_pieces(Problem& p, const std::vector<int64_t>& cuts) {
  const Queue queue = Queue::cpu(2);
  p.use_state(), p.use_new_state();
  for (Array* x : {&p.state_s, &p.state_z, &p.rows1, &p.rows2})
    for (int64_t i = 0; i < x->size(); ++i) x->set(i, 0);
  for (int32_t& count : p.count) count = 0;
  SeaState before = p.state, after = p.new_state;
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    const auto of = [&](const Array& x) { return part(x.view, cuts[i], cuts[i + 1]); };
    SeaEstimateOptions options = p.options;
    if (options.key_mask.defined()) {
      options.key_mask.data = static_cast<const bool*>(options.key_mask.data) + cuts[i];
      options.key_mask.shape[1] = cuts[i + 1] - cuts[i];
    }
    const SeaState none, &from = i ? before : none;
    std::vector<char> space(size_t(sea_estimate_workspace_bytes(queue, of(p.q), of(p.k), of(p.v), p.weights, options,
                                                                from, of(p.probs), of(p.row_scale), of(p.mix), after)));
    sea_estimate(queue, of(p.q), of(p.k), of(p.v), p.weights, options, from, of(p.probs), of(p.row_scale), of(p.mix),
                 after, {space.data(), int64_t(space.size())});
    std::swap(before, after);
  }
}

bool same_answers(const Problem& a, const Problem& b) {
  return same_bits(a.probs.floats(), b.probs.floats()) && same_bits(a.row_scale.floats(), b.row_scale.floats()) &&
         same_bits(a.mix.floats(), b.mix.floats());
}

Sizes sizes_of(bool causal, int64_t batch, int64_t heads, int64_t seq, int64_t dim, int64_t features, int64_t columns) {
  Sizes s;
  s.batch = batch, s.heads = heads, s.seq = seq, s.dim = dim, s.features = features, s.columns = columns;
  s.causal = causal;
  return s;
}

}  // namespace

TEST(lengths) {
  for (bool causal : {false, true})
    for (int64_t n : {1, 2, 3, 7, 63, 64, 65, 130}) check_problem(sizes_of(causal, 1, 3, n, 24, 5, 12));
}

TEST(dims) {
  for (bool causal : {false, true}) {
    for (int64_t d : {1, 3, 16, 17, 64}) check_problem(sizes_of(causal, 1, 1, 20, d, 7, 8));
    for (int64_t m : {1, 15, 16, 31, 32, 33, 70}) check_problem(sizes_of(causal, 1, 2, 20, 9, m, 8));
    for (int64_t k : {4, 12, 64, 132}) check_problem(sizes_of(causal, 1, 2, 9, 6, 4, k));
    check_problem(sizes_of(causal, 2, 2, 70, 64, 33, 64));
  }
  check_problem(sizes_of(false, 1, 1, 5, 4, 3, 6));
  check_problem(sizes_of(true, 1, 1, 3, 200, 300, 16));
}

TEST(several_segments) {
  for (bool causal : {false, true}) check_problem(sizes_of(causal, 1, 2, 700, 8, 6, 8));
}

TEST(dtypes_strides_and_masks) {
  for (bool causal : {false, true})
    for (DType dtype : {DType::f32, DType::f16, DType::bf16})
      for (bool masked : {false, true}) {
        Sizes s = sizes_of(causal, 2, 3, 90, 24, 5, 12);
        s.dtype = dtype, s.masked = masked, s.layout = Layout::loose;
        check_problem(s);
      }
}

TEST(rows_of_probs_sum_to_one) {
  for (bool causal : {false, true}) {
    Problem p(sizes_of(causal, 1, 2, 70, 8, 6, 64));
    check::for_each_isa([&](const std::string&) {
      p.run();
      for (int64_t row = 0; row < 2 * 70; ++row) {
        double sum = 0;
        for (int64_t j = 0; j < 64; ++j) sum += p.probs.get(row * 64 + j);
        CHECK_NEAR(sum, 1, 1e-6);
      }
    });
  }
}

// Keys of very different lengths: of the exponential features nearly all are epsilon.
TEST(huge_norms) {
  for (bool causal : {false, true})
    for (double size : {30.0, 300.0}) {
      Sizes s = sizes_of(causal, 1, 2, 90, 8, 6, 8);
      s.size = size;
      Problem p(s);
      for (int64_t i = 0; i < p.k.size(); i += 7) p.k.set(i, p.k.values[size_t(i)] / size);
      const Expected expected(p);
      check::for_each_isa([&](const std::string&) {
        p.run();
        expected.check(p, kFloor);
      });
    }
}

TEST(masked_tokens_have_no_effect) {
  check::for_each_isa([](const std::string&) {
    for (bool causal : {false, true}) {
      Sizes s = sizes_of(causal, 2, 2, 300, 9, 6, 12);
      s.masked = true;
      Problem nan(s), large(s);
      for (int64_t b = 0; b < 2; ++b)
        for (int64_t n = 0; n < s.seq; ++n) large.mask_token(b, n, large.keep[size_t(b * s.seq + n)], 1e30);
      nan.run(), large.run();
      CHECK(same_answers(nan, large));
      for (int64_t row = 0; row < 4 * 300; ++row) {
        if (nan.keep[size_t(row / 600 * 300 + row % 300)]) continue;
        CHECK(nan.row_scale.get(row) == 0 && nan.mix.get(row) == 0);
        for (int64_t j = 0; j < 12; ++j) CHECK(nan.probs.get(row * 12 + j) == 0);
      }
    }
  });
}

TEST(a_padded_item_equals_the_item_alone) {
  check::for_each_isa([](const std::string&) {
    for (bool causal : {false, true})
      for (int64_t n : {5, 67, 530}) {
        Problem alone(sizes_of(causal, 1, 2, n, 9, 6, 12));
        Sizes s = sizes_of(causal, 2, 2, n + 40, 9, 6, 12);
        s.positions = n;
        Problem padded(s);
        padded.weights = alone.weights;
        for (int64_t b = 0; b < 2; ++b)
          for (int64_t t = 0; t < n + 40; ++t) {
            const int64_t rank = b ? t - 40 : t < n / 2 ? t : t - 40;
            const bool kept = b ? t >= 40 : t < n / 2 || t >= n / 2 + 40;
            padded.mask_token(b, t, kept);
            for (int64_t i = 0; kept && i < 2 * 9; ++i) {
              const int64_t to = ((b * 2 + i / 9) * (n + 40) + t) * 9 + i % 9, from = (i / 9 * n + rank) * 9 + i % 9;
              padded.q.set(to, alone.q.get(from)), padded.k.set(to, alone.k.get(from));
              padded.v.set(to, alone.v.get(from));
            }
          }
        padded.use_mask();
        alone.run(), padded.run();
        bool same = true;
        for (int64_t b = 0; b < 2; ++b)
          for (int64_t h = 0; h < 2; ++h)
            for (int64_t t = 0; t < n; ++t) {
              const int64_t to = (b * 2 + h) * (n + 40) + (b ? t + 40 : t < n / 2 ? t : t + 40), from = h * n + t;
              same &= padded.row_scale.get(to) == alone.row_scale.get(from);
              same &= padded.mix.get(to) == alone.mix.get(from);
              for (int64_t j = 0; j < 12; ++j) same &= padded.probs.get(to * 12 + j) == alone.probs.get(from * 12 + j);
            }
        CHECK(same);
      }
  });
}

TEST(causal_rows_depend_on_no_later_token) {
  check::for_each_isa([](const std::string&) {
    const int64_t n = 300, d = 20, k = 12;
    const Sizes s = sizes_of(true, 1, 2, n, d, 6, k);
    Problem before(s);
    before.run();
    for (double change : {1.0, 1e20, double(INFINITY), double(NAN)})
      for (int64_t token : {290, 130, 101, 3}) {
        Problem p(s);
        for (int64_t i = 0; i < 2 * d; ++i) {
          const int64_t at = (i / d * n + token) * d + i % d;
          for (Array* x : {&p.q, &p.k, &p.v}) x->set(at, x->get(at) + change);
        }
        p.run();
        bool same = true, touched = false;
        for (int64_t row = 0; row < 2 * n; ++row) {
          bool equal = p.row_scale.get(row) == before.row_scale.get(row) && p.mix.get(row) == before.mix.get(row);
          for (int64_t j = 0; j < k; ++j) equal &= p.probs.get(row * k + j) == before.probs.get(row * k + j);
          same &= row % n >= token || equal;
          touched |= row % n == token && !equal;
        }
        CHECK(same);
        CHECK(touched);
      }
  });
}

TEST(threads_do_not_change_bits) {
  check::for_each_isa([](const std::string&) {
    for (bool causal : {false, true})
      for (auto [heads, seq] : {std::pair<int64_t, int64_t>{1, 1100}, {3, 1100}, {1, 27000}}) {
        Sizes s = sizes_of(causal, 2, heads, seq, 5, 3, 4);
        s.masked = true;
        Problem one(s);
        one.use_new_state();
        if (!causal) one.new_state = {};
        one.run(1);
        for (int threads : {2, 3, 16}) {
          Problem other(s);
          if (causal) other.use_new_state();
          other.run(threads);
          CHECK(same_answers(one, other));
          if (!causal) continue;
          CHECK(same_bits(one.new_s.floats(), other.new_s.floats()));
          CHECK(same_bits(one.new_z.floats(), other.new_z.floats()));
          CHECK(same_bits(one.new_rows1.floats(), other.new_rows1.floats()));
          CHECK(same_bits(one.new_rows2.floats(), other.new_rows2.floats()));
          CHECK(one.new_count == other.new_count);
        }
      }
  });
}

TEST(a_call_cut_into_pieces) {
  for (bool masked : {false, true}) {
    const int64_t n = 140;
    Sizes s = sizes_of(true, 2, 2, n, 9, 6, 12);
    s.masked = masked;
    Problem p(s);
    const Expected expected(p);
    std::vector<int64_t> single;
    for (int64_t t = 0; t <= n; ++t) single.push_back(t);
    check::for_each_isa([&](const std::string&) {
      for (const std::vector<int64_t>& cuts :
           {std::vector<int64_t>{0, 1, n}, {0, 64, n}, {0, 3, 3, 70, 139, n}, {0, 0, n, n}, single}) {
        run_in_pieces(p, cuts);
        expected.check(p, kFloor);
      }
    });
  }
}

TEST(the_state_that_goes_out) {
  const int64_t n = 130, d = 6, m = 7, w = 2;
  Sizes s = sizes_of(true, 2, 1, n, d, m, 4 * w);
  s.masked = true;
  Problem p(s);
  p.use_new_state();
  for (int64_t t = 0; t < n; ++t) p.mask_token(1, t, false);
  check::for_each_isa([&](const std::string&) {
    p.run();
    for (int64_t b = 0; b < 2; ++b) {
      const Item<double> item(p, b);
      CHECK(p.new_count[size_t(b)] == item.T);
      std::vector<double> sum(size_t(m * 2 * d)), z(static_cast<size_t>(m));
      for (int64_t t = 0; t < item.T; ++t) {
        const std::vector<double> phi = item.project(&item.k[size_t(t * d)]), value = item.value_row(0, t);
        for (int64_t i = 0; i < m; ++i) {
          z[size_t(i)] += phi[size_t(i)];
          for (int64_t j = 0; j < 2 * d; ++j) sum[size_t(i * 2 * d + j)] += phi[size_t(i)] * value[size_t(j)];
        }
      }
      for (int64_t i = 0; i < m; ++i) CHECK_NEAR(p.new_z.get(b * m + i), z[size_t(i)], 1e-4);
      for (int64_t i = 0; i < m * 2 * d; ++i) CHECK_NEAR(p.new_s.get(b * m * 2 * d + i), sum[size_t(i)], 1e-4);
      for (int64_t c = 0; c < 2; ++c)
        for (int64_t t = 0; t < 4; ++t)
          for (int64_t j = 0; j < w; ++j) {
            const double exact = item.T ? item.rows[size_t(((item.T - 4 + t) * 2 + c) * w + j)] : 0;
            CHECK_NEAR(p.new_rows1.get(((b * 2 + c) * 4 + t) * w + j), exact, 1e-3);
          }
    }
  });
}

TEST(empty) {
  check::for_each_isa([](const std::string&) {
    for (bool causal : {false, true}) {
      for (auto [batch, heads, seq] : {std::array<int64_t, 3>{0, 2, 5}, {2, 0, 5}, {2, 2, 0}}) {
        Problem p(sizes_of(causal, batch, heads, seq, 5, 4, 8));
        if (causal) {
          p.use_state(), p.use_new_state();
          for (Array* x : {&p.state_s, &p.state_z, &p.rows1, &p.rows2})
            for (int64_t i = 0; i < x->size(); ++i) x->set(i, double(i % 100));
          p.own = WeightArrays(sizes_of(causal, batch, heads, 20, 5, 4, 8), 1), p.weights = p.own.weights;
          for (int32_t& count : p.count) count = 7;
        }
        p.run();
        if (!causal || heads == 0) continue;
        CHECK(same_bits(p.new_s.floats(), p.state_s.floats()) && same_bits(p.new_z.floats(), p.state_z.floats()));
        CHECK(same_bits(p.new_rows1.floats(), p.rows1.floats()));
        CHECK(same_bits(p.new_rows2.floats(), p.rows2.floats()));
        CHECK(p.new_count == p.count);
      }
      Problem masked(sizes_of(causal, 1, 2, 70, 5, 4, 8));
      for (int64_t t = 0; t < 70; ++t) masked.mask_token(0, t, false);
      masked.use_mask();
      masked.run();
      for (const Array* x : {&masked.probs, &masked.row_scale, &masked.mix})
        for (float y : x->floats()) CHECK(y == 0);
    }
  });
}

TEST(errors) {
  const auto with = [](bool causal, auto change) {
    Problem p(sizes_of(causal, 2, 3, 6, 5, 4, 8));
    change(p);
    p.run();
  };
  CHECK_THROWS_AS(TypeMismatch, with(true, [](Problem& p) { p.weights.norm_bias = {}; }),
                  "[sea_estimate] norm_bias: expected an array, got none");
  CHECK_THROWS_AS(std::invalid_argument, with(false, [](Problem& p) { p.weights.norm_bias = p.weights.out_bias; }),
                  "[sea_estimate] norm_bias: expected none unless is_causal, got an array");
  CHECK_THROWS(with(true, [](Problem& p) { p.k.view.shape[2] = 5; }),
               "[sea_estimate] k: expected shape [B, H, N, D] = [2, 3, 6, 5], got [2, 3, 5, 5]");
  CHECK_THROWS(with(true, [](Problem& p) { p.probs.view.shape[3] = 6; }),
               "[sea_estimate] probs: expected K a multiple of 4 in [4, 4096], got 6");
  CHECK_THROWS(with(false, [](Problem& p) { p.probs.view.shape[3] = 7; }),
               "[sea_estimate] probs: expected K a multiple of 2 in [4, 4096], got 7");
  CHECK_THROWS(with(true, [](Problem& p) { p.weights.row_weight = p.weights.encoder_weight; }),
               "[sea_estimate] row_weight: expected shape [w C / H, 2d] = [4, 10], got [10, 15]");
  CHECK_THROWS(with(true, [](Problem& p) { p.weights.conv1_weight.stride[1] = 10; }),
               "[sea_estimate] conv1_weight: expected contiguous axes behind the first, got strides apart");
  CHECK_THROWS(with(false, [](Problem& p) { p.use_state(); }),
               "[sea_estimate] state: expected none unless is_causal, got a state");
  CHECK_THROWS(with(true, [](Problem& p) { p.use_state(), p.state.rows2 = {}; }),
               "[sea_estimate] state.rows2: expected an array, got none");
  CHECK_THROWS(with(true, [](Problem& p) { p.use_state(), p.new_state = p.state, p.use_state(); }),
               "[sea_estimate] new_state.s: expected an output that shares no memory");
  CHECK_THROWS(with(true, [](Problem& p) { p.mix.view.data = p.row_scale.view.data; }),
               "[sea_estimate] row_scale: expected an output that shares no memory");
  CHECK_THROWS(with(true, [](Problem& p) { p.use_state(), p.count[1] = 1; }),
               "[sea_estimate] position: expected at least 7 rows, the tokens of item 1, got 6");
  CHECK_THROWS(with(true, [](Problem& p) { p.use_state(), p.count[0] = -1; }),
               "[sea_estimate] state.count: expected values of at least 0, got -1");
  Problem p(sizes_of(true, 1, 1, 4, 5, 4, 8));
  CHECK_THROWS(sea_estimate(Queue::cpu(1), p.q.view, p.k.view, p.v.view, p.weights, p.options, {}, p.probs.view,
                            p.row_scale.view, p.mix.view, {}, {}),
               "[sea_estimate] workspace: expected at least ");
  // Room for the tokens that count: two of six are masked.
  Sizes few = sizes_of(true, 1, 1, 6, 5, 4, 8);
  few.positions = 4;
  Problem masked(few);
  masked.mask_token(0, 1, false), masked.mask_token(0, 4, false), masked.use_mask();
  masked.run();
  CHECK(masked.probs.get(0) > 0);
}
