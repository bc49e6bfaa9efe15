// Bucket codes: both forms against the formula, on every row, with strides and tails; errors.
#include <cmath>
#include <cstdint>
#include <vector>

#include "lsh_hash_problem.h"
#include "subquad/error.h"

using namespace subquad;
using namespace check;

namespace {

const int64_t kDims[] = {1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 64, 65, 100, 128, 129, 200, 256, 300, 512};

bool too_wide(int64_t dim) { return check::emulated() && dim > 256; }

TEST(planes_every_dim) {
  check::for_each_isa([](const std::string&) {
    for (int64_t dim : kDims) {
      if (too_wide(dim)) continue;
      Problem p;
      p.dim = dim, p.seq = 1 + dim % 70;
      p.draw(uint64_t(dim));
      check_planes_codes(p, planes_codes<float, uint16_t>(p));
      check_planes_codes(rounded<half>(p), planes_codes<half, uint16_t>(p));
      check_planes_codes(rounded<bfloat16>(p), planes_codes<bfloat16, int32_t>(p));
    }
  });
}

TEST(planes_every_tail) {
  check::for_each_isa([](const std::string&) {
    Problem p;
    p.batch = 1, p.heads = 2, p.plane_heads = 1, p.dim = 19, p.num_hashes = 3, p.hash_bits = 5;
    for (p.seq = 1; p.seq < 140; p.seq += 1 + p.seq / 20) {
      p.draw(uint64_t(p.seq));
      check_planes_codes(p, planes_codes<float, uint16_t>(p));
    }
  });
}

TEST(planes_every_number_of_bits) {
  check::for_each_isa([](const std::string&) {
    Problem p;
    p.batch = 1, p.seq = 18, p.dim = 12;
    for (p.hash_bits = 1; p.hash_bits <= 24; ++p.hash_bits)
      for (p.num_hashes = 1; p.num_hashes <= 7; p.num_hashes += 2) {
        p.draw(uint64_t(p.hash_bits));
        check_planes_codes(p, planes_codes<float, int32_t>(p));
        if (p.hash_bits <= 16) check_planes_codes(p, planes_codes<float, uint16_t>(p));
      }
  });
}

TEST(hadamard_every_dim) {
  for (int64_t dim : kDims) {
    Problem p;
    p.dim = dim, p.seq = 1 + dim % 41, p.num_hashes = 7, p.hash_bits = 11;
    p.draw(uint64_t(dim));
    const std::vector<int> expected = expected_hadamard_codes(p);
    const std::vector<int> expected_f16 = expected_hadamard_codes(rounded<half>(p));
    const std::vector<int> expected_bf16 = expected_hadamard_codes(rounded<bfloat16>(p));
    check::for_each_isa([&](const std::string&) {
      if (too_wide(dim)) return;
      CHECK(hadamard_codes<float, uint16_t>(p) == expected);
      CHECK(hadamard_codes<float, int32_t>(p) == expected);
      CHECK(hadamard_codes<half, uint16_t>(p) == expected_f16);
      CHECK(hadamard_codes<bfloat16, uint16_t>(p) == expected_bf16);
    });
  }
}

TEST(hadamard_every_carving) {
  for (Carving carving : {Carving::strided, Carving::published})
    for (int64_t hash_bits : {1, 2, 8, 9, 13, 16, 17, 24})
      for (int64_t num_hashes : {1, 2, 6, 32, 40}) {
        Problem p;
        p.batch = 1, p.heads = 2, p.plane_heads = 2, p.seq = 19, p.dim = 50;
        p.carving = carving, p.hash_bits = hash_bits, p.num_hashes = num_hashes;
        p.draw(uint64_t(hash_bits));
        const std::vector<int> expected = expected_hadamard_codes(p);
        check::for_each_isa([&](const std::string&) { CHECK(hadamard_codes<float, int32_t>(p) == expected); });
      }
}

TEST(threads_change_nothing) {
  Problem p;
  p.seq = 500;
  p.draw(1);
  check::for_each_isa([&](const std::string&) {
    CHECK(hadamard_codes<float, uint16_t>(p, 4) == hadamard_codes<float, uint16_t>(p));
    CHECK(planes_codes<float, uint16_t>(p, 4) == planes_codes<float, uint16_t>(p));
  });
}

TEST(only_the_sign_bit_of_signs_counts) {
  Problem p;
  p.draw(1);
  const std::vector<int> expected = expected_hadamard_codes(p);
  for (size_t i = 0; i < p.signs.size(); ++i) p.signs[i] *= i % 3 ? 0.0f : 7.5f;
  check::for_each_isa([&](const std::string&) { CHECK(hadamard_codes<float, uint16_t>(p) == expected); });
}

TEST(parts_and_padding) {
  CHECK(hadamard_padded(1) == 64 && hadamard_padded(64) == 64 && hadamard_padded(65) == 128);
  CHECK(hadamard_padded(512) == 512);
  CHECK(hadamard_parts(32, 9, 64, Carving::strided) == 5 && hadamard_parts(32, 9, 64, Carving::published) == 5);
  CHECK(hadamard_parts(32, 12, 64, Carving::strided) == 6 && hadamard_parts(32, 12, 64, Carving::published) == 7);
  CHECK(hadamard_parts(16, 8, 64, Carving::strided) == 2 && hadamard_parts(1, 1, 512, Carving::published) == 1);
}

TEST(empty_arrays_need_no_memory) {
  const Queue queue = Queue::cpu(1);
  const float* nothing = nullptr;
  uint16_t* none = nullptr;
  for (int empty = 0; empty < 3; ++empty) {
    const int64_t b = empty != 0, h = empty != 1, n = empty != 2;
    const ConstTensor x = make_tensor(nothing, {b, h, n, 8});
    const Tensor codes = make_tensor(none, {b, h, 3, n});
    const ConstTensor planes = make_tensor(nothing, {h, 3, 4, 8});
    CHECK(lsh_hash_workspace_bytes(queue, x, planes, codes) == 0);
    lsh_hash(queue, x, planes, codes, {});
    lsh_hash_hadamard(queue, x, make_tensor(nothing, {h, 3, 1, 64}), 4, Carving::strided, codes, {});
  }
}

TEST(mistakes_are_named) {
  const Queue queue = Queue::cpu(1);
  std::vector<float> memory(4096), sign_memory(4096);
  std::vector<uint16_t> code_memory(4096);
  const ConstTensor x = make_tensor(static_cast<const float*>(memory.data()), {2, 4, 5, 8});
  const ConstTensor planes = make_tensor(static_cast<const float*>(sign_memory.data()), {2, 3, 6, 8});
  const ConstTensor signs = make_tensor(static_cast<const float*>(sign_memory.data()), {2, 3, 1, 64});
  const Tensor codes = make_tensor(code_memory.data(), {2, 4, 3, 5});
  const auto dense = [&](ConstTensor x_, ConstTensor planes_, Tensor codes_) {
    lsh_hash(queue, x_, planes_, codes_, {});
  };
  const auto fast = [&](ConstTensor signs_, int64_t bits, Tensor codes_) {
    lsh_hash_hadamard(queue, x, signs_, bits, Carving::strided, codes_, {});
  };
  const auto with_extent = [](auto t, int axis, int64_t extent) { return t.shape[axis] = extent, t; };

  CHECK_THROWS_AS(TypeMismatch, dense({}, planes, codes), "[lsh_hash] x: expected an array, got none");
  CHECK_THROWS(dense(x, with_extent(planes, 3, 7), codes), "[lsh_hash] planes: expected shape [Hp, R, J, D]");
  CHECK_THROWS(dense(x, with_extent(planes, 0, 3), codes), "[lsh_hash] planes: expected a number of heads");
  CHECK_THROWS(dense(x, with_extent(planes, 2, 25), codes),
               "[lsh_hash] hash_bits: expected a value in [1, 24], got 25");
  CHECK_THROWS(dense(x, planes, with_extent(codes, 2, 2)),
               "[lsh_hash] codes: expected shape [B, H, R, N] = [2, 4, 3, 5]");
  CHECK_THROWS_AS(TypeMismatch, dense(x, with_extent(planes, 2, 17), codes),
                  "[lsh_hash] codes: expected dtype int32 for codes of 17 bits, got uint16");
  CHECK_THROWS(dense(with_extent(x, 3, 0), planes, codes), "[lsh_hash] x: expected a head_dim of at least 1, got 0");
  Tensor aliased = codes;
  aliased.data = memory.data();
  CHECK_THROWS(dense(x, planes, aliased), "[lsh_hash] codes: expected an output that shares no memory");
  CHECK_THROWS(dense(x, planes, codes), "[lsh_hash] workspace: expected at least");

  CHECK_THROWS(fast(with_extent(signs, 2, 2), 6, codes),
               "[lsh_hash] signs: expected shape [Hp, 3, P, D2] = [2, 3, 1, 64]");
  CHECK_THROWS(fast(signs, 0, codes), "[lsh_hash] hash_bits: expected a value in [1, 24], got 0");
  CHECK_THROWS(fast(signs, 6, with_extent(codes, 2, 0)), "[lsh_hash] num_hashes");
  CHECK_THROWS_AS(TypeMismatch, fast(signs, 20, codes), "[lsh_hash] codes: expected dtype int32 for codes of 20 bits");

  const ConstTensor wide = make_tensor(static_cast<const float*>(memory.data()), {1, 1, 1, 513});
  const ConstTensor wide_planes = make_tensor(static_cast<const float*>(sign_memory.data()), {1, 1, 1, 513});
  CHECK_THROWS_AS(Unsupported, dense(wide, wide_planes, make_tensor(code_memory.data(), {1, 1, 1, 1})),
                  "for a head dimension above 512");
}

}  // namespace
