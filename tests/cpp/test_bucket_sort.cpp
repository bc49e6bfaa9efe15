#define SUBQUAD_ISA index_test
#include <algorithm>
#include <random>

#include "check.h"
#include "cpu/bucket_index.h"
#include "subquad/bucket_sort.h"
#include "subquad/error.h"

using namespace subquad;

namespace {

struct Sizes {
  int64_t batch, heads, num_hashes, seq, num_buckets;
  bool masked;
};

/// Codes of few values and of all values, in rows with a gap of 5 between them.
template <class Code>
struct Problem {
  Sizes s;
  std::vector<Code> codes;
  std::vector<uint8_t> mask;
  std::vector<int32_t> order, offsets;

  explicit Problem(const Sizes& sizes) : s(sizes) {
    std::mt19937 random(7);
    codes.resize(size_t(s.batch * s.heads * s.num_hashes * (s.seq + 5)));
    for (Code& code : codes) {
      const int64_t any = random() % s.num_buckets;
      code = Code(random() % 3 ? any : any % 4 * (s.num_buckets - 1) / 3);
    }
    for (int64_t i = 0; i < s.batch * s.seq; ++i) mask.push_back(random() % 3 != 0);
    order.assign(size_t(s.batch * s.heads * s.num_hashes * s.seq), -1);
    offsets.assign(size_t(s.batch * s.heads * s.num_hashes * (s.num_buckets + 1)), -1);
  }

  Tensor codes_view() {
    Tensor view = make_tensor(codes.data(), {s.batch, s.heads, s.num_hashes, s.seq + 5});
    view.shape[3] = s.seq;
    return view;
  }
  void run(int threads) {
    const ConstTensor kept = make_tensor(reinterpret_cast<const bool*>(mask.data()), {s.batch, s.seq});
    const ConstTensor mask_view = s.masked ? kept : ConstTensor();
    const Tensor order_view = make_tensor(order.data(), {s.batch, s.heads, s.num_hashes, s.seq});
    const Tensor offsets_view = make_tensor(offsets.data(), {s.batch, s.heads, s.num_hashes, s.num_buckets + 1});
    const Queue queue = Queue::cpu(threads);
    const int64_t bytes =
        bucket_sort_workspace_bytes(queue, codes_view(), s.num_buckets, mask_view, order_view, offsets_view);
    std::vector<char> memory(size_t(bytes) + 1);
    bucket_sort(queue, codes_view(), s.num_buckets, mask_view, order_view, offsets_view, {memory.data(), bytes});
  }

  bool is_right(int64_t row) const {
    const Code* code = &codes[size_t(row * (s.seq + 5))];
    const int64_t b = row / (s.heads * s.num_hashes);
    std::vector<std::pair<int64_t, int32_t>> sorted;  // (code, token): tokens of one code stay in order
    for (int64_t n = 0; n < s.seq; ++n) {
      const bool hidden = s.masked && !mask[size_t(b * s.seq + n)];
      sorted.push_back({hidden ? s.num_buckets : int64_t(code[n]), int32_t(n)});
    }
    std::sort(sorted.begin(), sorted.end());
    for (int64_t n = 0; n < s.seq; ++n)
      if (order[size_t(row * s.seq + n)] != sorted[size_t(n)].second) return false;
    int64_t n = 0;
    for (int64_t bucket = 0; bucket <= s.num_buckets; ++bucket) {
      while (n < s.seq && sorted[size_t(n)].first < bucket) ++n;
      if (offsets[size_t(row * (s.num_buckets + 1) + bucket)] != n) return false;
    }
    return true;
  }
};

template <class Code>
void check_all(const Sizes& sizes) {
  for (int threads = 1; threads <= (check::emulated() ? 1 : 3); ++threads) {
    Problem<Code> problem(sizes);
    problem.run(threads);
    for (int64_t row = 0; row < sizes.batch * sizes.heads * sizes.num_hashes; ++row) CHECK(problem.is_right(row));
  }
}

/// Every bucket that find_bucket returns, against the tokens with that code in token order.
template <class Code>
void check_index(int64_t seq, int64_t num_buckets, bool masked) {
  namespace index = subquad::cpu::index_test;
  Problem<Code> problem({1, 1, 1, seq, num_buckets, masked});
  const index::BucketPlan plan = index::bucket_plan(seq, num_buckets);
  CHECK(plan.entries <= std::max<int64_t>(2 * seq + 2048, 1));
  std::vector<int32_t> words(size_t(index::bucket_index_words(plan)), -7);
  std::vector<int32_t> scratch(size_t(index::bucket_scratch_words(plan)) + 1, -7);
  const index::BucketIndex built = index::bucket_index_at(plan, words.data());
  const uint8_t* mask = masked ? problem.mask.data() : nullptr;
  index::build_bucket_index(plan, problem.codes.data(), mask, scratch.data(), built);
  CHECK(scratch.back() == -7);

  std::vector<std::pair<int32_t, int32_t>> expected;
  for (int64_t n = 0; n < seq; ++n)
    if (!masked || problem.mask[size_t(n)]) expected.push_back({int32_t(problem.codes[size_t(n)]), int32_t(n)});
  std::sort(expected.begin(), expected.end());
  CHECK(index::bucket_index_count(built) == int64_t(expected.size()));
  for (size_t i = 0; i < expected.size(); ++i) CHECK(built.order[i] == expected[i].second);

  std::vector<int64_t> asked = {0, 1 % num_buckets, num_buckets / 2, num_buckets - 1};
  for (const auto& pair : expected) asked.push_back(pair.first), asked.push_back((pair.first + 1) % num_buckets);
  for (const int64_t code : asked) {
    const index::BucketRange range = index::find_bucket(built, int32_t(code));
    const auto less = [](const auto& pair, int64_t value) { return pair.first < value; };
    const auto begin = std::lower_bound(expected.begin(), expected.end(), code, less);
    const auto end = std::lower_bound(begin, expected.end(), code + 1, less);
    CHECK(end - begin == range.end - range.begin);
    if (begin != end) CHECK(begin - expected.begin() == range.begin);
  }
}

}  // namespace

