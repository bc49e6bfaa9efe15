// feature_map and its gradient against the equations in double, on every row of kernels this machine can run.
#include "feature_map_reference.h"
#include "subquad/error.h"

using namespace features;

namespace {

void check_problem(const Sizes& sizes) {
  Problem p(sizes);
  const Answers answers(p);
  check::for_each_isa([&](const std::string&) {
    p.forward(), p.backward();
    check_answers(p, answers);
  });
}

}  // namespace

TEST(dims) {
  for_each_map([](Sizes s) {
    for (int64_t d : {1, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100}) s.d = d, check_problem(s);
    s.d = 512, s.f = 5, s.size = 0.5, check_problem(s);
  });
}

TEST(lengths_and_features) {
  for_each_map([](Sizes s) {
    for (int64_t n : {1, 7, 8, 63, 64, 65, 130}) s.n = n, check_problem(s);
    s.n = 19;
    for (int64_t f : {1, 3, 8, 15, 16, 17, 63, 64, 65, 130}) s.f = f, check_problem(s);
    s.n = 700, s.f = 9, check_problem(s);
  });
}

TEST(heads_and_batches) {
  for_each_map([](Sizes s) {
    for (int64_t blocks : {1, 2, 6}) {
      s.batch = 3, s.heads = 6, s.blocks = blocks;
      for (int64_t n : {1, 5, 30}) s.n = n, s.gap = n, check_problem(s);
    }
  });
}

TEST(dtypes) {
  for_each_map([](Sizes s) {
    s.batch = 2, s.heads = 2, s.n = 70, s.d = 24, s.f = 70;
    for (DType dtype : {DType::f16, DType::bf16})
      for (int64_t gap : {0, 5}) s.dtype = dtype, s.gap = gap, check_problem(s);
  });
}

TEST(scales_and_sizes) {
  for_each_map([](Sizes s) {
    if (s.features == Features::elu) return;
    for (double scale : {0.01, 1.0, 3.0}) s.scale = scale, check_problem(s);
    // Logarithms up to some thousands, angles up to 1e4; the features themselves would overflow.
    s.scale = 1, s.size = s.log ? 15 : s.features == Features::trig ? 600 : 1, check_problem(s);
  });
}

TEST(huge_angles_stay_in_range) {
  check::for_each_isa([](const std::string&) {
    for (float angle : {1e5f, -1e6f, -3e7f, 1e20f, -3e38f, INFINITY, NAN}) {
      const float one = 1;
      FeatureMapOptions options;
      options.features = Features::trig, options.scale = 1;
      float out[2] = {7, 7};
      std::vector<char> workspace(1 << 20);
      feature_map(Queue::cpu(1), make_tensor(&angle, {1, 1, 1, 1}), make_tensor(&one, {1, 1, 1}), options,
                  make_tensor(out, {1, 1, 1, 2}), {}, {workspace.data(), 1 << 20});
      for (float y : out) CHECK(std::isfinite(angle) ? std::fabs(y) <= 1.0000002f : std::isnan(y));
    }
  });
}

// Worst cases of the reduction: floats next to multiples of pi / 2, and every scale below.
TEST(sines_and_cosines) {
  std::vector<float> angles;
  for (int k = -6366; k <= 6366; ++k)
    for (double shift : {-0.785398, -0.3, 0.0, 0.3, 0.785398}) angles.push_back(float(k * 1.5707963267948966 + shift));
  for (double x = 1e-30; x < 1; x *= 1.7) angles.push_back(float(x));
  const int64_t count = int64_t(angles.size());
  const float one = 1;
  FeatureMapOptions options;
  options.features = Features::trig, options.scale = 1;
  check::for_each_isa([&](const std::string&) {
    std::vector<float> out(size_t(2 * count));
    std::vector<char> workspace(1 << 20);
    feature_map(Queue::cpu(1), make_tensor(angles.data(), {1, 1, count, 1}), make_tensor(&one, {1, 1, 1}), options,
                make_tensor(out.data(), {1, 1, count, 2}), {}, {workspace.data(), 1 << 20});
    double error = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double x = angles[size_t(i)];
      error = std::max(error, std::fabs(out[size_t(2 * i)] - std::sin(x)));
      error = std::max(error, std::fabs(out[size_t(2 * i + 1)] - std::cos(x)));
    }
    CHECK_NEAR(error, 0, 1e-7);
  });
}

