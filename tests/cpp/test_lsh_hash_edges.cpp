// Bucket codes at the borders of tiles, vectors and groups of hashes, and of rows with extreme or no finite norm.
#include <cmath>
#include <cstdint>
#include <vector>

#include "lsh_hash_problem.h"

using namespace subquad;
using namespace check;

namespace {

/// Norms far outside the range of sums; every third token is ordinary, so neighbours differ.
TEST(codes_do_not_depend_on_the_norm) {
  Problem p;
  p.num_hashes = 20;  // several transforms
  p.draw(9);
  const std::vector<int> expected = expected_hadamard_codes(p);
  for (float scale : {0x1p100f, 0x1p-100f, 0x1p120f, 0x1p-110f}) {
    Problem scaled = p;
    for (size_t i = 0; i < p.x.size(); ++i)
      if (i / size_t(p.dim) % 3) scaled.x[i] = p.x[i] * scale;
    check::for_each_isa([&](const std::string&) {
      CHECK(hadamard_codes<float, uint16_t>(scaled) == expected);
      check_planes_codes(scaled, planes_codes<float, uint16_t>(scaled));
    });
  }
  // The products round here, so only the rows of kernels are comparable.
  for (float scale : {1e30f, 1e-43f}) {
    Problem extreme = p;
    for (size_t i = 0; i < p.x.size(); ++i)
      if (i / size_t(p.dim) % 2) extreme.x[i] = p.x[i] * scale;
    std::vector<int> first;
    check::for_each_isa([&](const std::string&) {
      const std::vector<int> codes = hadamard_codes<float, uint16_t>(extreme);
      if (first.empty()) first = codes;
      CHECK(codes == first);
      check_planes_codes(extreme, planes_codes<float, uint16_t>(extreme));
    });
  }
}

TEST(zero_and_nan_give_code_zero_and_harm_no_neighbour) {
  Problem p;
  p.draw(3);
  const std::vector<int> expected = expected_hadamard_codes(p);
  for (int64_t n = 0; n < p.seq; n += 2)
    for (int64_t i = 0; i < p.batch * p.heads; ++i)
      for (int64_t d = 0; d < p.dim; ++d)
        p.x[size_t((i * p.seq + n) * p.dim + d)] = n % 4 ? 0.0f : (d == 5 ? NAN : p.x[size_t(d)]);
  check::for_each_isa([&](const std::string&) {
    const std::vector<int> codes = hadamard_codes<float, uint16_t>(p), dense = planes_codes<float, uint16_t>(p);
    for (size_t i = 0; i < codes.size(); ++i) {
      const bool replaced = int64_t(i) % p.seq % 2 == 0;
      CHECK(codes[i] == (replaced ? 0 : expected[i]));
      if (replaced) CHECK(dense[i] == 0);
    }
  });
}

/// Rows that start at multiples of 16 bytes, and rows that can only be read in pairs.
TEST(aligned_rows) {
  for (int64_t dim : {2, 8, 24, 64, 72, 128, 192, 256})
    for (int64_t gap : {0, 2, 8}) {
      Problem p;
      p.batch = 1, p.heads = 2, p.seq = 9, p.dim = dim, p.gap = gap, p.num_hashes = 9, p.hash_bits = 9;
      p.draw(uint64_t(dim));
      const std::vector<int> expected = expected_hadamard_codes(p);
      const std::vector<int> expected_f16 = expected_hadamard_codes(rounded<half>(p));
      const std::vector<int> expected_bf16 = expected_hadamard_codes(rounded<bfloat16>(p));
      check::for_each_isa([&](const std::string&) {
        CHECK(hadamard_codes<float, uint16_t>(p) == expected);
        CHECK(hadamard_codes<half, int32_t>(p) == expected_f16);
        CHECK(hadamard_codes<bfloat16, uint16_t>(p) == expected_bf16);
        check_planes_codes(p, planes_codes<float, int32_t>(p));
        check_planes_codes(rounded<half>(p), planes_codes<half, uint16_t>(p));
        check_planes_codes(rounded<bfloat16>(p), planes_codes<bfloat16, uint16_t>(p));
      });
    }
}

TEST(every_tile_of_tokens) {
  for (int64_t dim : {6, 129, 250})
    for (int64_t seq : {1, 63, 64, 65, 127, 128, 129, 256, 257}) {
      Problem p;
      p.batch = 1, p.heads = 2, p.plane_heads = 1, p.seq = seq, p.dim = dim, p.num_hashes = 3, p.hash_bits = 11;
      p.draw(uint64_t(seq));
      const std::vector<int> expected = expected_hadamard_codes(p);
      check::for_each_isa([&](const std::string&) {
        CHECK(hadamard_codes<float, uint16_t>(p) == expected);
        check_planes_codes(p, planes_codes<float, uint16_t>(p));
      });
    }
}

/// Codes of more transforms than a block of threads holds at once, and of more planes.
TEST(many_hashes) {
  for (int64_t dim : {40, 100, 200})
    for (int64_t hash_bits : {1, 3, 11, 24})
      for (Carving carving : {Carving::strided, Carving::published}) {
        Problem p;
        p.batch = 1, p.heads = 2, p.seq = 2, p.dim = dim, p.carving = carving;
        p.hash_bits = hash_bits, p.num_hashes = 2200 / hash_bits;
        p.draw(uint64_t(hash_bits));
        const std::vector<int> expected = expected_hadamard_codes(p);
        check::for_each_isa([&](const std::string&) { CHECK(hadamard_codes<float, int32_t>(p) == expected); });
        if (carving == Carving::strided && dim == 40)
          check::for_each_isa([&](const std::string&) { check_planes_codes(p, planes_codes<float, int32_t>(p)); });
      }
}

/// A row or a plane with infinities: the bits are those of the sums in IEEE arithmetic, in any order.
TEST(infinities) {
  Problem p;
  p.batch = 1, p.heads = 2, p.plane_heads = 2, p.dim = 20;
  p.draw(5);
  for (int64_t n = 0; n < p.seq; n += 3) p.x[size_t(n * p.dim + n % p.dim)] = n % 2 ? INFINITY : -INFINITY;
  for (int64_t n = 0; n < p.seq; n += 6) p.x[size_t(n * p.dim + 1)] = INFINITY;
  // A negative NaN in a plane of the first head; infinities in two of the second.
  const int64_t second = p.num_hashes * p.hash_bits;
  p.planes[size_t(3 * p.dim + 3)] = 0, p.planes[size_t(5 * p.dim + 1)] = -NAN;
  p.planes[size_t((second + 8) * p.dim + 2)] = INFINITY, p.planes[size_t((second + 9) * p.dim + 4)] = -INFINITY;
  const std::vector<int> transformed = expected_hadamard_codes(p);
  check::for_each_isa([&](const std::string&) {
    CHECK(hadamard_codes<float, uint16_t>(p) == transformed);
    check_planes_codes(p, planes_codes<float, uint16_t>(p));
    const std::vector<int> codes = planes_codes<bfloat16, int32_t>(p);
    const Problem stored = rounded<bfloat16>(p);
    check_planes_codes(stored, codes);
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t r = 0; r < p.num_hashes; ++r)
        for (int64_t n = 0; n < p.seq; ++n)
          for (int64_t j = 0; j < p.hash_bits; ++j) {
            const float* plane = &p.planes[size_t((h * second + r * p.hash_bits + j) * p.dim)];
            double sum = 0;
            for (int64_t d = 0; d < p.dim; ++d) sum += double(stored.row(0, h, n)[d]) * plane[d];
            if (!std::isfinite(sum)) CHECK((codes[size_t(p.code_index(0, h, r, n))] >> j & 1) == (sum > 0));
          }
  });
}

