// orthogonal_projection against the same decompositions in double, and against what theory says of its rows, on every
// row of kernels this machine can run.
#include <algorithm>

#include "check.h"
#include "subquad/error.h"
#include "subquad/orthogonal_projection.h"

using namespace subquad;

namespace {

constexpr ProjectionKind kAll[] = {ProjectionKind::haar, ProjectionKind::hadamard, ProjectionKind::published};

std::vector<float> project(ProjectionKind kind, int64_t heads, int64_t features, int64_t dim, Seed seed = 7,
                           int threads = 2) {
  std::vector<float> out(size_t(heads * features * dim), NAN);
  const Queue queue = Queue::cpu(threads);
  const Tensor view = make_tensor(out.data(), {heads, features, dim});
  const int64_t bytes = orthogonal_projection_workspace_bytes(queue, seed, kind, view);
  std::vector<char> workspace(size_t(bytes), char(0xff));
  orthogonal_projection(queue, seed, kind, view, {workspace.data(), bytes});
  return out;
}

int64_t block_rows(ProjectionKind kind, int64_t dim) {
  int64_t rows = kind == ProjectionKind::hadamard ? 1 : dim;
  while (rows < dim) rows *= 2;
  return rows;
}

std::vector<float> normals(int64_t heads, int64_t rows, int64_t dim, uint32_t stream) {
  std::vector<float> z(size_t(heads * rows * dim));
  random_normal(Queue::cpu(1), 7, stream, make_tensor(z.data(), {heads, rows, dim}));
  return z;
}

double dot(const float* a, const float* b, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += double(a[d]) * double(b[d]);
  return sum;
}

/// Q of a matrix [dim, dim] by Householder reflections as LAPACK makes them, evaluated in T, and the signs of R's
/// diagonal; the sums over rows begin at row `turn`.
template <class T>
struct Decomposition {
  int64_t dim, turn;
  std::vector<T> a, q, signs;

  Decomposition(const float* matrix, int64_t size, int64_t where) : dim(size), turn(where), signs(size_t(size), T(1)) {
    a.assign(matrix, matrix + dim * dim);
    q.assign(size_t(dim * dim), T(0));
    std::vector<std::vector<T>> v;
    std::vector<T> tau;
    for (int64_t j = 0; j < dim; ++j) {
      std::vector<T> x(size_t(dim), T(0));
      for (int64_t i = j; i < dim; ++i) x[size_t(i)] = a[size_t(i * dim + j)];
      T rest = 0;
      for (int64_t i = j + 1; i < dim; ++i) rest += x[size_t(i)] * x[size_t(i)];
      const T alpha = x[size_t(j)], norm = std::sqrt(alpha * alpha + rest);
      const T beta = j + 1 == dim ? alpha : alpha < 0 ? norm : -norm;
      for (int64_t i = j + 1; i < dim; ++i) x[size_t(i)] /= alpha - beta;
      x[size_t(j)] = 1;
      signs[size_t(j)] = beta < 0 ? T(-1) : T(1);
      tau.push_back(j + 1 == dim ? T(0) : (beta - alpha) / beta);
      v.push_back(x);
      reflect(a, v.back(), tau.back());
    }
    for (int64_t j = 0; j < dim; ++j) q[size_t(j * dim + j)] = 1;
    for (int64_t j = dim - 1; j >= 0; --j) reflect(q, v[size_t(j)], tau[size_t(j)]);
  }