TEST(order_and_offsets) {
  check::for_each_isa([](const std::string&) {
    for (const bool masked : {false, true}) {
      check_all<uint16_t>({2, 3, 4, 101, 16, masked});
      check_all<uint16_t>({1, 1, 2, 7, 65536, masked});
      check_all<uint16_t>({1, 2, 1, 300, 1, masked});
      check_all<int32_t>({2, 1, 3, 33, 5000, masked});
      check_all<int32_t>({1, 1, 1, 1, int64_t(1) << 24, masked});
      check_all<int32_t>({1, 1, 1, 20000, 3, masked});
    }
  });
}

TEST(rows_on_both_sides_of_what_a_block_holds) {
  check::for_each_isa([](const std::string&) {
    for (const bool masked : {false, true}) {
      for (const int64_t seq : {31, 32, 33, 511, 512, 513, 1025}) check_all<uint16_t>({1, 1, 2, seq, 256, masked});
      for (const int64_t seq : {16384, 16385}) check_all<uint16_t>({1, 1, 1, seq, masked ? 256 : 65536, masked});
      for (const int64_t seq : {8192, 8193}) check_all<int32_t>({1, 1, 1, seq, 300000, masked});
    }
  });
}

TEST(nothing_to_sort) {
  check::for_each_isa([](const std::string&) {
    check_all<uint16_t>({0, 2, 2, 5, 4, true});
    check_all<uint16_t>({2, 2, 1, 0, 4, true});
    check_all<int32_t>({1, 2, 0, 5, 4, false});
  });
}

TEST(index_finds_every_bucket) {
  for (const bool masked : {false, true})
    for (const int64_t seq : {0, 1, 5, 700, 5000})
      for (const int64_t num_buckets : {1, 3, 256, 5000, 65536}) {
        check_index<uint16_t>(seq, num_buckets, masked);
        check_index<int32_t>(seq, num_buckets * 256 - 1, masked);
        check_index<int32_t>(seq, int64_t(1) << 24, masked);
      }
}

TEST(errors_name_what_is_wrong) {
  std::vector<uint16_t> codes = {0, 1, 2, 3, 4, 5};
  std::vector<int32_t> order(6), offsets(8), wide = {0, 1, -2, 3, 9, 5};
  const Queue queue = Queue::cpu(1);
  const Tensor c = make_tensor(codes.data(), {1, 1, 2, 3}), o = make_tensor(order.data(), {1, 1, 2, 3});
  const auto sort = [&](const Tensor& c, int64_t num_buckets, const ConstTensor& mask, const Tensor& order,
                        const Tensor& ends) { bucket_sort(queue, c, num_buckets, mask, order, ends, Workspace()); };
  const auto ends = [&](int64_t num_buckets) { return make_tensor(offsets.data(), {1, 1, 2, num_buckets + 1}); };
  CHECK_THROWS_AS(std::invalid_argument, sort(c, 3, ConstTensor(), o, ends(3)),
                  "[bucket_sort] codes: expected values in [0, 3), got 3 at [0, 0, 1, 0]");
  CHECK_THROWS(sort(make_tensor(wide.data(), {1, 1, 2, 3}), 3, ConstTensor(), o, ends(3)),
               "[bucket_sort] codes: expected values in [0, 3), got -2 at [0, 0, 0, 2]");
  CHECK_THROWS(sort(c, 0, ConstTensor(), o, ends(0)), "[bucket_sort] num_buckets: expected a value in [1, 16777216]");
  CHECK_THROWS(sort(c, 3, ConstTensor(), o, ends(2)), "[bucket_sort] offsets: expected shape");
  const bool kept[4] = {};
  CHECK_THROWS(sort(c, 3, make_tensor(kept, {1, 4}), o, ends(3)),
               "[bucket_sort] mask: expected shape [B, N] = [1, 3], got [1, 4]");
  CHECK_THROWS_AS(TypeMismatch, sort(c, 3, ConstTensor(), make_tensor(codes.data(), {1, 1, 2, 3}), ends(3)),
                  "[bucket_sort] order: expected dtype int32, got uint16");
  CHECK_THROWS(sort(make_tensor(order.data(), {1, 1, 2, 3}), 3, ConstTensor(), o, ends(3)),
               "[bucket_sort] order: expected an output that shares no memory with another argument");
}
