#include <algorithm>
#include <memory>
#include <random>

#include "arrays.h"
#include "selection.h"
#include "subquad/error.h"
#include "subquad/topk_select.h"

using namespace subquad;
using check::Array;
using check::comes_first;
using check::Entry;
using check::kGroups;
using check::kInfinity;
using check::Layout;
using check::other_threads;

namespace {

struct Sizes {
  int64_t batch, heads, rows, width;
};

bool by_head(Group g) { return g == Group::query || g == Group::head; }
bool by_row(Group g) { return g == Group::query || g == Group::row_heads; }

/// The group that entry (b, h, n, m) belongs to, and its place there.
int64_t group_of(const Sizes& s, Group g, int64_t b, int64_t h, int64_t n) {
  return (b * (by_head(g) ? s.heads : 1) + (by_head(g) ? h : 0)) * (by_row(g) ? s.rows : 1) + (by_row(g) ? n : 0);
}
int64_t flat_of(const Sizes& s, Group g, int64_t h, int64_t n, int64_t m) {
  return ((by_head(g) ? 0 : h) * (by_row(g) ? 1 : s.rows) + (by_row(g) ? 0 : n)) * s.width + m;
}
int64_t groups_of(const Sizes& s, Group g) { return s.batch * (by_head(g) ? s.heads : 1) * (by_row(g) ? s.rows : 1); }

/// By a sort of every group.
std::vector<int32_t> sorted_choice(const Sizes& s, const Array& scores, const TopkSelectOptions& o, const bool* keep) {
  std::vector<std::vector<Entry>> groups(size_t(groups_of(s, o.group)));
  int64_t i = 0;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t n = 0; n < s.rows; ++n)
        for (int64_t m = 0; m < s.width; ++m, ++i)
          if ((!keep || keep[b * s.width + m]) && (!o.is_causal || m <= n + s.width - s.rows))
            groups[size_t(group_of(s, o.group, b, h, n))].push_back({scores.get(i), flat_of(s, o.group, h, n, m)});
  std::vector<int32_t> all;
  for (std::vector<Entry>& group : groups) {
    std::sort(group.begin(), group.end(), comes_first);
    std::vector<int32_t> chosen;
    for (size_t j = 0; j < group.size() && j < size_t(o.k); ++j) chosen.push_back(int32_t(group[j].place));
    std::sort(chosen.begin(), chosen.end());
    chosen.resize(size_t(o.k), -1);
    all.insert(all.end(), chosen.begin(), chosen.end());
  }
  return all;
}

Tensor view_of(const Sizes& s, Group g, int64_t k, int32_t* data) {
  if (g == Group::query) return make_tensor(data, {s.batch, s.heads, s.rows, k});
  if (g == Group::row_heads) return make_tensor(data, {s.batch, s.rows, k});
  if (g == Group::head) return make_tensor(data, {s.batch, s.heads, k});
  return make_tensor(data, {s.batch, k});
}

std::vector<int32_t> choice(const Sizes& s, const Array& scores, const TopkSelectOptions& o, int threads) {
  std::vector<int32_t> indices(size_t(groups_of(s, o.group) * o.k) + 1, -9);
  const Tensor view = view_of(s, o.group, o.k, indices.data());
  const Queue queue = Queue::cpu(threads);
  std::vector<char> memory(size_t(topk_select_workspace_bytes(queue, scores.view, o, view)));
  topk_select(queue, scores.view, o, view, {memory.data(), int64_t(memory.size())});
  CHECK(indices.back() == -9);
  indices.pop_back();
  return indices;
}

enum class Fill { normal, special, two_values, constant, ascending, misleading };

