#include <algorithm>
#include <random>

#include "arrays.h"
#include "selection.h"
#include "subquad/error.h"
#include "subquad/select_blocks.h"

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
  int64_t batch, heads, rows, columns;
};

/// p q^-1 factor / n, rounded to the nearest integer, ties to even.
int64_t rounded(int64_t p, int64_t q, int64_t factor, int64_t n) {
  const __int128 top = __int128(p) * factor, bottom = __int128(q) * n;
  const __int128 quotient = top / bottom, rest = 2 * (top - quotient * bottom);
  return int64_t(quotient + (rest > bottom || (rest == bottom && quotient % 2 == 1)));
}

/// top_k = p / q in lowest terms; below 2^53.
struct Fraction {
  int64_t p, q;
};

Fraction fraction_of(double x) {
  int64_t q = 1;
  for (; x != std::floor(x); x *= 2) q *= 2;
  return {int64_t(x), q};
}

bool live(int64_t column, int64_t n, int64_t columns) {
  const auto start = [&](int64_t c) { return (2 * c * n + columns) / (2 * columns); };
  return start(column + 1) > start(column);
}

/// The bits as one flag per column, by a sort of every group.
struct Reference {
  const Sizes& s;
  const Array& probs;
  const std::vector<int32_t>& visible;
  const SelectBlocksOptions& o;
  std::vector<bool> chosen;

  int64_t index(int64_t b, int64_t h, int64_t n, int64_t c) const {
    return ((b * s.heads + h) * s.rows + n) * s.columns + c;
  }

  int64_t budget(int64_t b, int64_t n, int64_t candidates) const {
    const Fraction k = fraction_of(o.top_k);
    const auto visible_at = [&](int64_t row) { return int64_t(visible[size_t(b * s.rows + row)]); };
    const auto of_row = [&](int64_t row) {
      return std::max<int64_t>(1, rounded(k.p, k.q, s.columns, visible_at(row)));
    };
    int64_t sum = 0;
    for (int64_t row = 0; row < s.rows; ++row) sum += visible_at(row) > 0 ? of_row(row) : 0;
    int64_t wanted;
    if (o.budget == BudgetRule::paper)
      wanted = o.group == Group::query       ? of_row(n)
               : o.group == Group::row_heads ? s.heads * of_row(n)
               : o.group == Group::head      ? sum
                                             : s.heads * sum;
    else
      wanted = o.group == Group::query       ? rounded(k.p, k.q, s.columns, visible_at(n))
               : o.group == Group::row_heads ? rounded(k.p, k.q, s.heads * s.columns, visible_at(n))
               : o.group == Group::head      ? rounded(k.p, k.q, s.columns, 1)
                                             : rounded(k.p, k.q, s.heads * s.columns, 1);
    return std::min(candidates, std::max<int64_t>(1, wanted));
  }

  void select_group(int64_t b, int64_t h0, int64_t h1, int64_t n0, int64_t n1) {
    std::vector<Entry> entries;
    for (int64_t h = h0; h < h1; ++h)
      for (int64_t n = n0; n < n1; ++n)
        for (int64_t c = 0; c < s.columns; ++c) {
          const int64_t seen = visible[size_t(b * s.rows + n)];
          if (seen > 0 && (!o.skip_dead || live(c, seen, s.columns)))
            entries.push_back({probs.get(index(b, h, n, c)), index(b, h, n, c)});
        }
    if (entries.empty()) return;
    std::sort(entries.begin(), entries.end(), comes_first);
    const int64_t count = budget(b, n0, int64_t(entries.size()));
    for (int64_t i = 0; i < count; ++i) chosen[size_t(entries[size_t(i)].place)] = true;
  }

  void select() {
    chosen.assign(size_t(probs.size()), false);
    const bool one_head = o.group == Group::query || o.group == Group::head;
    const bool one_row = o.group == Group::query || o.group == Group::row_heads;
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t h = 0; h < (one_head ? s.heads : 1); ++h)
        for (int64_t n = 0; n < (one_row ? s.rows : 1); ++n)
          select_group(b, one_head ? h : 0, one_head ? h + 1 : s.heads, one_row ? n : 0, one_row ? n + 1 : s.rows);
  }
};

