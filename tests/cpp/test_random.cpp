// Random numbers: the words of the generator, the three distributions on every row, views, errors.
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "core/philox.h"
#include "subquad/error.h"
#include "subquad/random.h"

using namespace subquad;

namespace {

using Fill = void (*)(const Queue&, Seed, uint32_t, Tensor);

uint32_t word_at(uint64_t seed, uint32_t stream, int64_t l, int64_t n, int64_t d) {
  return philox::words(seed, uint32_t(n), uint32_t(d / 4), uint32_t(l), stream).w[d % 4];
}

/// Box-Muller in double. log1p where the number is close to one, since its logarithm is close to zero.
double normal_at(uint64_t seed, uint32_t stream, int64_t l, int64_t n, int64_t d) {
  const double first = word_at(seed, stream, l, n, d - d % 2) + 1.0,
               second = word_at(seed, stream, l, n, d - d % 2 + 1);
  const double log = first > 0x1p31 ? std::log1p((first - 0x1p32) * 0x1p-32) : std::log(first * 0x1p-32);
  const double angle = 2 * M_PI * (second * 0x1p-32);
  return std::sqrt(-2 * log) * (d % 2 ? std::sin(angle) : std::cos(angle));
}

std::vector<float> filled(Fill fill, uint64_t seed, uint32_t stream, std::initializer_list<int64_t> shape,
                          int threads = 1) {
  int64_t count = 1;
  for (int64_t extent : shape) count *= extent;
  std::vector<float> out(size_t(count), NAN);
  fill(Queue::cpu(threads), seed, stream, make_tensor(out.data(), shape));
  return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(float));
}

TEST(philox_published_vectors) {
  const philox::Words zeros = philox::words(0, 0, 0, 0, 0);
  const uint32_t ones = 0xffffffffu;
  const philox::Words full = philox::words(~uint64_t(0), ones, ones, ones, ones);
  const philox::Words pi = philox::words(0x299f31d0a4093822u, 0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u);
  const uint32_t expected[3][4] = {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u},
                                   {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu},
                                   {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}};
  for (int i = 0; i < 4; ++i) {
    CHECK(zeros.w[i] == expected[0][i]);
    CHECK(full.w[i] == expected[1][i]);
    CHECK(pi.w[i] == expected[2][i]);
  }
}

TEST(every_number_comes_from_its_own_word) {
  check::for_each_isa([](const std::string&) {
    for (int64_t cols : {1, 2, 3, 4, 5, 15, 16, 17, 31, 63, 64, 65, 100, 129}) {
      const uint64_t seed = 0x9abcdef012345678u + uint64_t(cols);
      const std::vector<float> uniform = filled(random_uniform, seed, 17, {2, 3, 5, cols});
      const std::vector<float> signs = filled(random_signs, seed, 18, {2, 3, 5, cols});
      const std::vector<float> normal = filled(random_normal, seed, 0xffffffffu, {2, 3, 5, cols});
      size_t i = 0;
      for (int64_t l = 0; l < 6; ++l)
        for (int64_t n = 0; n < 5; ++n)
          for (int64_t d = 0; d < cols; ++d, ++i) {
            CHECK(uniform[i] == float(word_at(seed, 17, l, n, d) >> 8) * 0x1p-24f);
            CHECK(signs[i] == (word_at(seed, 18, l, n, d) >> 31 ? -1.0f : 1.0f));
            const double exact = normal_at(seed, 0xffffffffu, l, n, d);
            CHECK_NEAR(normal[i], exact, 3e-7 * std::fmax(1.0, std::fabs(exact)));
          }
    }
  });
}

TEST(normals_are_accurate_and_equal_on_every_row) {
  std::vector<float> first;
  check::for_each_isa([&](const std::string&) {
    const std::vector<float> x = filled(random_normal, 5, 20, {3, 100, 1000});
    if (first.empty()) first = x;
    CHECK(same_bits(x, first));
  });
  double worst = 0, sum = 0, squares = 0;
  for (size_t i = 0; i < first.size(); ++i) {
    const double exact = normal_at(5, 20, int64_t(i / 100000), int64_t(i / 1000 % 100), int64_t(i % 1000));
    worst = std::fmax(worst, std::fabs(first[i] - exact) / std::fmax(1.0, std::fabs(exact)));
    sum += exact, squares += exact * exact;
  }
  CHECK_NEAR(worst, 0, 3e-7);
  // Means of 300000 numbers: five standard errors.
  CHECK_NEAR(sum / 3e5, 0, 5 / std::sqrt(3e5));
  CHECK_NEAR(squares / 3e5, 1, 5 * std::sqrt(2 / 3e5));
}