void fill(Array& scores, Fill kind, int64_t width, std::mt19937& random) {
  static const double values[] = {NAN, -NAN, kInfinity, -kInfinity, 0.0, -0.0, 1e-42, -1e-42, 1, 1, -1, 0.5, -65504};
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < scores.size(); ++i) {
    double x = normal(random);
    if (kind == Fill::special) x = values[random() % (sizeof values / sizeof *values)];
    if (kind == Fill::two_values) x = random() % 2;
    if (kind == Fill::constant) x = -3;
    if (kind == Fill::ascending) x = double(i % width) / 1024;
    // What a sample at even distances sees is not what there is.
    if (kind == Fill::misleading) x = i % width * 2048 % width < 2048 ? 100 + normal(random) : normal(random);
    scores.set(i, x);
  }
}

void check_choice(const Sizes& s, DType dtype, Layout layout, Fill kind, const TopkSelectOptions& options,
                  bool masked) {
  std::mt19937 random(unsigned(17 + s.width));
  Array scores({s.batch, s.heads, s.rows, s.width}, dtype, layout);
  fill(scores, kind, s.width, random);
  TopkSelectOptions o = options;
  std::unique_ptr<bool[]> keep(new bool[size_t(s.batch * s.width) + 1]);
  for (int64_t i = 0; i < s.batch * s.width; ++i) keep[size_t(i)] = random() % 4 != 0;
  if (masked) o.key_mask = make_tensor(static_cast<const bool*>(keep.get()), {s.batch, s.width});
  const std::vector<int32_t> expected = sorted_choice(s, scores, o, masked ? keep.get() : nullptr);
  for (const int threads : {1, other_threads()}) CHECK(choice(s, scores, o, threads) == expected);
}

TopkSelectOptions options_of(int64_t k, Group group, bool causal) {
  TopkSelectOptions o;
  o.k = k, o.group = group, o.is_causal = causal;
  return o;
}

}  // namespace

TEST(small_groups_equal_a_sort) {
  check::for_each_isa([](const std::string&) {
    for (const int64_t width : {1, 3, 8, 15, 17, 64, 65, 130})
      for (const Group group : kGroups)
        for (const int64_t k : {1, 7, 64, 1000})
          for (int bits = 0; bits < 8; ++bits) {
            const Fill kind = bits & 4 ? Fill::special : Fill::normal;
            check_choice({2, 3, 5, width}, DType::f32, bits & 1 ? Layout::loose : Layout::dense, kind,
                         options_of(k, group, (bits & 2) != 0), (bits & 1) != 0);
          }
  });
}

TEST(half_precision_scores) {
  check::for_each_isa([](const std::string&) {
    for (const DType dtype : {DType::f16, DType::bf16})
      for (const Group group : kGroups)
        for (const Fill kind : {Fill::normal, Fill::special})
          check_choice({2, 2, 9, 77}, dtype, Layout::loose, kind, options_of(20, group, true), true);
  });
}

TEST(more_queries_than_keys) {
  check::for_each_isa([](const std::string&) {
    for (const Group group : kGroups)
      check_choice({2, 2, 30, 11}, DType::f32, Layout::dense, Fill::special, options_of(5, group, true), true);
  });
}

TEST(long_rows_are_narrowed_by_a_sample) {
  check::for_each_isa([](const std::string&) {
    for (const int64_t width : {8192, 20011, 131072})
      for (const Fill kind :
           {Fill::normal, Fill::special, Fill::two_values, Fill::constant, Fill::ascending, Fill::misleading})
        for (const int64_t k : {int64_t(1), int64_t(40), width / 8, width - 5})
          check_choice({1, 1, 2, width}, DType::f32, Layout::dense, kind, options_of(k, Group::query, true), k == 40);
  });
}

TEST(large_groups_are_cut_into_pieces) {
  check::for_each_isa([](const std::string&) {
    for (const Fill kind : {Fill::normal, Fill::special, Fill::two_values, Fill::constant})
      for (const int64_t k : {1, 5000, 300000}) {
        check_choice({1, 1, 1, 200003}, DType::f32, Layout::dense, kind, options_of(k, Group::query, false), true);
        check_choice({1, 2, 401, 333}, DType::f32, Layout::loose, kind, options_of(k, Group::head, true), false);
        check_choice({2, 3, 1000, 65}, DType::bf16, Layout::dense, kind, options_of(k, Group::batch, false), true);
        check_choice({1, 70, 2, 2049}, DType::f32, Layout::dense, kind, options_of(k, Group::row_heads, true), true);
      }
  });
}

