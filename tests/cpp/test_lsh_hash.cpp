// Bucket codes: both forms against the formula, on every row, with strides, tails and extreme norms; errors.
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "subquad/error.h"
#include "subquad/lsh_hash.h"
#include "subquad/random.h"

using namespace subquad;

namespace {

constexpr uint16_t kUnwritten = 0xfefe;

/// One problem: sizes, and the arrays of both forms. Rows of x and of codes lie in memory with gaps.
struct Problem {
  int64_t batch = 2, heads = 4, plane_heads = 2, seq = 37, dim = 64, num_hashes = 5, hash_bits = 7;
  Carving carving = Carving::strided;
  std::vector<float> x, planes, signs;

  int64_t parts() const { return hadamard_parts(num_hashes, hash_bits, dim, carving); }
  int64_t padded() const { return hadamard_padded(dim); }
  int64_t code_index(int64_t b, int64_t h, int64_t r, int64_t n) const {
    return ((b * heads + h) * num_hashes + r) * seq + n;
  }
  const float* row(int64_t b, int64_t h, int64_t n) const { return x.data() + ((b * heads + h) * seq + n) * dim; }
  int64_t plane_head(int64_t h) const { return h / (heads / plane_heads); }

  void draw(uint64_t seed) {
    const Queue queue = Queue::cpu(1);
    x.resize(size_t(batch * heads * seq * dim));
    planes.resize(size_t(plane_heads * num_hashes * hash_bits * dim));
    signs.resize(size_t(plane_heads * 3 * parts() * padded()));
    random_normal(queue, seed, 16, make_tensor(x.data(), {batch, heads, seq, dim}));
    random_normal(queue, seed, 1, make_tensor(planes.data(), {plane_heads, num_hashes * hash_bits, dim}));
    random_signs(queue, seed, 2, make_tensor(signs.data(), {plane_heads, 3 * parts(), padded()}));
  }
};

/// x of T as a view whose rows and heads lie apart; tokens run backwards.
template <class T>
struct StridedInput {
  std::vector<T> memory;
  ConstTensor view;

  explicit StridedInput(const Problem& p) {
    const int64_t row = p.dim + 3, head = p.seq * row + 5;
    memory.resize(size_t(p.batch * p.heads * head + 1));
    view = make_tensor(static_cast<const T*>(memory.data() + (p.seq - 1) * row), {p.batch, p.heads, p.seq, p.dim});
    view.stride[0] = p.heads * head, view.stride[1] = head, view.stride[2] = -row;
    for (int64_t i = 0; i < p.batch * p.heads; ++i)
      for (int64_t n = 0; n < p.seq; ++n)
        for (int64_t d = 0; d < p.dim; ++d)
          from_float(p.row(0, i, n)[d], &memory[size_t(i * head + (p.seq - 1 - n) * row + d)]);
  }
};

/// Codes as a view with gaps behind every row; `values` returns them without the gaps and looks at the gaps.
template <class Code>
struct StridedCodes {
  std::vector<Code> memory;
  Tensor view;

