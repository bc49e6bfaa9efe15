// expand_blocks against a loop over the columns, on every row of kernels this machine can run.
#include "sparse_attention_reference.h"
#include "subquad/error.h"
#include "subquad/expand_blocks.h"

using namespace sparse;

namespace {

struct Expanded {
  std::vector<int64_t> indptr;
  std::vector<int32_t> indices;
};

Expanded expand(const SparsePattern& pattern, int64_t num_keys, int threads = 2) {
  const int64_t count = pattern.bits.shape[0] * pattern.bits.shape[1] * pattern.bits.shape[2] + 1;
  Expanded e = {std::vector<int64_t>(size_t(count), -1), {}};
  const Queue queue = Queue::cpu(threads);
  expand_blocks_indptr(queue, pattern, num_keys, make_tensor(e.indptr.data(), {count}));
  // More room than is needed: what lies behind the entries stays as it was.
  const int64_t room = e.indptr.back() + 5;
  e.indices.assign(size_t(room), -9);
  expand_blocks(queue, pattern, num_keys, make_tensor(static_cast<const int64_t*>(e.indptr.data()), {count}),
                make_tensor(e.indices.data(), {room}));
  for (int i = 0; i < 5; ++i) CHECK(e.indices.back() == -9), e.indices.pop_back();
  return e;
}

void check_pattern(const Pattern& pattern, int64_t num_keys) {
  std::vector<int64_t> indptr = {0};
  std::vector<int32_t> indices;
  for (const auto& row : pattern.rows) {
    for (const Entry& entry : row) indices.push_back(int32_t(entry.key));
    indptr.push_back(int64_t(indices.size()));
  }
  for (int threads : {1, 3}) {
    const Expanded e = expand(pattern.view, num_keys, threads);
    CHECK(e.indptr == indptr);
    CHECK(e.indices == indices);
  }
}

}  // namespace

TEST(columns_and_caps) {
  check::for_each_isa([](const std::string&) {
    for (bool positions : {false, true})
      for (Seen seen : {Seen::all, Seen::causal, Seen::random})
        for (int64_t columns : {1, 2, 7, 8, 63, 64, 65, 130, 256})
          for (int64_t cap : {1, 3, 17, 1000})
            for (double density : {0.0, 0.3, 1.0})
              check_pattern(block_pattern({2, 2, 2, 20, 90, 1, 1}, columns, density, cap, seen, positions), 90);
  });
}

TEST(long_rows) {
  check::for_each_isa([](const std::string&) {
    const Sizes s = {1, 1, 1, 300, 5000, 1, 1};
    for (int64_t columns : {1, 3, 100}) check_pattern(block_pattern(s, columns, 0.5, 1300, Seen::causal, true), 5000);
  });
}

TEST(strides) {
  const Sizes s = {3, 2, 2, 11, 50, 1, 1};
  Pattern p = block_pattern(s, 20, 0.4, 2, Seen::random, true);
  const int64_t bytes = 3;
  // The axes of bits in another order, the items of visible and positions backwards.
  std::vector<uint8_t> bits(p.bits.size());
  std::vector<int32_t> visible(p.visible.size()), positions(p.positions.size());
  for (int64_t b = 0; b < s.b; ++b) {
    for (int64_t h = 0; h < s.h; ++h)
      for (int64_t n = 0; n < s.n; ++n)
        for (int64_t i = 0; i < bytes; ++i)
          bits[size_t(((n * s.h + h) * s.b + b) * bytes + i)] = p.bits[size_t(((b * s.h + h) * s.n + n) * bytes + i)];
    for (int64_t n = 0; n < s.n; ++n) visible[size_t((s.b - 1 - b) * s.n + n)] = p.visible[size_t(b * s.n + n)];
    for (int64_t m = 0; m < s.m; ++m) positions[size_t((s.b - 1 - b) * s.m + m)] = p.positions[size_t(b * s.m + m)];
  }
  p.view.bits.data = bits.data();
  p.view.bits.stride[0] = bytes, p.view.bits.stride[1] = s.b * bytes, p.view.bits.stride[2] = s.b * s.h * bytes;
  p.view.visible.data = visible.data() + (s.b - 1) * s.n, p.view.visible.stride[0] = -s.n;
  p.view.positions.data = positions.data() + (s.b - 1) * s.m, p.view.positions.stride[0] = -s.m;
  check::for_each_isa([&](const std::string&) { check_pattern(p, 50); });
}

