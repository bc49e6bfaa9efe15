#include <limits>
#include <random>

#include "check.h"
#include "subquad/error.h"
#include "subquad/l2_normalize.h"

using namespace subquad;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class T>
constexpr double kEps = std::is_same_v<T, float>  ? 0x1p-24
                        : std::is_same_v<T, half> ? 0x1p-11
                                                  : 0x1p-8;

template <class T>
T rounded(double x) {
  T y;
  from_float(float(x), &y);
  return y;
}

/// The widest rows that the row in use takes.
int64_t widest() { return check::emulated() ? 256 : 512; }

/// Rows of random direction whose length is 2^exponent times something near 1, but for one row of zeros.
template <class T>
std::vector<T> random_rows(int64_t rows, int64_t dim, int exponent, unsigned seed = 3, int64_t zero_row = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<T> x;
  for (int64_t i = 0; i < rows * dim; ++i)
    x.push_back(rounded<T>(i / dim == zero_row ? 0 : std::ldexp(normal(random) / std::sqrt(double(dim)), exponent)));
  return x;
}

template <class T>
double length_of(const T* row, int64_t dim) {
  double square = 0;
  for (int64_t i = 0; i < dim; ++i) square += std::pow(double(to_float(row[i])), 2);
  return std::sqrt(square);
}

template <class T, class Y>
void check_forward(int64_t dim, int exponent) {
  const int64_t rows = 12;
  const std::vector<T> x = random_rows<T>(rows, dim, exponent);
  for (int threads = 1; threads <= 3; ++threads) {
    std::vector<Y> y(x.size(), rounded<Y>(NAN));
    std::vector<float> lse(size_t(rows), NAN);
    l2_normalize(Queue::cpu(threads), make_tensor(x.data(), {2, 3, 2, dim}), make_tensor(y.data(), {2, 3, 2, dim}),
                 make_tensor(lse.data(), {2, 3, 2}));
    for (int64_t row = 0; row < rows; ++row) {
      const double length = length_of(&x[size_t(row * dim)], dim), expected = std::log(length);
      CHECK_NEAR(lse[size_t(row)], expected, length > 0 ? 1e-7 + 0x1p-23 * std::fabs(expected) : 0);
      for (int64_t i = row * dim; i < (row + 1) * dim; ++i) {
        const double unit = length > 0 ? to_float(x[size_t(i)]) / length : 0;
        CHECK_NEAR(to_float(y[size_t(i)]), unit, (kEps<Y> + 0x1p-22) * std::fabs(unit) + 0x1p-25);
      }
    }
  }
}

template <class T, class Y>
void check_backward(int64_t dim, int exponent) {
  const int64_t rows = 12;
  const std::vector<T> dy = random_rows<T>(rows, dim, 2, 5, 4);
  const std::vector<Y> x = random_rows<Y>(rows, dim, 0);
  std::vector<Y> y(x.size());
  std::vector<float> lse(static_cast<size_t>(rows));
  const Queue queue = Queue::cpu(2);
  const Tensor unit = make_tensor(y.data(), {3, 1, 4, dim}), lengths = make_tensor(lse.data(), {3, 1, 4});
  l2_normalize(queue, make_tensor(x.data(), {3, 1, 4, dim}), unit, lengths);
  for (float& value : lse) value += float(exponent * std::log(2.0));
  std::vector<T> dx(dy.size(), rounded<T>(NAN));
  l2_normalize_bwd(queue, make_tensor(dy.data(), {3, 1, 4, dim}), unit, lengths,
                   make_tensor(dx.data(), {3, 1, 4, dim}));
  for (int64_t row = 0; row < rows; ++row) {
    const double inverse = std::exp(-double(lse[size_t(row)]));
    double along = 0, size = 0;
    for (int64_t i = row * dim; i < (row + 1) * dim; ++i) {
      along += double(to_float(dy[size_t(i)])) * to_float(y[size_t(i)]);
      size += std::fabs(double(to_float(dy[size_t(i)])));
    }
    for (int64_t i = row * dim; i < (row + 1) * dim; ++i) {
      const double exact =
          lse[size_t(row)] == -kInfinity ? 0 : (to_float(dy[size_t(i)]) - to_float(y[size_t(i)]) * along) * inverse;
      CHECK_NEAR(to_float(dx[size_t(i)]), exact, kEps<T> * std::fabs(exact) + (exact == 0 ? 0 : 1e-6 * size * inverse));
    }
  }
}

}  // namespace