  void reflect(std::vector<T>& matrix, const std::vector<T>& v, T tau) const {
    for (int64_t c = 0; c < dim; ++c) {
      T sum = 0;
      for (int64_t i = 0; i < dim; ++i) sum += v[size_t((i + turn) % dim)] * matrix[size_t((i + turn) % dim * dim + c)];
      for (int64_t i = 0; i < dim; ++i) matrix[size_t(i * dim + c)] -= tau * v[size_t(i)] * sum;
    }
  }
};

/// The rows of one block in T, without their lengths.
template <class T>
std::vector<T> rows_of_q(ProjectionKind kind, const float* matrix, int64_t dim, int64_t turn = 0) {
  const Decomposition<T> d(matrix, dim, turn);
  std::vector<T> rows(size_t(dim * dim));
  for (int64_t i = 0; i < dim; ++i)
    for (int64_t c = 0; c < dim; ++c)
      rows[size_t(i * dim + c)] = d.q[size_t(c * dim + i)] * (kind == ProjectionKind::haar ? d.signs[size_t(i)] : T(1));
  return rows;
}

void check_householder(ProjectionKind kind, int64_t features, int64_t dim) {
  const int64_t heads = 2, rows = (features + dim - 1) / dim * dim;
  const std::vector<float> matrices = normals(heads, rows, dim, 4), z = normals(heads, features, dim, 5);
  std::vector<double> exact;
  double granted = 0, largest = 0;
  for (int64_t first = 0; first < heads * rows; first += dim) {
    const std::vector<double> u = rows_of_q<double>(kind, &matrices[size_t(first * dim)], dim);
    // The worst conditioned column decides the largest error: one order of the sums is a poor sample of it.
    std::vector<std::vector<float>> plain;
    for (int64_t turn = 0; turn < std::min<int64_t>(dim, 16); ++turn)
      plain.push_back(rows_of_q<float>(kind, &matrices[size_t(first * dim)], dim, turn));
    for (int64_t i = 0; i < dim && first % rows + i < features; ++i) {
      const float* row = &z[size_t((first / rows * features + first % rows + i) * dim)];
      const double length = std::sqrt(dot(row, row, dim));
      for (int64_t d = 0; d < dim; ++d) {
        exact.push_back(length * u[size_t(i * dim + d)]);
        for (const std::vector<float>& p : plain)
          granted = std::max(granted, std::fabs(length * double(p[size_t(i * dim + d)]) - exact.back()));
        largest = std::max(largest, std::fabs(exact.back()));
      }
    }
  }
  check::for_each_isa([&](const std::string&) {
    const std::vector<float> out = project(kind, heads, features, dim);
    CHECK(out.size() == exact.size());
    double error = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
      const double difference = std::fabs(double(out[i]) - exact[i]);
      error = difference <= error ? error : difference;
    }
    // The lengths and their product with the rows round too: three roundings.
    if (error <= 2 * granted + 3 * 0x1p-24 * largest) return;
    char text[160];
    std::snprintf(text, sizeof text, "kind %d, F %d, D %d: error %.3g, plain %.3g, largest %.3g", int(kind),
                  int(features), int(dim), error, granted, largest);
    check::fail(__FILE__, __LINE__, text);
  });
}

}  // namespace

TEST(householder) {
  for (ProjectionKind kind : {ProjectionKind::haar, ProjectionKind::published})
    for (int64_t dim : {1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 100})
      for (int64_t features : {int64_t(1), dim, 2 * dim + dim / 2}) check_householder(kind, features, dim);
}

TEST(hadamard) {
  for (int64_t dim : {1, 2, 3, 8, 17, 64, 100}) {
    const int64_t rows = block_rows(ProjectionKind::hadamard, dim), features = rows + rows / 2 + 1, heads = 2;
    const int64_t blocks = (features + rows - 1) / rows;
    std::vector<float> signs(size_t(heads * 3 * blocks * rows));
    random_signs(Queue::cpu(1), 7, 6, make_tensor(signs.data(), {heads, 3 * blocks, rows}));
    const std::vector<float> z = normals(heads, features, dim, 5);
    const auto h = [](int64_t i, int64_t j) { return __builtin_popcountll(uint64_t(i & j)) % 2 ? -1.0 : 1.0; };
    check::for_each_isa([&](const std::string&) {
      const std::vector<float> out = project(ProjectionKind::hadamard, heads, features, dim);
      for (int64_t row = 0; row < heads * features; ++row) {
        const int64_t i = row % features;
        const float* sign = &signs[size_t((row / features * blocks + i / rows) * 3 * rows)];
        std::vector<double> u(size_t(rows), 0.0), next(size_t(rows), 0.0);
        for (int64_t k = 0; k < rows; ++k) u[size_t(k)] = h(i % rows, k);
        for (int step = 2; step > 0; --step) {
          for (int64_t k = 0; k < rows; ++k) {
            next[size_t(k)] = 0;
            for (int64_t j = 0; j < rows; ++j)
              next[size_t(k)] += u[size_t(j)] * double(sign[step * rows + j]) * h(j, k);
          }
          u = next;
        }
        const double length = std::sqrt(dot(&z[size_t(row * dim)], &z[size_t(row * dim)], dim));
        for (int64_t d = 0; d < dim; ++d) {
          const double exact = length * u[size_t(d)] * double(sign[d]) / (double(rows) * std::sqrt(double(dim)));
          CHECK_NEAR(out[size_t(row * dim + d)], exact, 5 * 0x1p-24 * std::fabs(exact));
        }
      }
    });
  }
}

