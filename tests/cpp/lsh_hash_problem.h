/// Problems of lsh_hash for tests: arrays with gaps, both forms run on them, and what the formulas give.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "subquad/lsh_hash.h"
#include "subquad/random.h"

namespace check {

using namespace subquad;

constexpr uint16_t kUnwritten = 0xfefe;

/// One problem: sizes, and the arrays of both forms. Rows of x and of codes lie in memory with gaps.
struct Problem {
  int64_t batch = 2, heads = 4, plane_heads = 2, seq = 37, dim = 64, num_hashes = 5, hash_bits = 7;
  Carving carving = Carving::strided;
  int64_t gap = 3;  // elements between the rows of x
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
    const int64_t row = p.dim + p.gap, head = p.seq * row + 2 * p.gap;
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
inline std::vector<char> unclean(int64_t bytes) { return std::vector<char>(size_t(bytes), char(0xff)); }

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
inline void check_planes_codes(const Problem& p, const std::vector<int>& codes) {
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
inline std::vector<float> transforms(const Problem& p, int64_t b, int64_t h, int64_t n) {
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

inline std::vector<int> expected_hadamard_codes(const Problem& p) {
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

}  // namespace check