/// One flag per column; the bits behind the last column are checked to be 0.
std::vector<bool> choice(const Sizes& s, const Array& probs, const std::vector<int32_t>& visible,
                         const SelectBlocksOptions& o, int threads) {
  const int64_t bytes = (s.columns + 7) / 8, gap = 1;
  std::vector<uint8_t> bits(size_t(s.batch * s.heads * s.rows * (bytes + gap)) + 1, 0xa5);
  Tensor view = make_tensor(bits.data(), {s.batch, s.heads, s.rows, bytes});
  for (int axis = 0; axis < 3; ++axis) view.stride[axis] = view.stride[axis] / bytes * (bytes + gap);
  const ConstTensor counts = make_tensor(visible.data(), {s.batch, s.rows});
  const Queue queue = Queue::cpu(threads);
  std::vector<char> memory(size_t(select_blocks_workspace_bytes(queue, probs.view, counts, o, view)));
  select_blocks(queue, probs.view, counts, o, view, {memory.data(), int64_t(memory.size())});
  std::vector<bool> chosen;
  for (int64_t row = 0; row < s.batch * s.heads * s.rows; ++row) {
    const uint8_t* from = &bits[size_t(row * (bytes + gap))];
    for (int64_t c = 0; c < 8 * bytes; ++c) {
      const bool bit = from[c / 8] >> c % 8 & 1;
      if (c < s.columns)
        chosen.push_back(bit);
      else
        CHECK(!bit);
    }
    CHECK(from[bytes] == 0xa5);
  }
  return chosen;
}

std::vector<int32_t> random_counts(const Sizes& s, int64_t most, std::mt19937& random) {
  std::vector<int32_t> visible;
  for (int64_t i = 0; i < s.batch * s.rows; ++i)
    visible.push_back(random() % 5 == 0 ? 0 : int32_t(random() % unsigned(most)));
  return visible;
}

void check_choice(const Sizes& s, Layout layout, bool special, int64_t most, const SelectBlocksOptions& o) {
  static const double values[] = {NAN, -NAN, kInfinity, -kInfinity, 0.0, -0.0, 1e-42, 0.25, 0.25, 0.5, -1};
  std::mt19937 random(unsigned(s.columns + most));
  Array probs({s.batch, s.heads, s.rows, s.columns}, DType::f32, layout);
  probs.fill_normal(random);
  for (int64_t i = 0; special && i < probs.size(); ++i)
    probs.set(i, values[random() % (sizeof values / sizeof *values)]);
  const std::vector<int32_t> visible = random_counts(s, most, random);
  Reference reference = {s, probs, visible, o, {}};
  reference.select();
  for (const int threads : {1, other_threads()}) CHECK(choice(s, probs, visible, o, threads) == reference.chosen);
}

SelectBlocksOptions options_of(double top_k, Group group, BudgetRule budget, bool skip_dead) {
  SelectBlocksOptions o;
  o.top_k = top_k, o.group = group, o.budget = budget, o.skip_dead = skip_dead;
  return o;
}

}  // namespace

TEST(choice_equals_a_sort) {
  check::for_each_isa([](const std::string&) {
    for (const int64_t columns : {1, 5, 8, 31, 64, 65, 100})
      for (const Group group : kGroups)
        for (const BudgetRule budget : {BudgetRule::code, BudgetRule::paper})
          for (const double top_k : {1.0, 2.5, 7.0, 1.1, 100.0})
            for (int bits = 0; bits < 4; ++bits)
              check_choice({2, 3, 7, columns}, bits & 1 ? Layout::loose : Layout::dense, (bits & 2) != 0,
                           bits & 1 ? 40 : 300, options_of(top_k, group, budget, bits & 1));
  });
}