TEST(rows_are_orthogonal_and_as_long_as_drawn) {
  check::for_each_isa([](const std::string&) {
    for (ProjectionKind kind : kAll) {
      for (int64_t dim : {2, 16, 64, 128, 512}) {
        const int64_t features = dim + dim / 2;
        const std::vector<float> out = project(kind, 1, features, dim), z = normals(1, features, dim, 5);
        double worst = 0;
        for (int64_t i = 0; i < features; ++i) {
          const float *row = &out[size_t(i * dim)], *drawn = &z[size_t(i * dim)];
          const double length = std::sqrt(dot(drawn, drawn, dim));
          CHECK_NEAR(std::sqrt(dot(row, row, dim)), length, 2e-6 * length);
          for (int64_t j = i / dim * dim; j < i; ++j) {
            const float* other = &out[size_t(j * dim)];
            worst = std::max(worst, std::fabs(dot(row, other, dim)) / std::sqrt(dot(other, other, dim)) / length);
          }
        }
        CHECK_NEAR(worst, 0, 1e-5);
      }
    }
  });
}

TEST(shorter_projections_and_fewer_heads_are_parts) {
  check::for_each_isa([](const std::string&) {
    for (ProjectionKind kind : kAll) {
      for (int64_t dim : {1, 5, 20, 70}) {
        const int64_t features = 3 * dim + 1;
        const std::vector<float> all = project(kind, 3, features, dim);
        for (int64_t fewer : {int64_t(1), dim - dim / 2, dim, dim + 1}) {
          const std::vector<float> part = project(kind, 2, fewer, dim);
          for (int64_t i = 0; i < 2 * fewer * dim; ++i) {
            const int64_t head = i / (fewer * dim), rest = i % (fewer * dim);
            CHECK(part[size_t(i)] == all[size_t(head * features * dim + rest)]);
          }
        }
      }
    }
  });
}

// 5 standard deviations everywhere: n draws of a sign, of a mean, and of a square, whose deviation is sqrt(2).
TEST(elements_of_haar_rows_are_normal) {
  check::for_each_isa([](const std::string&) {
    for (ProjectionKind kind : {ProjectionKind::haar, ProjectionKind::hadamard}) {
      const int64_t heads = 20000, dim = 4;
      const std::vector<float> out = project(kind, heads, dim, dim);
      for (int64_t at = 0; at < dim * dim; ++at) {
        double positive = 0, sum = 0, squares = 0;
        for (int64_t h = 0; h < heads; ++h) {
          const double x = out[size_t(h * dim * dim + at)];
          positive += x > 0 ? 1 : x == 0 ? 0.5 : 0, sum += x, squares += x * x;
        }
        const double n = double(heads);
        CHECK_NEAR(positive / n, 0.5, 2.5 / std::sqrt(n));
        CHECK_NEAR(sum / n, 0, 5 / std::sqrt(n));
        if (kind == ProjectionKind::haar) CHECK_NEAR(squares / n, 1, 5 * std::sqrt(2 / n));
      }
    }
  });
}