TEST(groups_without_candidates) {
  const bool none[4] = {};
  float scores[12] = {};
  for (const Group group : kGroups) {
    TopkSelectOptions o = options_of(2, group, false);
    o.key_mask = make_tensor(none, {1, 4});
    Array array({1, 1, 3, 4}, DType::f32);
    for (const int32_t index : choice({1, 1, 3, 4}, array, o, 2)) CHECK(index == -1);
    // Without keys, rows, heads or items.
    std::vector<int32_t> indices(64, 5);
    o.key_mask = {};
    for (const Sizes& s : {Sizes{2, 3, 4, 0}, Sizes{2, 3, 0, 4}, Sizes{2, 0, 3, 4}, Sizes{0, 2, 3, 4}}) {
      const Tensor view = view_of(s, group, 2, indices.data());
      topk_select(Queue::cpu(2), make_tensor(scores, {s.batch, s.heads, s.rows, s.width}), o, view, {});
      for (int64_t i = 0; i < view.numel(); ++i) CHECK(indices[size_t(i)] == -1);
    }
  }
}

TEST(errors_name_what_is_wrong) {
  std::vector<float> scores(100);
  std::vector<int32_t> indices(100);
  const Queue queue = Queue::cpu(1);
  const Tensor x = make_tensor(scores.data(), {1, 2, 3, 4}), i = make_tensor(indices.data(), {1, 2, 3, 2});
  CHECK_THROWS(topk_select(queue, x, options_of(0, Group::query, false), i, {}),
               "[topk_select] k: expected a value in [1, 2147483647], got 0");
  CHECK_THROWS(topk_select(queue, x, options_of(3, Group::query, false), i, {}),
               "[topk_select] indices: expected shape [B, H, N, k] = [1, 2, 3, 3], got [1, 2, 3, 2]");
  CHECK_THROWS(topk_select(queue, x, options_of(2, Group::row_heads, false), i, {}),
               "[topk_select] indices: expected shape [B, N, k] = [1, 3, 2], got [1, 2, 3, 2]");
  CHECK_THROWS(topk_select(queue, x, options_of(2, Group::head, false), i, {}),
               "[topk_select] indices: expected shape [B, H, k] = [1, 2, 2], got [1, 2, 3, 2]");
  CHECK_THROWS(topk_select(queue, x, options_of(2, Group::batch, false), i, {}),
               "[topk_select] indices: expected shape [B, k] = [1, 2], got [1, 2, 3, 2]");
  CHECK_THROWS(topk_select(queue, x, options_of(2, Group::query, false), i, {}),
               "[topk_select] workspace: expected at least");
  CHECK_THROWS_AS(TypeMismatch, topk_select(queue, i, options_of(2, Group::query, false), i, {}),
                  "[topk_select] scores: expected dtype float32 or float16 or bfloat16, got int32");
  TopkSelectOptions o = options_of(2, Group::query, false);
  const bool keep[8] = {};
  o.key_mask = make_tensor(keep, {1, 3});
  CHECK_THROWS(topk_select(queue, x, o, i, {}), "[topk_select] key_mask: expected shape [B, M] = [1, 4], got [1, 3]");
  // An axis of stride 0 makes a group that is larger than its memory.
  Tensor huge = make_tensor(scores.data(), {1, 1, int64_t(1) << 29, 4});
  huge.stride[2] = 0;
  CHECK_THROWS_AS(
      Unsupported,
      topk_select(queue, huge, options_of(2, Group::head, false), make_tensor(indices.data(), {1, 1, 2}), {}),
      "for a group of 2^31 entries or more");
}