TEST(gradients_are_differences) {
  for_each_map([](Sizes s) {
    s.n = 3, s.d = 4, s.f = 5, s.heads = 2, s.batch = 2, s.blocks = 2;
    Problem p(s);
    const Reference<double> at(p);
    const auto value = [&] {
      const Reference<double> r(p);
      double sum = 0;
      for (size_t i = 0; i < r.out.size(); ++i) sum += r.out[i] * p.dout.values[i];
      for (size_t i = 0; p.trig() && i < r.log_factor.size(); ++i) sum += r.log_factor[i] * p.dlog.values[i];
      return sum;
    };
    const auto difference = [&](double& x) {
      const double h = 1e-6, old = x;
      x = old + h;
      const double above = value();
      x = old - h;
      const double below = value();
      x = old;
      return (above - below) / (2 * h);
    };
    p.backward();
    for (size_t i = 0; i < p.x.values.size(); ++i) {
      CHECK_NEAR(at.dx[i], difference(p.x.values[i]), 1e-7);
      CHECK_NEAR(p.dx.get(int64_t(i)), difference(p.x.values[i]), 1e-5);
    }
    for (size_t i = 0; !p.elu() && i < p.projection.values.size(); ++i) {
      CHECK_NEAR(at.dprojection[i], difference(p.projection.values[i]), 1e-7);
      CHECK_NEAR(p.dprojection.get(int64_t(i)), difference(p.projection.values[i]), 1e-5);
    }
  });
}

TEST(slope_of_relu_at_zero) {
  check::for_each_isa([](const std::string&) {
    Problem p({Features::relu});
    for (int64_t d = 0; d < p.s.d; ++d) p.x.set(d, 0);
    p.backward();
    for (int64_t d = 0; d < p.s.d; ++d) CHECK(p.dx.get(d) == 0.0f);
    CHECK(p.dx.get(p.s.d) != 0.0f);
  });
}

TEST(masked_tokens_have_no_effect) {
  for_each_map([](Sizes s) {
    s.batch = 2, s.heads = 4, s.blocks = 2, s.masked = true;
    for (DType dtype : {DType::f32, DType::f16})
      for (int64_t n : {9, 75}) s.dtype = dtype, s.n = n, s.gap = n, check_problem(s);
  });
  check::for_each_isa([](const std::string&) {
    for_each_map([](Sizes s) {
      s.n = 75, s.masked = true;
      Problem nan(s), number(s);
      for (int64_t n = 0; n < s.n; ++n) {
        if (nan.kept(n)) continue;
        for (int64_t d = 0; d < s.d; ++d) number.x.set(n * s.d + d, 3);
        for (int64_t i = 0; i < s.outputs(); ++i) number.dout.set(n * s.outputs() + i, 1);
        number.dlog.set(n, 1);
      }
      for (Problem* p : {&nan, &number}) p->forward(), p->backward();
      expect_same(nan.out, number.out, "out depends on a masked token");
      expect_same(nan.dx, number.dx, "dx depends on a masked token");
      expect_same(nan.dprojection, number.dprojection, "dprojection depends on a masked token");
    });
  });
}

TEST(a_row_alone_equals_the_row_in_a_batch) {
  check::for_each_isa([](const std::string&) {
    for_each_map([](Sizes s) {
      s.n = 150, s.f = 70;
      Problem all(s);
      s.n = 1;
      Problem one(s);
      for (int64_t d = 0; d < s.d; ++d) one.x.set(d, all.x.values[size_t(97 * s.d + d)]);
      for (int64_t i = 0; i < s.outputs(); ++i) one.dout.set(i, all.dout.values[size_t(97 * s.outputs() + i)]);
      one.dlog.set(0, all.dlog.values[97]);
      for (int64_t d = 0; d < s.d; ++d) all.x.set(96 * s.d + d, NAN);
      for (Problem* p : {&all, &one}) p->forward(), p->backward();
      for (int64_t i = 0; i < s.outputs(); ++i) CHECK(one.out.get(i) == all.out.get(97 * s.outputs() + i));
      for (int64_t d = 0; d < s.d; ++d) CHECK(one.dx.get(d) == all.dx.get(97 * s.d + d));
    });
  });
}

TEST(any_number_of_threads) {
  check::for_each_isa([](const std::string&) {
    for_each_map([](Sizes s) {
      s.batch = 2, s.heads = 4, s.blocks = 2, s.n = 333, s.f = 70;
      Problem one(s);
      one.forward(1), one.backward(1);
      for (int threads : {2, 3, 16}) {
        Problem more(s);
        more.forward(threads), more.backward(threads);
        expect_same(one.out, more.out, "out depends on the number of threads");
        expect_same(one.log_factor, more.log_factor, "log_factor depends on the number of threads");
        expect_same(one.dx, more.dx, "dx depends on the number of threads");
        expect_same(one.dprojection, more.dprojection, "dprojection depends on the number of threads");
        Problem apart(s);
        apart.backward(threads, true, false), apart.backward(threads, false, true);
        expect_same(one.dx, apart.dx, "dx depends on whether dprojection is wanted");
        expect_same(one.dprojection, apart.dprojection, "dprojection depends on whether dx is wanted");
      }
    });
  });
}