TEST(threads_and_pieces_change_nothing) {
  check::for_each_isa([](const std::string&) {
    for (Fill fill : {random_uniform, random_normal, random_signs}) {
      CHECK(same_bits(filled(fill, 3, 0, {7, 400, 33}), filled(fill, 3, 0, {7, 400, 33}, 4)));
      const std::vector<float> whole = filled(fill, 3, 0, {2, 40001}, 4), part = filled(fill, 3, 0, {1, 39999});
      CHECK(same_bits({whole.begin(), whole.begin() + 39999}, part));
    }
  });
}

TEST(seed_may_be_read_from_memory) {
  const int64_t seed = -5;
  Seed pointer;
  pointer.pointer = &seed;
  pointer.value = 1;
  check::for_each_isa([&](const std::string&) {
    std::vector<float> out(40);
    random_normal(Queue::cpu(1), pointer, 2, make_tensor(out.data(), {4, 10}));
    CHECK(same_bits(out, filled(random_normal, uint64_t(-5), 2, {4, 10})));
  });
}

TEST(missing_axes_count_as_one) {
  const std::vector<float> all = filled(random_uniform, 8, 0, {1, 1, 7});
  CHECK(same_bits(all, filled(random_uniform, 8, 0, {7})));
  CHECK(same_bits(all, filled(random_uniform, 8, 0, {1, 1, 1, 1, 1, 7})));
  CHECK(same_bits({all[0]}, filled(random_uniform, 8, 0, {})));
  CHECK(same_bits(filled(random_uniform, 8, 0, {6, 5, 7}), filled(random_uniform, 8, 0, {3, 1, 2, 1, 5, 7})));
}

TEST(views_get_their_elements_and_nothing_else) {
  const std::vector<float> expected = filled(random_normal, 4, 0, {6, 5, 21});
  check::for_each_isa([&](const std::string&) {
    std::vector<float> memory(6 * 7 * 30, 99.0f);
    Tensor out = make_tensor(memory.data(), {2, 3, 5, 21});
    // Rows backwards, gaps between rows and between heads.
    out.stride[0] = 3 * 7 * 30, out.stride[1] = 7 * 30, out.stride[2] = -30;
    out.data = memory.data() + 4 * 30;
    random_normal(Queue::cpu(2), 4, 0, out);
    size_t untouched = 0;
    for (float x : memory) untouched += x == 99.0f;
    CHECK(untouched == memory.size() - expected.size());
    for (int64_t l = 0; l < 6; ++l)
      for (int64_t n = 0; n < 5; ++n)
        for (int64_t d = 0; d < 21; ++d)
          CHECK(memory[size_t((l * 7 + 4 - n) * 30 + d)] == expected[size_t((l * 5 + n) * 21 + d)]);
  });
}

TEST(empty_arrays_are_left_alone) {
  float* nothing = nullptr;
  for (Fill fill : {random_uniform, random_normal, random_signs}) {
    fill(Queue::cpu(1), 1, 0, make_tensor(nothing, {0, 3, 4}));
    fill(Queue::cpu(1), 1, 0, make_tensor(nothing, {2, 3, 0}));
  }
}

TEST(mistakes_are_named) {
  const Queue queue = Queue::cpu(1);
  float memory[64];
  int32_t integers[8];
  CHECK_THROWS_AS(TypeMismatch, random_uniform(queue, 1, 0, Tensor()), "[random_uniform] out: expected an array");
  CHECK_THROWS_AS(TypeMismatch, random_normal(queue, 1, 0, make_tensor(integers, {8})),
                  "[random_normal] out: expected dtype float32, got int32");
  Tensor gaps = make_tensor(memory, {4, 4});
  gaps.stride[1] = 2, gaps.stride[0] = 8;
  CHECK_THROWS_AS(std::invalid_argument, random_signs(queue, 1, 0, gaps), "[random_signs] out: expected a contiguous");
  Tensor overlapping = make_tensor(memory, {4, 4});
  overlapping.stride[0] = 2;
  CHECK_THROWS_AS(std::invalid_argument, random_signs(queue, 1, 0, overlapping), "memory of their own");
  Tensor swapped = make_tensor(memory, {2, 3, 2, 2});
  swapped.stride[0] = 4, swapped.stride[1] = 8;
  CHECK_THROWS_AS(std::invalid_argument, random_signs(queue, 1, 0, swapped),
                  "axes before the last two that flatten without a copy");
  CHECK_THROWS_AS(Unsupported,
                  random_uniform(Queue::cuda(0, nullptr), 1, 0, make_tensor(memory, {4}, {DeviceType::cuda, 0})),
                  "[random_uniform]");
}

}  // namespace
