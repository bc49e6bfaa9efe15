#include "bucket_index.cuh"
#include "bucket_sort.cuh"
#include "device/launch.cuh"

namespace subquad::cuda {
namespace {

// Rows that are too long to stay on chip need scratch memory, a piece for every block: enough blocks for any device.
constexpr int64_t kStreamingBlocks = 256;

int bits_of(int64_t value) {
  int bits = 0;
  while (value >> bits) ++bits;
  return bits;
}

int64_t word_bytes(const SortPlan& plan) { return plan.wide ? sizeof(uint64_t) : sizeof(uint32_t); }

template <class Word, class Code>
const char* sort_words(const Queue& queue, const CodeSort& sort) {
  const SortPlan& plan = sort.plan;
  const int64_t words = plan.staged ? plan.seq : 0, counts = (plan.threads / kWarp + 1) * kBins;
  const size_t shared_bytes = size_t(words * word_bytes(plan) + counts * int64_t(sizeof(int)));
  return launch(queue, sort_codes_kernel<Word, Code>, dim3(unsigned(plan.blocks)), dim3(unsigned(plan.threads)),
                shared_bytes, sort);
}

template <class Code>
const char* sort_typed(const Queue& queue, const CodeSort& sort) {
  return sort.plan.wide ? sort_words<uint64_t, Code>(queue, sort) : sort_words<uint32_t, Code>(queue, sort);
}

Operand rows_of(int32_t* data, const BucketIndexPlan& plan, int64_t length) {
  return {data, {plan.heads * plan.num_hashes * length, plan.num_hashes * length, length, 1}, DType::i32};
}

}  // namespace

SortPlan plan_sort(int64_t rows, int64_t seq, int64_t num_buckets) {
  SortPlan plan = {};
  plan.rows = rows, plan.seq = seq;
  plan.token_bits = bits_of(seq > 1 ? seq - 1 : 1);
  plan.wide = plan.token_bits + bits_of(num_buckets) > 32;
  if (plan.wide) plan.token_bits = 32;
  plan.code_bits = bits_of(num_buckets - 1);
  plan.passes = plan.code_bits > kDigitBits ? (plan.code_bits + kDigitBits - 1) / kDigitBits : 1;
  const int64_t tile = kWarp * (plan.wide ? kSortItems<uint64_t> : kSortItems<uint32_t>);
  const int64_t warps = (seq + tile - 1) / tile;
  plan.staged = warps <= kSortThreads / kWarp;
  plan.threads = !plan.staged ? kSortThreads : warps > 1 ? int(warps) * kWarp : kWarp;
  const int64_t most = plan.staged ? INT32_MAX : kStreamingBlocks;
  plan.blocks = rows < most ? rows : most;
  return plan;
}

int64_t sort_scratch_bytes(const SortPlan& plan) {
  return plan.staged ? 0 : plan.blocks * plan.seq * word_bytes(plan) * (plan.passes > 1 ? 2 : 1);
}

const char* sort_codes(const Queue& queue, const CodeSort& sort) {
  if (sort.plan.rows == 0) return nullptr;
  return sort.codes.dtype == DType::u16 ? sort_typed<uint16_t>(queue, sort) : sort_typed<int32_t>(queue, sort);
}

BucketIndexPlan plan_bucket_index(int64_t batch, int64_t heads, int64_t num_hashes, int64_t seq, int64_t num_buckets) {
  BucketIndexPlan plan = {batch, heads, num_hashes, seq, num_buckets, num_buckets, 0, false};
  // Clearing and scanning the table must not cost more than the tokens themselves.
  while (plan.entries > 2 * seq + 2048) {
    ++plan.shift;
    plan.entries = ((num_buckets - 1) >> plan.shift) + 1;
  }
  plan.lists_codes = plan.shift > 0;
  return plan;
}

BucketIndexes take_bucket_indexes(Arena& arena, const BucketIndexPlan& plan) {
  const int64_t rows = plan.batch * plan.heads * plan.num_hashes;
  BucketIndexes all = {plan, nullptr, nullptr, nullptr, nullptr};
  all.order = take<int32_t>(arena, rows * plan.seq);
  all.offsets = take<int32_t>(arena, rows * (plan.entries + 1));
  all.codes = take<int32_t>(arena, plan.lists_codes ? rows * plan.seq : 0);
  all.scratch = take<char>(arena, sort_scratch_bytes(plan_sort(rows, plan.seq, plan.num_buckets)));
  return all;
}

const char* build_bucket_indexes(const Queue& queue, const Operand& codes, const Operand& mask, bool descending,
                                 const BucketIndexes& indexes) {
  const BucketIndexPlan& plan = indexes.plan;
  CodeSort sort = {};
  sort.plan = plan_sort(plan.batch * plan.heads * plan.num_hashes, plan.seq, plan.num_buckets);
  sort.heads = plan.heads, sort.num_hashes = plan.num_hashes;
  sort.num_buckets = int32_t(plan.num_buckets), sort.entries = int32_t(plan.entries);
  sort.codes = codes, sort.mask = mask;
  sort.order = rows_of(indexes.order, plan, plan.seq);
  sort.offsets = rows_of(indexes.offsets, plan, plan.entries + 1);
  if (plan.lists_codes) sort.sorted_codes = rows_of(indexes.codes, plan, plan.seq);
  sort.shift = plan.shift;
  sort.descending = descending;
  sort.scratch = indexes.scratch;
  return sort_codes(queue, sort);
}

}  // namespace subquad::cuda