/// Planes and signs as views: gaps behind every plane, the order of the heads turned round.
TEST(planes_and_signs_are_views) {
  Problem p;
  p.seq = 9, p.dim = 64, p.num_hashes = 30;
  p.draw(6);
  const Queue queue = Queue::cpu(1);
  const StridedInput<float> x(p);
  const int64_t rows = p.num_hashes * p.hash_bits, sign_rows = 3 * p.parts();
  std::vector<float> planes(size_t(2 * rows * 67)), signs(size_t(2 * sign_rows * 70));
  for (int64_t h = 0; h < 2; ++h) {
    for (int64_t i = 0; i < rows; ++i)
      std::memcpy(&planes[size_t(((1 - h) * rows + i) * 67)], &p.planes[size_t((h * rows + i) * 64)], 64 * 4);
    for (int64_t i = 0; i < sign_rows; ++i)
      std::memcpy(&signs[size_t(((1 - h) * sign_rows + i) * 70)], &p.signs[size_t((h * sign_rows + i) * 64)], 64 * 4);
  }
  ConstTensor plane_view =
      make_tensor(static_cast<const float*>(&planes[size_t(rows * 67)]), {2, p.num_hashes, p.hash_bits, 64});
  plane_view.stride[0] = -rows * 67, plane_view.stride[1] = p.hash_bits * 67, plane_view.stride[2] = 67;
  ConstTensor sign_view = make_tensor(static_cast<const float*>(&signs[size_t(sign_rows * 70)]), {2, 3, p.parts(), 64});
  sign_view.stride[0] = -sign_rows * 70, sign_view.stride[1] = p.parts() * 70, sign_view.stride[2] = 70;
  const std::vector<int> expected = expected_hadamard_codes(p);
  check::for_each_isa([&](const std::string&) {
    const StridedCodes<uint16_t> dense(p), fast(p);
    std::vector<char> scratch = unclean(lsh_hash_workspace_bytes(queue, x.view, plane_view, dense.view));
    lsh_hash(queue, x.view, plane_view, dense.view, {scratch.data(), int64_t(scratch.size())});
    check_planes_codes(p, dense.values(p));
    scratch = unclean(lsh_hash_hadamard_workspace_bytes(queue, x.view, sign_view, p.hash_bits, p.carving, fast.view));
    lsh_hash_hadamard(queue, x.view, sign_view, p.hash_bits, p.carving, fast.view,
                      {scratch.data(), int64_t(scratch.size())});
    CHECK(fast.values(p) == expected);
  });
}

}  // namespace