// Every count of keys, so that each way to round is met: 12.5 and 13.5 keys go to 12 and 14.
TEST(budgets_are_exact) {
  check::for_each_isa([](const std::string&) {
    const int64_t most = 700;
    std::mt19937 random(3);
    for (const Sizes& s : {Sizes{1, 1, most, 64}, Sizes{1, 5, most, 24}, Sizes{1, 12, most, 7}}) {
      Array probs({s.batch, s.heads, s.rows, s.columns}, DType::f32);
      probs.fill_normal(random);
      std::vector<int32_t> visible;
      for (int64_t n = 0; n < most; ++n) visible.push_back(int32_t(n));
      int halves = 0;
      for (const double top_k : {1.0, 1.5, 3.0, 7.25, 64.0, 1.1, 33.3})
        for (const BudgetRule budget : {BudgetRule::code, BudgetRule::paper}) {
          const std::vector<bool> got =
              choice(s, probs, visible, options_of(top_k, Group::row_heads, budget, false), 2);
          const Fraction k = fraction_of(top_k);
          for (int64_t n = 0; n < most; ++n) {
            int64_t count = 0;
            for (int64_t h = 0; h < s.heads; ++h)
              for (int64_t c = 0; c < s.columns; ++c) count += got[size_t((h * most + n) * s.columns + c)];
            const int64_t factor = budget == BudgetRule::paper ? 1 : s.heads, entries = s.heads * s.columns;
            const int64_t wanted = n == 0 ? 0 : std::max<int64_t>(1, rounded(k.p, k.q, factor * s.columns, n));
            CHECK(count == std::min(entries, wanted * (s.heads / factor)));
            halves += n > 0 && 2 * k.p * factor * s.columns % (k.q * n) == 0 &&
                      2 * k.p * factor * s.columns / (k.q * n) % 2 == 1 && k.q < 100;
          }
        }
      CHECK(halves > 10);
    }
  });
}

TEST(extreme_budgets) {
  check::for_each_isa([](const std::string&) {
    const Sizes s = {1, 2, 3, 20};
    std::mt19937 random(8);
    Array probs({1, 2, 3, 20}, DType::f32);
    probs.fill_normal(random);
    const int32_t most = std::numeric_limits<int32_t>::max();
    const std::vector<int32_t> visible = {1, 0, most};
    for (const Group group : kGroups)
      for (const BudgetRule budget : {BudgetRule::code, BudgetRule::paper}) {
        for (const double top_k : {1e300, 0x1p62, 0x1p80, std::numeric_limits<double>::max()}) {
          const std::vector<bool> got = choice(s, probs, visible, options_of(top_k, group, budget, false), 1);
          for (int64_t i = 0; i < 120; ++i) CHECK(got[size_t(i)] == (i / 20 % 3 != 1));
        }
        // So many keys that every row asks for less than half a column.
        const std::vector<bool> got = choice(s, probs, {most, most, most}, options_of(1, group, budget, false), 1);
        const int64_t count = std::count(got.begin(), got.end(), true);
        const bool paper = budget == BudgetRule::paper;
        const int64_t expected = group == Group::query       ? 6
                                 : group == Group::row_heads ? (paper ? 6 : 3)
                                 : group == Group::head      ? (paper ? 6 : 40)
                                                             : (paper ? 6 : 40);
        CHECK(count == expected);
      }
  });
}

TEST(large_groups_are_cut_into_pieces) {
  check::for_each_isa([](const std::string&) {
    for (const BudgetRule budget : {BudgetRule::code, BudgetRule::paper})
      for (int bits = 0; bits < 4; ++bits) {
        const auto options = [&](Group group, double k) { return options_of(k, group, budget, bits & 1); };
        check_choice({1, 2, 2100, 65}, Layout::loose, (bits & 2) != 0, 90, options(Group::head, 300.5));
        check_choice({2, 3, 700, 64}, Layout::dense, (bits & 2) != 0, 90, options(Group::batch, 20));
        check_choice({1, 2, 2, 70001}, Layout::dense, (bits & 2) != 0, 90000, options(Group::row_heads, 900));
        check_choice({1, 1, 1, 140000}, Layout::dense, (bits & 2) != 0, 90000, options(Group::query, 900));
      }
  });
}

