#include <memory>
#include <random>

#include "check.h"
#include "subquad/error.h"
#include "subquad/visible_keys.h"

using namespace subquad;

namespace {

struct Case {
  int64_t batch, seq_q, seq_k;
  bool key_mask, query_mask, causal;
};

std::unique_ptr<bool[]> random_mask(int64_t size, std::mt19937& random) {
  std::unique_ptr<bool[]> mask(new bool[size_t(size) + 1]);
  for (int64_t i = 0; i < size; ++i) mask[size_t(i)] = random() % 3 != 0;
  return mask;
}

/// A view with a gap of `gap` elements behind every row.
template <class T>
auto spaced(T* data, int64_t rows, int64_t columns, int64_t gap) {
  auto t = make_tensor(data, {rows, columns});
  t.stride[0] = columns + gap;
  return t;
}

void check_case(const Case& c, int threads) {
  std::mt19937 random(5);
  const int64_t gap = 3;
  const auto keys = random_mask(c.batch * (c.seq_k + gap), random);
  const auto queries = random_mask(c.batch * (c.seq_q + gap), random);
  std::vector<int32_t> counts(size_t(c.batch * (c.seq_q + gap)) + 1, -7), positions(counts);
  positions.assign(size_t(c.batch * (c.seq_k + gap)) + 1, -7);
  const bool *key = keys.get(), *query = queries.get();
  visible_keys(Queue::cpu(threads), c.key_mask ? spaced(key, c.batch, c.seq_k, gap) : ConstTensor(),
               c.query_mask ? spaced(query, c.batch, c.seq_q, gap) : ConstTensor(), c.causal, c.seq_k,
               spaced(counts.data(), c.batch, c.seq_q, gap), spaced(positions.data(), c.batch, c.seq_k, gap));
  for (int64_t b = 0; b < c.batch; ++b) {
    const auto valid = [&](int64_t m) { return !c.key_mask || key[b * (c.seq_k + gap) + m]; };
    for (int64_t n = 0; n < c.seq_q + gap; ++n) {
      int32_t expected = n < c.seq_q ? 0 : -7;
      const bool kept = n < c.seq_q && (!c.query_mask || query[b * (c.seq_q + gap) + n]);
      for (int64_t m = 0; kept && m < c.seq_k; ++m) expected += valid(m) && (!c.causal || m <= n + c.seq_k - c.seq_q);
      CHECK(counts[size_t(b * (c.seq_q + gap) + n)] == expected);
    }
    std::vector<int32_t> ranked;
    for (int64_t m = 0; m < c.seq_k; ++m)
      if (valid(m)) ranked.push_back(int32_t(m));
    ranked.resize(size_t(c.seq_k), -1);
    ranked.resize(size_t(c.seq_k + gap), -7);
    for (size_t r = 0; r < ranked.size(); ++r) CHECK(positions[size_t(b * (c.seq_k + gap)) + r] == ranked[r]);
  }
}

}  // namespace

TEST(counts_and_positions) {
  check::for_each_isa([](const std::string&) {
    for (const int64_t seq_q : {0, 1, 7, 40})
      for (const int64_t seq_k : {0, 1, 8, 40, 61})
        for (int bits = 0; bits < 8; ++bits)
          for (const int threads : {1, 3})
            check_case({3, seq_q, seq_k, (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0}, threads);
    check_case({0, 4, 4, true, true, true}, 2);
  });
}

TEST(positions_are_optional) {
  int32_t counts[4];
  const bool keep[4] = {false, true, false, true};
  visible_keys(Queue::cpu(1), make_tensor(keep, {1, 4}), {}, true, 4, make_tensor(counts, {1, 4}), {});
  CHECK(counts[0] == 0 && counts[1] == 1 && counts[2] == 1 && counts[3] == 2);
}

TEST(errors_name_what_is_wrong) {
  int32_t counts[8], positions[8];
  const bool keep[8] = {};
  const Queue queue = Queue::cpu(1);
  const Tensor c = make_tensor(counts, {2, 3}), p = make_tensor(positions, {2, 4});
  const ConstTensor keys = make_tensor(keep, {2, 4}), queries = make_tensor(keep, {2, 3});
  CHECK_THROWS(visible_keys(queue, keys, queries, false, -1, c, p),
               "[visible_keys] num_keys: expected a value in [0, 2147483647], got -1");
  CHECK_THROWS(visible_keys(queue, keys, queries, false, 5, c, p),
               "[visible_keys] key_mask: expected shape [B, M] = [2, 5], got [2, 4]");
  CHECK_THROWS(visible_keys(queue, keys, keys, false, 4, c, p),
               "[visible_keys] query_mask: expected shape [B, N] = [2, 3], got [2, 4]");
  CHECK_THROWS(visible_keys(queue, keys, queries, false, 4, c, make_tensor(positions, {2, 3})),
               "[visible_keys] positions: expected shape [B, M] = [2, 4], got [2, 3]");
  CHECK_THROWS(visible_keys(queue, keys, queries, false, 4, c, make_tensor(counts, {2, 4})),
               "[visible_keys] counts: expected an output that shares no memory with another argument");
  CHECK_THROWS_AS(TypeMismatch, visible_keys(queue, keys, queries, false, 4, {}, p),
                  "[visible_keys] counts: expected an array, got none");
  CHECK_THROWS_AS(TypeMismatch, visible_keys(queue, c, queries, false, 3, c, {}),
                  "[visible_keys] key_mask: expected dtype bool, got int32");
}