TEST(broadcast_and_reversed_tokens) {
  check::for_each_isa([](const std::string&) {
    Problem p({Features::positive, true, 2, 3, 1, 40});
    const Tensor x = p.x.view;
    p.x.view.stride[0] = 0, p.x.view.stride[2] = -p.s.d;
    p.x.view.data = static_cast<const float*>(x.data) + (p.s.n - 1) * p.s.d;
    for (int64_t i = 0; i < x.numel(); ++i) p.x.values[size_t(i)] = p.x.get(i);
    p.forward(), p.backward();
    check_answers(p, Answers(p));
  });
}

TEST(empty) {
  check::for_each_isa([](const std::string&) {
    for_each_map([](Sizes s) {
      for (int axis = 0; axis < 3; ++axis) {
        s.batch = axis == 0 ? 0 : 2, s.heads = axis == 1 ? 0 : 2, s.n = axis == 2 ? 0 : 2;
        Problem p(s);
        p.forward(), p.backward();
        if (!p.elu())
          for (int64_t i = 0; i < p.dprojection.view.numel(); ++i) CHECK(p.dprojection.get(i) == 0.0f);
      }
    });
  });
}

TEST(errors) {
  const auto run = [](Sizes s, auto&& change) {
    Problem p(s);
    change(p);
    p.forward();
    p.backward();
  };
  const Sizes good = {Features::positive, false, 1, 4, 2};
  const auto nothing = [](Problem&) {};
  run(good, nothing);
  CHECK_THROWS(run(good, [](Problem& p) { p.options.scale = -1; }),
               "[feature_map] scale: expected a finite number above 0, or 0 for D^-1/2, got -1");
  CHECK_THROWS(run(good, [](Problem& p) { p.options.scale = NAN; }), "got nan");
  CHECK_THROWS(run(good, [](Problem& p) { p.options.scale = 1e-60; }), "[feature_map] scale");
  CHECK_THROWS(run(good, [](Problem& p) { p.options.features = Features::relu, p.options.log = true; }),
               "[feature_map] log: expected False with other features than positive and hyperbolic, got True");
  CHECK_THROWS(run({Features::positive, false, 1, 4, 3}, nothing),
               "[feature_map] projection: expected a leading axis that divides H = 4, got 3");
  CHECK_THROWS(run({Features::positive, false, 1, 4, 0}, nothing), "got 0");
  CHECK_THROWS(run({Features::positive, false, 1, 1, 1, 3, 4, 0}, nothing),
               "[feature_map] projection: expected F of at least 1, got 0");
  CHECK_THROWS(run({Features::positive, false, 1, 1, 1, 3, 0}, nothing),
               "[feature_map] x: expected D of at least 1, got 0");
  CHECK_THROWS_AS(Unsupported, run({Features::positive, false, 1, 1, 1, 3, 513}, nothing),
                  "for a head dimension above 512");
  CHECK_THROWS_AS(TypeMismatch, run(good, [](Problem& p) { p.projection.view = {}; }),
                  "[feature_map] projection: expected an array, got none");
  CHECK_THROWS(run(good, [](Problem& p) { p.out.view.shape[3] = 19; }),
               "[feature_map] out: expected shape [B, H, N, F'] = [1, 4, 21, 20], got [1, 4, 21, 19]");
  CHECK_THROWS(run({Features::positive, true, 2, 4, 2, 21, 4, 4, DType::f32, 0, 1, 0, true},
                   [](Problem& p) { p.options.mask.shape[1] = 20; }),
               "[feature_map] mask: expected shape [B, N] = [2, 21], got [2, 20]");
  CHECK_THROWS(run(good, [](Problem& p) { p.out.view.data = p.x.view.data; }), "shares no memory");

  const Sizes elu = {Features::elu};
  CHECK_THROWS(run(elu, [](Problem& p) { p.options.scale = 1; }),
               "[feature_map] scale: expected none with elu features, got 1");
  Problem p(elu), q(good);
  const Queue queue = Queue::cpu(1);
  CHECK_THROWS(feature_map(queue, p.x.view, p.projection.view, p.options, p.out.view, {}, {}),
               "[feature_map] projection: expected none with elu features, got an array");
  CHECK_THROWS(feature_map(queue, p.x.view, {}, p.options, p.out.view, p.log_factor.view, {}),
               "[feature_map] log_factor: expected none with other features than trig, got an array");
  CHECK_THROWS(feature_map_bwd(queue, p.dout.view, {}, p.x.view, {}, p.options, p.dx.view, p.dprojection.view, {}),
               "[feature_map_bwd] dprojection: expected none with elu features, got an array");
  CHECK_THROWS(feature_map(queue, q.x.view, q.projection.view, q.options, q.out.view, {}, {}),
               "[feature_map] workspace: expected at least");
}
