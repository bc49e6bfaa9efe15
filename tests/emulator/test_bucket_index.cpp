#include <algorithm>
#include <limits>
#include <random>

#include "bucket_index.cuh"
#include "bucket_sort.cuh"
#include "emulator/test_support.h"

using namespace subquad;

namespace {

struct Case {
  int64_t seq, num_buckets;
  bool masked, descending;
};

/// Rows [2, 2, 3] of codes, some of them outside the buckets and a quarter of them equal, with a gap behind every row.
template <class Code>
struct Problem {
  static constexpr int64_t kBatch = 2, kHeads = 2, kHashes = 3, kRows = kBatch * kHeads * kHashes;
  Case c;
  int64_t pitch = c.seq + 5;
  std::vector<Code> codes = std::vector<Code>(size_t(kRows * pitch));
  std::vector<uint8_t> mask;

  explicit Problem(const Case& sizes) : c(sizes) {
    std::mt19937 random(unsigned(c.seq + c.num_buckets));
    const int64_t outside[] = {-1, c.num_buckets, std::numeric_limits<int32_t>::min(), 1 << 30};
    for (Code& code : codes) {
      code = Code(random() % 4 ? random() % c.num_buckets : c.num_buckets / 2);
      if (random() % 16 == 0) code = Code(outside[random() % 4]);
    }
    for (int64_t i = 0; i < kBatch * c.seq; ++i) mask.push_back(random() % 3 != 0);
  }

  Operand codes_operand() {
    const DType dtype = sizeof(Code) == 2 ? DType::u16 : DType::i32;
    return {codes.data(), {kHeads * kHashes * pitch, kHashes * pitch, pitch, 1}, dtype};
  }
  Operand mask_operand() { return {c.masked ? mask.data() : nullptr, {c.seq, 1, 0, 0}, DType::boolean}; }

  bool hides(int64_t row, int64_t token) const {
    const int64_t code = codes[size_t(row * pitch + token)], b = row / (kHeads * kHashes);
    return code < 0 || code >= c.num_buckets || (c.masked && !mask[size_t(b * c.seq + token)]);
  }

  /// (code, token) in the order of the index.
  std::vector<std::pair<int64_t, int64_t>> sorted(int64_t row) const {
    std::vector<std::pair<int64_t, int64_t>> pairs;
    for (int64_t n = 0; n < c.seq; ++n)
      if (!hides(row, n)) pairs.push_back({codes[size_t(row * pitch + n)], c.descending ? -n : n});
    std::sort(pairs.begin(), pairs.end());
    for (auto& pair : pairs) pair.second = std::abs(pair.second);
    return pairs;
  }
};

template <class Code>
void check_row(const Problem<Code>& p, const cuda::BucketIndexes& all, int64_t row) {
  const int64_t r = row % p.kHashes, h = row / p.kHashes % p.kHeads, b = row / p.kHashes / p.kHeads;
  const cuda::BucketIndex index = cuda::index_of(all, b, h, r);
  const auto expected = p.sorted(row);
  CHECK(cuda::bucket_index_count(index) == int64_t(expected.size()));
  if (cuda::bucket_index_count(index) != int64_t(expected.size())) return;
  int64_t wrong = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    wrong += index.order[i] != expected[i].second;
    wrong += index.codes && index.codes[i] != expected[i].first;
  }
  std::vector<int64_t> asked = {0, p.c.num_buckets / 2, p.c.num_buckets - 1};
  for (const auto& pair : expected) asked.push_back(pair.first), asked.push_back((pair.first + 1) % p.c.num_buckets);
  for (const int64_t code : asked) {
    const cuda::BucketRange range = cuda::find_bucket(index, int32_t(code));
    const auto less = [](const auto& pair, int64_t value) { return pair.first < value; };
    const auto begin = std::lower_bound(expected.begin(), expected.end(), code, less);
    const auto end = std::lower_bound(begin, expected.end(), code + 1, less);
    wrong += end - begin != range.end - range.begin || (begin != end && begin - expected.begin() != range.begin);
  }
  for (const int64_t code : {int64_t(-1), p.c.num_buckets, int64_t(std::numeric_limits<int32_t>::min())}) {
    const cuda::BucketRange range = cuda::find_bucket(index, int32_t(code));
    wrong += range.begin != range.end;
  }
  CHECK(wrong == 0);
  if (wrong) std::printf("seq %ld, %ld buckets, row %ld\n", long(p.c.seq), long(p.c.num_buckets), long(row));
}

