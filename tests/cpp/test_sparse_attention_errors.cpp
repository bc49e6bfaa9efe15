// What sparse_attention refuses, and how it says so.
#include "sparse_attention_reference.h"
#include "subquad/error.h"

using namespace sparse;

TEST(errors_in_patterns) {
  const Sizes s = {1, 4, 2, 3, 9, 6, 5};
  Problem p(s);
  Pattern lists = index_pattern(s, 2, 7), csr = csr_pattern(random_rows(s, {4}), false, false);
  Pattern blocks = block_pattern(s, 9, 0.5, 3, Seen::all, true);
  const auto with = [&](SparsePattern pattern, auto change) {
    change(pattern);
    p.forward(pattern);
  };
  const float floats[60] = {};
  CHECK_THROWS(with(lists.view, [](auto& x) { x.indices.shape[1] = 3; }),
               "[sparse_attention] indices: expected 1, Hkv = 2 or H = 4 heads, got 3");
  CHECK_THROWS(with(lists.view, [](auto& x) { x.indices.shape[2] = 2; }),
               "[sparse_attention] indices: expected shape [B, heads, N, S], got [1, 2, 2, 7]");
  CHECK_THROWS_AS(TypeMismatch, with({}, [](auto&) {}), "[sparse_attention] indices: expected an array, got none");
  CHECK_THROWS_AS(TypeMismatch, with(lists.view, [&](auto& x) { x.visible = blocks.view.visible; }),
                  "[sparse_attention] visible: expected none in a pattern of indices, got an array");
  CHECK_THROWS_AS(TypeMismatch, with(blocks.view, [&](auto& x) { x.indptr = csr.view.indptr; }),
                  "[sparse_attention] indptr: expected none in a pattern of blocks, got an array");
  CHECK_THROWS(with(lists.view, [&](auto& x) { x.log_weights = make_tensor(floats, {1, 2, 3, 6}); }),
               "[sparse_attention] log_weights: expected shape [B, heads, N, S] = [1, 2, 3, 7], got [1, 2, 3, 6]");
  CHECK_THROWS(with(csr.view, [&](auto& x) { x.log_weights = make_tensor(floats, {47}); }),
               "[sparse_attention] log_weights: expected shape [nnz] = [48], got [47]");
  CHECK_THROWS(with(csr.view, [](auto& x) { x.indptr.shape[0] = 12; }),
               "[sparse_attention] indptr: expected shape [B H N + 1] = [13], got [12]");
  CHECK_THROWS(with(blocks.view, [](auto& x) { x.num_columns = 17; }),
               "[sparse_attention] bits: expected shape [B, H, N, ceil(K / 8)] = [1, 4, 3, 3], got [1, 4, 3, 2]");
  CHECK_THROWS(with(blocks.view, [](auto& x) { x.num_columns = 0; }),
               "[sparse_attention] num_columns: expected a value in [1, 1048576], got 0");
  CHECK_THROWS(with(blocks.view, [](auto& x) { x.block_cap = 0; }),
               "[sparse_attention] block_cap: expected a value of at least 1, got 0");
  CHECK_THROWS_AS(TypeMismatch, with(blocks.view, [](auto& x) { x.visible = {}; }),
                  "[sparse_attention] visible: expected an array, got none");
}

TEST(errors_in_options_and_outputs) {
  Problem p({1, 4, 2, 3, 9, 6, 5});
  const Pattern lists = index_pattern(p.s, 2, 7);
  const auto option = [&](auto change) {
    const SparseAttentionOptions kept = p.options;
    change(p.options);
    try {
      p.forward(lists.view);
    } catch (...) {
      p.options = kept;
      throw;
    }
  };
  const float floats[60] = {};
  const bool mask[3] = {};
  CHECK_THROWS(option([](auto& x) { x.scale = -1; }), "[sparse_attention] scale: expected a finite number above 0");
  CHECK_THROWS(option([&](auto& x) { x.row_scale = make_tensor(floats, {1, 4, 4}); }),
               "[sparse_attention] row_scale: expected shape [B, H, N] = [1, 4, 3], got [1, 4, 4]");
  CHECK_THROWS_AS(TypeMismatch, option([&](auto& x) { x.context = make_tensor(floats, {1, 4, 3, 5}); }),
                  "[sparse_attention] mix: expected an array where there is context, got none");
  CHECK_THROWS(
      option([&](auto& x) { x.mix = make_tensor(floats, {1, 4, 3}), x.context = make_tensor(floats, {1, 4, 2, 5}); }),
      "[sparse_attention] context: expected shape [B, H, N or 1, E] = [1, 4, 3, 5], got [1, 4, 2, 5]");
  CHECK_THROWS(option([&](auto& x) { x.query_mask = make_tensor(mask, {1, 2}); }),
               "[sparse_attention] query_mask: expected shape [B, N] = [1, 3], got [1, 2]");
  CHECK_THROWS(sparse_attention(Queue::cpu(1), p.q.view, p.k.view, p.v.view, lists.view, {}, p.out.view, {}, {}),
               "[sparse_attention] workspace: expected at least ");
  CHECK_THROWS(sparse_attention(Queue::cpu(1), p.q.view, p.k.view, p.v.view, lists.view, {}, p.q.view, {}, {}),
               "[sparse_attention] out: expected shape [B, H, N, E] = [1, 4, 3, 5], got [1, 4, 3, 6]");
  Problem square({1, 2, 2, 3, 3, 4, 4}), wide({1, 1, 1, 1, 1, 513, 1}), half({1, 4, 2, 3, 9, 6, 5, DType::f16});
  const Pattern one = index_pattern(wide.s, 1, 1), few = index_pattern(square.s, 1, 2);
  CHECK_THROWS(
      sparse_attention(Queue::cpu(1), square.q.view, square.k.view, square.v.view, few.view, {}, square.v.view, {}, {}),
      "[sparse_attention] out: expected an output that shares no memory");
  CHECK_THROWS_AS(Unsupported, wide.forward(one.view), "for a head dimension above 512");
  CHECK_THROWS_AS(TypeMismatch,
                  sparse_attention(Queue::cpu(1), p.q.view, half.k.view, p.v.view, lists.view, {}, p.out.view, {}, {}),
                  "[sparse_attention] k: expected dtype float32, got float16");
  CHECK_THROWS(wide.forward(lists.view),
               "[sparse_attention] indices: expected shape [B, heads, N, S], got [1, 2, 3, 7]");
}

