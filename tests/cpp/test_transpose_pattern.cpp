// transpose_pattern against a loop over the entries, on every row of kernels this machine can run.
#include "sparse_attention_reference.h"
#include "subquad/error.h"
#include "subquad/transpose_pattern.h"

using namespace sparse;

namespace {

struct Transposed {
  std::vector<int64_t> key_indptr, order;
  std::vector<int32_t> rows;

  bool operator==(const Transposed& other) const {
    return key_indptr == other.key_indptr && order == other.order && rows == other.rows;
  }
};

Transposed transpose(const Sizes& s, const SparsePattern& pattern, int threads = 2) {
  const int64_t keys = s.b * s.h * s.m, nnz = pattern.indices.shape[0];
  Transposed t = {std::vector<int64_t>(size_t(keys + 1), -1), std::vector<int64_t>(size_t(nnz), -1),
                  std::vector<int32_t>(size_t(nnz), -1)};
  const Tensor key_indptr = make_tensor(t.key_indptr.data(), {keys + 1}), rows = make_tensor(t.rows.data(), {nnz});
  const Tensor order = make_tensor(t.order.data(), {nnz});
  const Queue queue = Queue::cpu(threads);
  const int64_t bytes = transpose_pattern_workspace_bytes(queue, pattern, s.b, s.h, s.n, s.m, key_indptr, rows, order);
  std::vector<char> workspace(size_t(bytes), char(0xff));
  transpose_pattern(queue, pattern, s.b, s.h, s.n, s.m, key_indptr, rows, order, {workspace.data(), bytes});
  return t;
}

/// For each key, all rows of its head.
Transposed by_loop(const Sizes& s, const Pattern& pattern) {
  Transposed t;
  t.key_indptr.push_back(0);
  for (int64_t head = 0; head < s.b * s.h; ++head)
    for (int64_t key = 0; key < s.m; ++key) {
      for (int64_t n = 0; n < s.n; ++n) {
        const int64_t begin = pattern.indptr[size_t(head * s.n + n)], end = pattern.indptr[size_t(head * s.n + n + 1)];
        for (int64_t entry = begin; entry < end; ++entry)
          if (pattern.indices[size_t(entry)] == key) t.rows.push_back(int32_t(n)), t.order.push_back(entry);
      }
      t.key_indptr.push_back(int64_t(t.rows.size()));
    }
  return t;
}

const Sizes kSizes[] = {{1, 1, 1, 1, 1, 1, 1}, {2, 3, 3, 17, 40, 1, 1}, {1, 1, 1, 200, 33, 1, 1},
                        {1, 2, 2, 5, 1, 1, 1}, {2, 2, 2, 1, 90, 1, 1},  {0, 2, 2, 3, 4, 1, 1},
                        {2, 0, 0, 3, 4, 1, 1}, {2, 2, 2, 0, 4, 1, 1},   {2, 2, 2, 3, 0, 1, 1}};

}  // namespace

TEST(equation) {
  check::for_each_isa([](const std::string&) {
    for (const Sizes& s : kSizes)
      for (bool narrow : {false, true}) {
        const Pattern pattern = csr_pattern(random_rows(s, {0, 1, 9, 33}), false, narrow);
        const Transposed expected = by_loop(s, pattern);
        for (int threads : {1, 2, 3, 16}) CHECK(transpose(s, pattern.view, threads) == expected);
      }
  });
}

TEST(twice_is_the_pattern) {
  check::for_each_isa([](const std::string&) {
    for (const Sizes& s : kSizes) {
      const Pattern pattern = csr_pattern(random_rows(s, {7, 0, 20}), false, false);
      const Transposed once = transpose(s, pattern.view);
      const Sizes turned = {s.b, s.h, s.h, s.m, s.n, 1, 1};
      SparsePattern view;
      view.indptr = make_tensor(once.key_indptr.data(), {int64_t(once.key_indptr.size())});
      view.indices = make_tensor(once.rows.data(), {int64_t(once.rows.size())});
      const Transposed twice = transpose(turned, view);
      CHECK(twice.key_indptr == pattern.indptr && twice.rows == pattern.indices);
      for (size_t i = 0; i < twice.order.size(); ++i) CHECK(once.order[size_t(twice.order[i])] == int64_t(i));
    }
  });
}

TEST(errors) {
  const Sizes s = {1, 2, 2, 3, 9, 1, 1};
  const Pattern pattern = csr_pattern(random_rows(s, {4}), false, false);
  int64_t key_indptr[19], order[24];
  int32_t rows[24];
  char memory[1 << 12];
  const auto run = [&](const SparsePattern& p, const Tensor& a, const Tensor& b, const Tensor& c, int64_t seq_k = 9) {
    transpose_pattern(Queue::cpu(1), p, 1, 2, 3, seq_k, a, b, c, {memory, sizeof memory});
  };
  const Tensor a = make_tensor(key_indptr, {19}), b = make_tensor(rows, {24}), c = make_tensor(order, {24});
  run(pattern.view, a, b, c);
  SparsePattern wrong = pattern.view;
  wrong.indptr = {};
  CHECK_THROWS_AS(TypeMismatch, run(wrong, a, b, c),
                  "[transpose_pattern] pattern: expected a CSR pattern, got no indptr");
  wrong.indptr = make_tensor(pattern.indptr.data(), {6});
  CHECK_THROWS(run(wrong, a, b, c), "[transpose_pattern] indptr: expected shape [B H N + 1] = [7], got [6]");
  CHECK_THROWS(run(pattern.view, make_tensor(key_indptr, {18}), b, c),
               "[transpose_pattern] key_indptr: expected shape [B H M + 1] = [19], got [18]");
  CHECK_THROWS_AS(TypeMismatch, run(pattern.view, a, c, c),
                  "[transpose_pattern] rows: expected dtype int32, got int64");
  CHECK_THROWS(run(pattern.view, a, b, make_tensor(order, {23})),
               "[transpose_pattern] order: expected shape [nnz] = [24], got [23]");
  CHECK_THROWS(run(pattern.view, a, b, c, -1),
               "[transpose_pattern] seq_k: expected a value in [0, 9223372036854775807], got -1");
  CHECK_THROWS(run(pattern.view, make_tensor(order + 2, {19}), b, c),
               "[transpose_pattern] key_indptr: expected an output that shares no memory with another argument");
  Pattern falling = csr_pattern(random_rows(s, {4}), false, false);
  falling.indices[2] = falling.indices[1];
  CHECK_THROWS(run(falling.view, a, b, c), "[transpose_pattern] indices: expected keys that ascend inside a row, got ");
  falling.indices[2] = 9;
  CHECK_THROWS(run(falling.view, a, b, c), "[transpose_pattern] indices: expected keys in [0, 9), got 9 at [2]");
}