TEST(rows_become_unit_rows) {
  check::for_each_isa([](const std::string&) {
    for (const int64_t dim : {int64_t(1), int64_t(2), int64_t(7), int64_t(15), int64_t(16), int64_t(17), int64_t(33),
                              int64_t(64), int64_t(129), widest()}) {
      check_forward<float, float>(dim, 0);
      check_forward<half, half>(dim, 3);
      check_forward<bfloat16, bfloat16>(dim, -4);
      check_forward<float, half>(dim, 0);
      check_forward<half, float>(dim, 1);
    }
  });
}

TEST(no_finite_row_overflows_or_underflows) {
  check::for_each_isa([](const std::string&) {
    for (const int exponent : {-146, -140, -126, -100, -70, -46, -40, 55, 60, 64, 70, 100, 124})
      for (const int64_t dim : {int64_t(1), int64_t(3), int64_t(64), widest()}) {
        check_forward<float, float>(dim, exponent);
        if (exponent > -126) check_forward<bfloat16, float>(dim, exponent);
      }
    const int64_t dim = widest();
    const float largest = std::numeric_limits<float>::max();
    const std::vector<float> x(size_t(dim), largest);
    std::vector<float> y(x.size());
    float lse = 0;
    l2_normalize(Queue::cpu(1), make_tensor(x.data(), {1, 1, 1, dim}), make_tensor(y.data(), {1, 1, 1, dim}),
                 make_tensor(&lse, {1, 1, 1}));
    CHECK_NEAR(y[77], 1 / std::sqrt(double(dim)), 1e-8);
    CHECK_NEAR(lse, std::log(double(largest)) + std::log(double(dim)) / 2, 1e-5);
  });
}

TEST(lengths_near_one_have_accurate_logarithms) {
  check::for_each_isa([](const std::string&) {
    for (int step = -40; step <= 40; ++step) {
      const float x = float(1 + step * 0.01);
      float y = 0, lse = 0;
      l2_normalize(Queue::cpu(1), make_tensor(&x, {1, 1, 1, 1}), make_tensor(&y, {1, 1, 1, 1}),
                   make_tensor(&lse, {1, 1, 1}));
      CHECK_NEAR(lse, std::log(double(x)), 1e-9 + 0x1p-24 * std::fabs(std::log(double(x))));
      CHECK(y == 1);
    }
  });
}

TEST(infinity_and_nan_stay_in_their_row) {
  check::for_each_isa([](const std::string&) {
    float x[3][2] = {{1, INFINITY}, {NAN, 0}, {3, 4}}, y[3][2], lse[3];
    l2_normalize(Queue::cpu(1), make_tensor(&x[0][0], {1, 1, 3, 2}), make_tensor(&y[0][0], {1, 1, 3, 2}),
                 make_tensor(lse, {1, 1, 3}));
    CHECK(lse[0] == INFINITY && y[0][0] == 0 && std::isnan(y[0][1]));
    CHECK(std::isnan(lse[1]) && std::isnan(y[1][0]) && std::isnan(y[1][1]));
    CHECK_NEAR(y[2][0], 0.6, 1e-7);
    CHECK_NEAR(lse[2], std::log(5.0), 1e-6);
  });
}