TEST(errors_in_the_values_of_a_pattern) {
  const Sizes s = {1, 4, 2, 3, 9, 6, 5};
  Problem p(s);
  Pattern lists = index_pattern(s, 2, 7), csr = csr_pattern(random_rows(s, {4}), false, false);
  Pattern narrow = csr_pattern(csr.rows, false, true), blocks = block_pattern(s, 9, 0.5, 3, Seen::all, true);
  const auto with = [&](auto& values, size_t place, int value, const SparsePattern& view) {
    const auto kept = values[place];
    values[place] = value;
    try {
      p.forward(view);
    } catch (...) {
      values[place] = kept;
      throw;
    }
    values[place] = kept;
  };
  for (int key : {-2, 9, INT32_MAX, INT32_MIN})
    CHECK_THROWS_AS(std::invalid_argument, with(lists.indices, 25, key, lists.view),
                    "[sparse_attention] indices: expected keys in [0, 9), or -1 for none, got " + std::to_string(key) +
                        " at [0, 1, 0, 4]");
  const auto set_keys = [](auto& x, int32_t a, int32_t b, int32_t c, int32_t d) {
    x.indices[4] = a, x.indices[5] = b, x.indices[6] = c, x.indices[7] = d;
  };
  set_keys(csr, 1, 2, 4, 6);
  for (int key : {-1, 9, INT32_MAX, INT32_MIN})
    CHECK_THROWS(with(csr.indices, 5, key, csr.view),
                 "[sparse_attention] indices: expected keys in [0, 9), got " + std::to_string(key) + " at [5]");
  CHECK_THROWS(with(csr.indices, 7, 9, csr.view), "[sparse_attention] indices: expected keys in [0, 9), got 9 at [7]");
  for (int key : {0, 1})
    CHECK_THROWS(with(csr.indices, 5, key, csr.view),
                 "[sparse_attention] indices: expected keys that ascend inside a row, got " + std::to_string(key) +
                     " after 1 at [5]");
  CHECK_THROWS(with(csr.indptr, 0, 1, csr.view), "[sparse_attention] indptr: expected 0 as its first value, got 1");
  CHECK_THROWS(with(csr.indptr, 12, 47, csr.view),
               "[sparse_attention] indptr: expected the length of indices, 48, as its last value, got 47");
  CHECK_THROWS(with(narrow.indptr_i32, 3, 17, narrow.view),
               "[sparse_attention] indptr: expected values that never fall, got 16 after 17 at [4]");
  for (int visible : {-1, 10})
    CHECK_THROWS(
        with(blocks.visible, 2, visible, blocks.view),
        "[sparse_attention] visible: expected values in [0, 9], got " + std::to_string(visible) + " at [0, 2]");
  CHECK_THROWS(
      with(blocks.positions, 2, 3, blocks.view),
      "[sparse_attention] positions: expected ascending keys in [0, 9) for the first 4 ranks, got 3 after 3 at "
      "[0, 2]");
  CHECK_THROWS(with(blocks.positions, 3, 9, blocks.view), "ascending keys in [0, 9) for the first 4 ranks, got 9");
  CHECK_THROWS(with(blocks.positions, 0, -1, blocks.view), "ascending keys in [0, 9) for the first 4 ranks, got -1");
  // Behind the visible ranks anything goes, and what was wrong is right again.
  for (const Pattern* pattern : {&lists, &csr, &narrow, &blocks}) p.forward(pattern->view);
}

TEST(errors_far_inside_a_large_pattern) {
  const Sizes s = {1, 2, 1, 3000, 100, 4, 4};
  Problem p(s);
  Pattern lists = index_pattern(s, 2, 30), csr = csr_pattern(random_rows(s, {30}), false, false);
  lists.indices[size_t(5555 * 30 + 29)] = 100;
  CHECK_THROWS(p.forward(lists.view), "got 100 at [0, 1, 2555, 29]");
  csr.indices[size_t(5000 * 30 + 11)] = csr.indices[size_t(5000 * 30 + 10)];
  CHECK_THROWS(p.forward(csr.view), " at [150011]");
}