template <class Code>
void check_index(const Case& c, bool lists_codes = false) {
  Problem<Code> p(c);
  cuda::BucketIndexPlan plan = cuda::plan_bucket_index(p.kBatch, p.kHeads, p.kHashes, c.seq, c.num_buckets);
  plan.lists_codes = plan.lists_codes || lists_codes;
  Arena measure = {};
  cuda::take_bucket_indexes(measure, plan);
  // At an odd address and of just the size, so that sanitizers see what goes past it.
  std::vector<char> memory(size_t(with_alignment(measure)) + 1, char(0xcc));
  Arena arena = arena_at(memory.data() + 1);
  const cuda::BucketIndexes all = cuda::take_bucket_indexes(arena, plan);
  CHECK(!cuda::build_bucket_indexes(Queue::cpu(1), p.codes_operand(), p.mask_operand(), c.descending, all));
  for (int64_t row = 0; row < p.kRows; ++row) check_row(p, all, row);
}

}  // namespace

TEST(an_index_finds_every_bucket) {
  for (const int64_t seq : {0, 1, 31, 32, 33, 200, 511, 512, 513, 1100})
    for (const int64_t num_buckets : {1, 2, 200, 256, 257, 5000, 65536}) {
      check_index<uint16_t>({seq, num_buckets, seq % 2 == 0, false}, num_buckets == 256);
      check_index<int32_t>({seq, num_buckets * 256 - 1, seq % 2 == 1, true}, true);
    }
  check_index<int32_t>({700, 1 << 24, true, false});
}

TEST(an_index_is_the_same_under_every_schedule) {
  emulator::under_every_schedule([] {
    check_index<uint16_t>({1100, 256, true, false});
    check_index<int32_t>({1100, 70000, false, true});
  });
}

namespace {

/// A sort through scratch memory by 5 blocks, each of several rows, as of tokens too many to stay on chip.
template <class Code>
void check_streamed(int64_t seq, int64_t num_buckets, bool masked) {
  Problem<Code> p({seq, num_buckets, masked, false});
  std::vector<int32_t> order(size_t(p.kRows * seq)), offsets(size_t(p.kRows * (num_buckets + 1)));
  cuda::CodeSort sort = {};
  sort.plan = cuda::plan_sort(p.kRows, seq, num_buckets);
  sort.plan.staged = false, sort.plan.blocks = 5, sort.plan.threads = 128;
  sort.heads = p.kHeads, sort.num_hashes = p.kHashes, sort.num_buckets = sort.entries = int32_t(num_buckets);
  sort.codes = p.codes_operand(), sort.mask = p.mask_operand();
  const auto rows_of = [&](std::vector<int32_t>& x, int64_t n) {
    return Operand{x.data(), {p.kHeads * p.kHashes * n, p.kHashes * n, n, 1}, DType::i32};
  };
  sort.order = rows_of(order, seq), sort.offsets = rows_of(offsets, num_buckets + 1);
  sort.lists_hidden = true;
  std::vector<uint64_t> scratch(size_t(cuda::sort_scratch_bytes(sort.plan) / 8 + 1));
  sort.scratch = scratch.data();
  CHECK(!cuda::sort_codes(Queue::cpu(1), sort));
  int64_t wrong = 0;
  for (int64_t row = 0; row < p.kRows; ++row) {
    auto expected = p.sorted(row);
    const int64_t count = int64_t(expected.size());
    for (int64_t n = 0; n < seq; ++n)
      if (p.hides(row, n)) expected.push_back({num_buckets, n});
    for (int64_t i = 0; i < seq; ++i) wrong += order[size_t(row * seq + i)] != expected[size_t(i)].second;
    for (int64_t bucket = 0, i = 0; bucket <= num_buckets; ++bucket) {
      while (i < count && expected[size_t(i)].first < bucket) ++i;
      wrong += offsets[size_t(row * (num_buckets + 1) + bucket)] != i;
    }
  }
  CHECK(wrong == 0);
}

}  // namespace

TEST(long_rows_go_through_scratch_memory) {
  for (const bool masked : {false, true}) {
    check_streamed<uint16_t>(3000, 200, masked);
    check_streamed<uint16_t>(3000, 5000, masked);
    check_streamed<int32_t>(2100, 70000, masked);
    check_streamed<int32_t>(2100, 1 << 21, masked);
  }
  emulator::under_every_schedule([] { check_streamed<uint16_t>(2100, 5000, true); });
}
