/// Tokens of one row of codes grouped by bucket, and the way from a code to its bucket, in memory O(tokens) however
/// many buckets there are.
///
/// A table over the leading bits of the codes (all bits when there are few buckets) leads to a short range of the
/// sorted tokens; where bits are left over, a binary search in the sorted codes finishes the lookup.
#pragma once
#include <cstdint>
#include <cstring>

namespace subquad::cpu::SUBQUAD_ISA {

/// How rows of `seq` codes below `num_buckets` are sorted: by `passes` of at most kLowBits of the trailing `shift`
/// bits, then by the leading bits, whose table has `entries` places.
struct BucketPlan {
  static constexpr int kLowBits = 11;  // 2048 counters stay in the first-level cache
  int64_t seq, entries;
  int shift, passes;
};

static inline BucketPlan bucket_plan(int64_t seq, int64_t num_buckets) {
  BucketPlan plan = {seq, num_buckets, 0, 0};
  // Clearing and scanning the table must not cost more than the tokens themselves.
  while (plan.entries > 2 * seq + 2048) {
    ++plan.shift;
    plan.entries = ((num_buckets - 1) >> plan.shift) + 1;
  }
  plan.passes = (plan.shift + BucketPlan::kLowBits - 1) / BucketPlan::kLowBits;
  return plan;
}

/// A sorted row. Bucket c is the positions find_bucket(index, c) of `order`.
struct BucketIndex {
  int32_t* order;    // [count] tokens by ascending code, equal codes in token order; masked tokens are left out
  int32_t* offsets;  // [entries + 1]; entry p begins at offsets[p]
  int32_t* codes;    // [count] codes[order[.]]; only if shift > 0
  int64_t entries;
  int shift;
};

struct BucketRange {
  int64_t begin, end;
};

/// Elements of int32_t that one index takes, and the view of them. The memory need not be cleared.
static inline int64_t bucket_index_words(const BucketPlan& plan) {
  return plan.entries + 1 + plan.seq * (plan.shift ? 2 : 1);
}

static inline BucketIndex bucket_index_at(const BucketPlan& plan, int32_t* words) {
  int32_t* order = words + plan.entries + 1;
  return {order, words, plan.shift ? order + plan.seq : nullptr, plan.entries, plan.shift};
}

/// Tokens in all buckets together.
static inline int64_t bucket_index_count(const BucketIndex& index) { return index.offsets[index.entries]; }

/// Elements of int32_t that build_bucket_index needs for itself, per worker; may be 0.
static inline int64_t bucket_scratch_words(const BucketPlan& plan) {
  return plan.passes ? plan.seq + (1 << BucketPlan::kLowBits) + 1 : 0;
}

/// One stable pass by digit(code): afterwards digit d of `sorted` is [begins[d], begins[d + 1]), and begins[digits] is
/// the number of tokens. `tokens` lists `count` tokens in their present order; null means 0, 1, 2, ... without those
/// whose mask is 0.
template <class Code, class Digit>
static void counting_pass(const Code* codes, const uint8_t* mask, const int32_t* tokens, int64_t count, int64_t digits,
                          Digit digit, int32_t* begins, int32_t* sorted) {
  const auto for_each_token_backwards = [&](auto&& visit) {
    if (tokens) {
      for (int64_t i = count - 1; i >= 0; --i) visit(tokens[i]);
    } else {
      for (int64_t i = count - 1; i >= 0; --i)
        if (!mask || mask[i]) visit(int32_t(i));
    }
  };
  std::memset(begins, 0, size_t(digits + 1) * sizeof(int32_t));
  for_each_token_backwards([&](int32_t token) { ++begins[digit(codes[token])]; });
  for (int64_t d = 1; d <= digits; ++d) begins[d] += begins[d - 1];
  // The sums are where digits end; filling from the back moves each to where its digit begins.
  for_each_token_backwards([&](int32_t token) { sorted[--begins[digit(codes[token])]] = token; });
}

/// Sorts a row of codes, all in [0, num_buckets) of the plan; mask (1 = keep) may be null.
template <class Code>
static void build_bucket_index(const BucketPlan& plan, const Code* codes, const uint8_t* mask, int32_t* scratch,
                               const BucketIndex& index) {
  const int32_t* tokens = nullptr;
  int64_t count = plan.seq;
  for (int pass = 0, low = 0; pass < plan.passes; ++pass) {
    const int bits = (plan.shift - low) / (plan.passes - pass);
    const int32_t digits = 1 << bits;
    int32_t* begins = scratch + plan.seq;
    // The last pass reads from the scratch, so that it can write to the index.
    int32_t* sorted = (plan.passes - pass) % 2 ? scratch : index.order;
    counting_pass(
        codes, mask, tokens, count, digits, [=](Code code) { return int32_t(code) >> low & (digits - 1); }, begins,
        sorted);
    tokens = sorted, count = begins[digits], low += bits;
  }
  const int shift = plan.shift;
  counting_pass(
      codes, mask, tokens, count, plan.entries, [=](Code code) { return int32_t(code) >> shift; }, index.offsets,
      index.order);
  if (shift)
    for (int64_t i = 0; i < count; ++i) index.codes[i] = int32_t(codes[index.order[i]]);
}

/// The first position in [begin, end) of an ascending array whose element is at least `value`, else `end`.
static inline int64_t lower_bound(const int32_t* ascending, int64_t begin, int64_t end, int64_t value) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (ascending[middle] < value)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

/// The positions of `order` whose tokens have this code; the code must be below num_buckets.
static inline BucketRange find_bucket(const BucketIndex& index, int32_t code) {
  const int32_t entry = code >> index.shift;
  const BucketRange range = {index.offsets[entry], index.offsets[entry + 1]};
  if (!index.shift) return range;
  const int64_t begin = lower_bound(index.codes, range.begin, range.end, code);
  return {begin, lower_bound(index.codes, begin, range.end, int64_t(code) + 1)};
}

}  // namespace subquad::cpu::SUBQUAD_ISA