TEST(in_place_and_strided) {
  check::for_each_isa([](const std::string&) {
    const int64_t dim = 19;
    const std::vector<float> x = random_rows<float>(12, dim, 0);
    std::vector<float> plain(x.size()), own = x, wide(x.size() + 12 * 4, -5);
    const Queue queue = Queue::cpu(2);
    const Tensor in_place = make_tensor(own.data(), {2, 3, 2, dim});
    Tensor strided = make_tensor(wide.data(), {2, 2, 3, dim + 4});
    strided.shape[1] = 3, strided.shape[2] = 2, strided.shape[3] = dim;
    std::swap(strided.stride[1], strided.stride[2]);
    l2_normalize(queue, make_tensor(x.data(), {2, 3, 2, dim}), make_tensor(plain.data(), {2, 3, 2, dim}), Tensor());
    l2_normalize(queue, in_place, in_place, Tensor());
    l2_normalize(queue, make_tensor(x.data(), {2, 3, 2, dim}), strided, Tensor());
    CHECK(own == plain);
    for (int64_t row = 0; row < 12; ++row) {
      const int64_t b = row / 6, h = row / 2 % 3, n = row % 2;
      const float* moved = &wide[size_t(b * strided.stride[0] + h * strided.stride[1] + n * strided.stride[2])];
      CHECK(!std::memcmp(moved, &plain[size_t(row * dim)], size_t(dim) * sizeof(float)));
      CHECK(moved[dim] == -5 && moved[dim + 3] == -5);
    }
  });
}

TEST(gradients) {
  check::for_each_isa([](const std::string&) {
    for (const int64_t dim : {int64_t(1), int64_t(5), int64_t(16), int64_t(31), int64_t(64), widest()}) {
      check_backward<float, float>(dim, 0);
      check_backward<bfloat16, float>(dim, 1);
      check_backward<float, half>(dim, 0);
      for (const int exponent : {-125, -60, -7, 9, 80, 120}) check_backward<float, float>(dim, exponent);
    }
  });
}

TEST(empty_arrays) {
  float x = 0, y = 0, lse = 0;
  l2_normalize(Queue::cpu(1), make_tensor(&x, {2, 0, 3, 4}), make_tensor(&y, {2, 0, 3, 4}),
               make_tensor(&lse, {2, 0, 3}));
  l2_normalize_bwd(Queue::cpu(1), make_tensor(&x, {2, 1, 0, 4}), make_tensor(&x, {2, 1, 0, 4}),
                   make_tensor(&lse, {2, 1, 0}), make_tensor(&y, {2, 1, 0, 4}));
}

TEST(errors_name_what_is_wrong) {
  std::vector<float> x(2000), y(2000), lse(8);
  const Queue queue = Queue::cpu(1);
  const Tensor a = make_tensor(x.data(), {1, 2, 3, 4}), b = make_tensor(y.data(), {1, 2, 3, 4});
  CHECK_THROWS_AS(
      Unsupported,
      l2_normalize(queue, make_tensor(x.data(), {1, 1, 2, 513}), make_tensor(y.data(), {1, 1, 2, 513}), Tensor()),
      "for a head dimension above 512");
  CHECK_THROWS(l2_normalize(queue, a, make_tensor(y.data(), {1, 2, 4, 3}), Tensor()),
               "[l2_normalize] y: expected shape [B, H, N, D] = [1, 2, 3, 4], got [1, 2, 4, 3]");
  CHECK_THROWS(l2_normalize(queue, a, make_tensor(x.data() + 2, {1, 2, 3, 4}), Tensor()),
               "[l2_normalize] y: expected an output that shares no memory with another argument");
  CHECK_THROWS_AS(TypeMismatch,
                  l2_normalize(queue, make_tensor(reinterpret_cast<int32_t*>(x.data()), {1, 2, 3, 4}), b, Tensor()),
                  "[l2_normalize] x: expected dtype float32 or float16 or bfloat16, got int32");
  CHECK_THROWS(l2_normalize(queue, a, b, make_tensor(lse.data(), {1, 2, 4})),
               "[l2_normalize] lse: expected shape [B, H, N] = [1, 2, 3], got [1, 2, 4]");
  CHECK_THROWS_AS(TypeMismatch, l2_normalize_bwd(queue, a, a, Tensor(), b),
                  "[l2_normalize_bwd] lse: expected an array, got none");
  CHECK_THROWS(l2_normalize_bwd(queue, a, a, make_tensor(lse.data(), {1, 2, 3}), a),
               "[l2_normalize_bwd] dx: expected an output that shares no memory with another argument");
}
