/// Tokens of every row of codes grouped by bucket, and the way from a code to its bucket, in memory O(tokens) however
/// many buckets there are.
///
/// A table over the leading bits of the codes (all bits when there are few buckets) leads to a short range of the
/// sorted tokens; where bits are left over, a binary search in the sorted codes finishes the lookup.
#pragma once
#include "core/operand.h"
#include "device/language.cuh"

namespace subquad::cuda {

/// Rows [batch, heads, num_hashes] of `seq` codes below `num_buckets`. Their tables have a place for every value of
/// code >> shift.
struct BucketIndexPlan {
  int64_t batch, heads, num_hashes, seq, num_buckets, entries;
  int shift;
  bool lists_codes;  // always if shift > 0; a user who wants them otherwise sets it
};

BucketIndexPlan plan_bucket_index(int64_t batch, int64_t heads, int64_t num_hashes, int64_t seq, int64_t num_buckets);

/// The indexes of all rows, one behind the other.
struct BucketIndexes {
  BucketIndexPlan plan;
  int32_t* order;    // [rows, seq]
  int32_t* offsets;  // [rows, entries + 1]
  int32_t* codes;    // [rows, seq]; only if the plan lists codes
  void* scratch;     // of the sort
};

/// Lays the indexes out in `arena`, the scratch memory of the sort included. The memory need not be cleared.
BucketIndexes take_bucket_indexes(Arena& arena, const BucketIndexPlan& plan);

/// Sorts codes [batch, heads, num_hashes, seq] (u16 | i32). Tokens whose mask [batch, seq] is false and codes outside
/// [0, num_buckets) are left out. Equal codes are in token order, or with `descending` in its reverse.
const char* build_bucket_indexes(const Queue& queue, const Operand& codes, const Operand& mask, bool descending,
                                 const BucketIndexes& indexes);

/// A sorted row. Bucket c is the positions find_bucket(index, c) of `order`.
struct BucketIndex {
  const int32_t* order;    // [count] tokens by ascending code
  const int32_t* offsets;  // [entries + 1]; entry p begins at offsets[p]
  const int32_t* codes;    // [count] codes of order[.]; null if the plan lists none
  int64_t entries, num_buckets;
  int shift;
};

struct BucketRange {
  int64_t begin, end;
};

__device__ inline BucketIndex index_of(const BucketIndexes& all, int64_t b, int64_t h, int64_t r) {
  const BucketIndexPlan& plan = all.plan;
  const int64_t row = (b * plan.heads + h) * plan.num_hashes + r;
  return {all.order + row * plan.seq,
          all.offsets + row * (plan.entries + 1),
          plan.lists_codes ? all.codes + row * plan.seq : nullptr,
          plan.entries,
          plan.num_buckets,
          plan.shift};
}

/// Tokens in all buckets together.
__device__ inline int64_t bucket_index_count(const BucketIndex& index) { return index.offsets[index.entries]; }

/// The first position in [begin, end) of an ascending array whose element is at least `value`, else `end`.
__device__ inline int64_t lower_bound(const int32_t* ascending, int64_t begin, int64_t end, int64_t value) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (ascending[middle] < value)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

/// The positions of `order` whose tokens have this code; none for a code outside [0, num_buckets).
__device__ inline BucketRange find_bucket(const BucketIndex& index, int32_t code) {
  if (code < 0 || code >= index.num_buckets) return {0, 0};
  const int32_t entry = code >> index.shift;
  const BucketRange range = {index.offsets[entry], index.offsets[entry + 1]};
  if (!index.shift) return range;
  const int64_t begin = lower_bound(index.codes, range.begin, range.end, code);
  return {begin, lower_bound(index.codes, begin, range.end, int64_t(code) + 1)};
}

}  // namespace subquad::cuda