TEST(first_elements_of_published_rows_are_negative) {
  check::for_each_isa([](const std::string&) {
    for (int64_t dim : {2, 8, 33}) {
      const int64_t heads = 200, features = 2 * dim;
      const std::vector<float> out = project(ProjectionKind::published, heads, features, dim);
      for (int64_t row = 0; row < heads * features; row += dim) CHECK(out[size_t(row * dim)] < 0.0f);
    }
  });
}

TEST(published_and_haar_rows_differ_by_signs) {
  check::for_each_isa([](const std::string&) {
    const int64_t dim = 24;
    const std::vector<float> a = project(ProjectionKind::haar, 2, dim, dim);
    const std::vector<float> b = project(ProjectionKind::published, 2, dim, dim);
    int64_t equal = 0;
    for (size_t i = 0; i < a.size(); ++i) CHECK(std::fabs(a[i]) == std::fabs(b[i])), equal += a[i] == b[i];
    CHECK(equal > 0 && equal < int64_t(a.size()));
  });
}

TEST(any_number_of_threads) {
  check::for_each_isa([](const std::string&) {
    for (ProjectionKind kind : kAll) {
      const std::vector<float> one = project(kind, 3, 50, 19, 7, 1);
      for (int threads : {2, 3, 16}) CHECK(one == project(kind, 3, 50, 19, 7, threads));
      const int64_t seed = 7;
      Seed by_address;
      by_address.pointer = &seed;
      CHECK(one == project(kind, 3, 50, 19, by_address));
      CHECK(one != project(kind, 3, 50, 19, 8));
    }
  });
}

TEST(strides) {
  check::for_each_isa([](const std::string&) {
    for (ProjectionKind kind : kAll) {
      const int64_t heads = 2, features = 21, dim = 9, gap = 3;
      const std::vector<float> packed = project(kind, heads, features, dim);
      std::vector<float> out(size_t(heads * features * (dim + gap)), -5);
      Tensor view = make_tensor(out.data(), {heads, features, dim});
      view.stride[0] = dim + gap, view.stride[1] = heads * (dim + gap);
      std::vector<char> workspace(1 << 20);
      orthogonal_projection(Queue::cpu(2), 7, kind, view, {workspace.data(), 1 << 20});
      for (int64_t i = 0; i < features * heads * (dim + gap); ++i) {
        const int64_t d = i % (dim + gap), row = i / (dim + gap);
        const float want = d < dim ? packed[size_t((row % heads * features + row / heads) * dim + d)] : -5;
        CHECK(out[size_t(i)] == want);
      }
    }
  });
}

TEST(empty) {
  check::for_each_isa([](const std::string&) {
    for (ProjectionKind kind : kAll) CHECK(project(kind, 0, 5, 4).empty() && project(kind, 2, 0, 4).empty());
  });
}

TEST(errors) {
  const ProjectionKind kind = ProjectionKind::haar;
  CHECK_THROWS(project(kind, 1, 2, 0), "[orthogonal_projection] out: expected D of at least 1, got 0");
  CHECK_THROWS_AS(Unsupported, project(kind, 1, 2, 513), "for a head dimension above 512");
  std::vector<float> out(12);
  const Queue queue = Queue::cpu(1);
  CHECK_THROWS(orthogonal_projection(queue, 7, kind, make_tensor(out.data(), {3, 4}), {}),
               "[orthogonal_projection] out: expected shape [H, F, D], got [3, 4]");
  CHECK_THROWS(orthogonal_projection(queue, 7, kind, make_tensor(out.data(), {1, 3, 4}), {}),
               "[orthogonal_projection] workspace: expected at least");
  CHECK_THROWS_AS(TypeMismatch, orthogonal_projection(queue, 7, kind, Tensor(), {}),
                  "[orthogonal_projection] out: expected an array, got none");
  Tensor repeated = make_tensor(out.data(), {1, 3, 4});
  repeated.stride[1] = 0;
  CHECK_THROWS(orthogonal_projection(queue, 7, kind, repeated, {}),
               "an output whose elements have memory of their own");
}