  explicit StridedCodes(const Problem& p) {
    memory.assign(size_t(p.batch * p.heads * p.num_hashes * (p.seq + 3)), Code(kUnwritten));
    view = make_tensor(memory.data(), {p.batch, p.heads, p.num_hashes, p.seq});
    for (int i = 0; i < 3; ++i) view.stride[i] = view.stride[i] / p.seq * (p.seq + 3);
  }
  std::vector<int> values(const Problem& p) const {
    std::vector<int> codes;
    for (size_t i = 0; i < memory.size(); ++i) {
      if (int64_t(i) % (p.seq + 3) < p.seq)
        codes.push_back(int(memory[i]));
      else
        CHECK(memory[i] == Code(kUnwritten));
    }
    return codes;
  }
};

/// Scratch memory full of NaN.
std::vector<char> unclean(int64_t bytes) { return std::vector<char>(size_t(bytes), char(0xff)); }

template <class T, class Code>
std::vector<int> planes_codes(const Problem& p, int threads = 1) {
  const StridedInput<T> x(p);
  const StridedCodes<Code> codes(p);
  const Queue queue = Queue::cpu(threads);
  const ConstTensor planes =
      make_tensor(static_cast<const float*>(p.planes.data()), {p.plane_heads, p.num_hashes, p.hash_bits, p.dim});
  std::vector<char> scratch = unclean(lsh_hash_workspace_bytes(queue, x.view, planes, codes.view));
  lsh_hash(queue, x.view, planes, codes.view, {scratch.data(), int64_t(scratch.size())});
  return codes.values(p);
}

template <class T, class Code>
std::vector<int> hadamard_codes(const Problem& p, int threads = 1) {
  const StridedInput<T> x(p);
  const StridedCodes<Code> codes(p);
  const Queue queue = Queue::cpu(threads);
  const ConstTensor signs =
      make_tensor(static_cast<const float*>(p.signs.data()), {p.plane_heads, 3, p.parts(), p.padded()});
  std::vector<char> scratch =
      unclean(lsh_hash_hadamard_workspace_bytes(queue, x.view, signs, p.hash_bits, p.carving, codes.view));
  lsh_hash_hadamard(queue, x.view, signs, p.hash_bits, p.carving, codes.view,
                    {scratch.data(), int64_t(scratch.size())});
  return codes.values(p);
}

/// Rounds x to T and back, so that a formula in double sees what the kernel sees.
template <class T>
Problem rounded(Problem p) {
  for (float& x : p.x) {
    T stored;
    from_float(x, &stored);
    x = to_float(stored);
  }
  return p;
}

/// Compares codes with projections in double, bit by bit, where the sign is beyond doubt.
void check_planes_codes(const Problem& p, const std::vector<int>& codes) {
  CHECK(int64_t(codes.size()) == p.batch * p.heads * p.num_hashes * p.seq);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t r = 0; r < p.num_hashes; ++r)
        for (int64_t n = 0; n < p.seq; ++n) {
          const int code = codes[size_t(p.code_index(b, h, r, n))];
          CHECK(code >> p.hash_bits == 0);
          for (int64_t j = 0; j < p.hash_bits; ++j) {
            const float* x = p.row(b, h, n);
            const float* plane = p.planes.data() + ((p.plane_head(h) * p.num_hashes + r) * p.hash_bits + j) * p.dim;
            double sum = 0, xx = 0, ww = 0;
            for (int64_t d = 0; d < p.dim; ++d)
              sum += double(x[d]) * plane[d], xx += double(x[d]) * x[d], ww += double(plane[d]) * plane[d];
            if (std::fabs(sum) > double(p.dim) * 0x1p-23 * std::sqrt(xx * ww)) CHECK((code >> j & 1) == (sum > 0));
          }
        }
}

/// All transforms of one row in float, with the butterflies in the order of the contract.
std::vector<float> transforms(const Problem& p, int64_t b, int64_t h, int64_t n) {
  const int64_t d2 = p.padded();
  std::vector<float> all;
  for (int64_t t = 0; t < p.parts(); ++t) {
    std::vector<float> y(p.row(b, h, n), p.row(b, h, n) + p.dim);
    y.resize(size_t(d2));
    for (int64_t round = 0; round < 3; ++round) {
      for (int64_t i = 0; i < d2; ++i)
        y[size_t(i)] *= p.signs[size_t(((p.plane_head(h) * 3 + round) * p.parts() + t) * d2 + i)];
      for (int64_t stride = 1; stride < d2; stride *= 2)
        for (int64_t i = 0; i < d2; ++i)
          if (!(i & stride)) {
            const float low = y[size_t(i)], high = y[size_t(i + stride)];
            y[size_t(i)] = low + high, y[size_t(i + stride)] = low - high;
          }
    }
    all.insert(all.end(), y.begin(), y.end());
  }
  return all;
}

std::vector<int> expected_hadamard_codes(const Problem& p) {
  std::vector<int> codes(size_t(p.batch * p.heads * p.num_hashes * p.seq));
  const int64_t parts = p.parts(), d2 = p.padded(), codes_a_part = d2 / p.hash_bits;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t n = 0; n < p.seq; ++n) {
        const std::vector<float> y = transforms(p, b, h, n);
        for (int64_t r = 0; r < p.num_hashes; ++r)
          for (int64_t j = 0; j < p.hash_bits; ++j) {
            const int64_t flat = r * p.hash_bits + j;
            const int64_t at = p.carving == Carving::strided
                                   ? flat % parts * d2 + flat / parts
                                   : r / codes_a_part * d2 + r % codes_a_part * p.hash_bits + j;
            codes[size_t(p.code_index(b, h, r, n))] |= (y[size_t(at)] > 0) << j;
          }
      }
  return codes;
}

const int64_t kDims[] = {1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 64, 65, 100, 128, 129, 200, 256, 300, 512};

TEST(planes_every_dim) {
  check::for_each_isa([](const std::string&) {
    for (int64_t dim : kDims) {
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

/// Norms far outside the range of sums; every third token is ordinary, so neighbours differ.
TEST(codes_do_not_depend_on_the_norm) {
  Problem p;
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