TEST(empty) {
  check::for_each_isa([](const std::string&) {
    for (const Sizes& s :
         {Sizes{0, 2, 2, 3, 4, 1, 1}, {2, 0, 0, 3, 4, 1, 1}, {2, 2, 2, 0, 4, 1, 1}, {2, 2, 2, 3, 0, 1, 1}})
      check_pattern(block_pattern(s, 9, 0.5, 2, Seen::all, false), s.m);
  });
}

TEST(errors) {
  const Sizes s = {1, 2, 2, 3, 9, 1, 1};
  Pattern p = block_pattern(s, 4, 1.0, 5, Seen::all, true);  // 4 keys in each of 6 rows
  int64_t indptr[8];
  int32_t indices[32];
  const auto count = [&](auto change) {
    SparsePattern pattern = p.view;
    Tensor to = make_tensor(indptr, {7});
    int64_t num_keys = 9;
    change(pattern, to, num_keys);
    expand_blocks_indptr(Queue::cpu(1), pattern, num_keys, to);
  };
  count([](auto&, auto&, auto&) {});
  CHECK(indptr[6] == 24);
  CHECK_THROWS_AS(TypeMismatch, count([](SparsePattern& x, auto&, auto&) { x.bits = {}; }),
                  "[expand_blocks_indptr] bits: expected an array, got none");
  CHECK_THROWS(count([](auto&, Tensor& to, auto&) { to.shape[0] = 6; }),
               "[expand_blocks_indptr] indptr: expected shape [B H N + 1] = [7], got [6]");
  CHECK_THROWS(count([](auto&, auto&, int64_t& num_keys) { num_keys = -1; }),
               "[expand_blocks_indptr] num_keys: expected a value in [0, 9223372036854775807], got -1");
  CHECK_THROWS(count([](SparsePattern& x, auto&, auto&) { x.block_cap = 0; }),
               "[expand_blocks_indptr] block_cap: expected a value of at least 1, got 0");
  CHECK_THROWS_AS(Unsupported, count([](SparsePattern& x, auto&, int64_t& num_keys) {
                    x.positions = {}, num_keys = int64_t(1) << 31;
                  }),
                  "for 2^31 keys or more");
  p.visible[1] = 10;
  CHECK_THROWS(count([](auto&, auto&, auto&) {}),
               "[expand_blocks_indptr] visible: expected values in [0, 9], got 10 at [0, 1]");
  p.visible[1] = 4;

  const auto fill = [&](const ConstTensor& from, const Tensor& to) {
    expand_blocks(Queue::cpu(1), p.view, 9, from, to);
  };
  const ConstTensor from = make_tensor(static_cast<const int64_t*>(indptr), {7});
  fill(from, make_tensor(indices, {24}));
  CHECK_THROWS(fill(from, make_tensor(indices, {23})),
               "[expand_blocks] indices: expected at least 24 elements, the last value of indptr, got 23");
  CHECK_THROWS_AS(TypeMismatch, fill({}, make_tensor(indices, {24})),
                  "[expand_blocks] indptr: expected an array, got none");
  CHECK_THROWS(fill(from, make_tensor(reinterpret_cast<int32_t*>(indptr), {24})),
               "[expand_blocks] indices: expected an output that shares no memory with another argument");
  std::swap(indptr[2], indptr[4]);
  CHECK_THROWS(fill(from, make_tensor(indices, {24})), "[expand_blocks] indptr: expected values that never fall, got");
  std::swap(indptr[2], indptr[4]);
  p.positions[2] = 0;
  CHECK_THROWS(fill(from, make_tensor(indices, {24})),
               "[expand_blocks] positions: expected ascending keys in [0, 9) for the first 4 ranks, got 0 after 3");
}