TEST(rows_do_not_depend_on_each_other) {
  const Sizes s = {1, 3, 50, 40};
  std::mt19937 random(4);
  Array probs({1, 3, 50, 40}, DType::f32);
  probs.fill_normal(random);
  std::vector<int32_t> visible;
  for (int n = 0; n < 50; ++n) visible.push_back(n + 1);
  for (const Group group : {Group::query, Group::row_heads}) {
    const SelectBlocksOptions o = options_of(4, group, BudgetRule::code, false);
    const std::vector<bool> before = choice(s, probs, visible, o, 2);
    Array changed({1, 3, 50, 40}, DType::f32);
    for (int64_t i = 0; i < probs.size(); ++i) changed.set(i, i / 40 % 50 > 30 ? NAN : probs.get(i));
    const std::vector<bool> after = choice(s, changed, visible, o, 2);
    for (int64_t i = 0; i < probs.size(); ++i)
      if (i / 40 % 50 <= 30) CHECK(before[size_t(i)] == after[size_t(i)]);
  }
}

TEST(empty_arrays) {
  float probs[64] = {};
  int32_t visible[64] = {};
  uint8_t bits[64] = {};
  for (const Group group : kGroups)
    for (const Sizes& s : {Sizes{0, 2, 3, 4}, Sizes{2, 0, 3, 4}, Sizes{2, 3, 0, 4}})
      select_blocks(Queue::cpu(2), make_tensor(probs, {s.batch, s.heads, s.rows, s.columns}),
                    make_tensor(visible, {s.batch, s.rows}), options_of(2, group, BudgetRule::code, false),
                    make_tensor(bits, {s.batch, s.heads, s.rows, 1}), {});
}

TEST(errors_name_what_is_wrong) {
  std::vector<float> probs(200);
  std::vector<int32_t> visible = {1, 2, -1};
  std::vector<uint8_t> bits(200);
  const Queue queue = Queue::cpu(1);
  const ConstTensor x = make_tensor(probs.data(), {1, 2, 3, 10}), n = make_tensor(visible.data(), {1, 3});
  const Tensor out = make_tensor(bits.data(), {1, 2, 3, 2});
  SelectBlocksOptions o;
  CHECK_THROWS(select_blocks(queue, x, n, o, out, {}),
               "[select_blocks] visible: expected values of at least 0, got -1 at [0, 2]");
  visible[2] = 0;
  CHECK_THROWS(select_blocks(queue, x, n, o, out, {}), "[select_blocks] workspace: expected at least");
  CHECK_THROWS(select_blocks(queue, x, n, o, make_tensor(bits.data(), {1, 2, 3, 1}), {}),
               "[select_blocks] bits: expected shape [B, H, N, ceil(K / 8)] = [1, 2, 3, 2], got [1, 2, 3, 1]");
  CHECK_THROWS(select_blocks(queue, x, make_tensor(visible.data(), {1, 2}), o, out, {}),
               "[select_blocks] visible: expected shape [B, N] = [1, 3], got [1, 2]");
  CHECK_THROWS(select_blocks(queue, make_tensor(probs.data(), {1, 2, 3, 0}), n, o, out, {}),
               "[select_blocks] probs: expected K in [1, 1048576], got 0");
  for (const double top_k : {0.5, -1.0, 0.0, double(NAN), kInfinity}) {
    o.top_k = top_k;
    CHECK_THROWS(select_blocks(queue, x, n, o, out, {}),
                 "[select_blocks] top_k: expected a finite number of at least 1, got " + std::to_string(top_k));
  }
  o.top_k = 2, o.group = Group::head;
  // Arrays that are only measured.
  const int64_t rows = int64_t(1) << 28;
  const auto address = [](uintptr_t terabytes) { return terabytes << 40; };
  CHECK_THROWS_AS(
      Unsupported,
      select_blocks_workspace_bytes(queue, make_tensor(reinterpret_cast<float*>(address(1)), {1, 1, rows, 8}),
                                    make_tensor(reinterpret_cast<int32_t*>(address(2)), {1, rows}), o,
                                    make_tensor(reinterpret_cast<uint8_t*>(address(3)), {1, 1, rows, 1})),
      "for a group of 2^31 entries or more");
}
