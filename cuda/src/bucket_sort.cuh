/// Stable radix sort of rows of codes, with the offsets of their buckets.
///
/// A block sorts a row by counting passes over digits of up to 8 bits. A token is one word, code above token number, of
/// 32 bits where that suffices, else of 64. Every warp owns a contiguous range of the words and counts its digits in a
/// histogram of its own; a scan over (digit, warp) makes the counts places, and each warp hands its places out in the
/// order of its words. Lanes of one digit find each other by __match_any_sync: no atomics, every run gives the same
/// bits. Rows of up to 16 words a thread stay on chip between the passes: words in registers, and in shared memory when
/// they change their places (64 KiB, and 32 KiB for the counts of 32 warps). Longer rows go through scratch memory.
///
/// Bytes at best: codes read once, order written once. At 16384 tokens and 256 buckets a row is 96 KiB, and 1536 rows
/// take 33 us at 4.8 TB/s. A warp needs about 70 instructions and 12 shared-memory wavefronts for 32 words and pass:
/// 120 us for 1536 rows at 2 instructions a cycle and SM, so that instructions bound it. One block of 1024 threads fits
/// an SM.
#pragma once
#include "core/operand.h"
#include "device/warp.cuh"

namespace subquad::cuda {

static constexpr int kDigitBits = 8;
static constexpr int kBins = (1 << kDigitBits) + 1;  // the last is of the hidden tokens
static constexpr int kSortThreads = 1024;

/// Words that a thread holds in registers.
template <class Word>
static constexpr int kSortItems = 64 / int(sizeof(Word));

/// The most rows that a launch sorts.
static constexpr int64_t kMostSortRows = INT32_MAX;

/// How rows are sorted. Hidden tokens, those with mask false or a code outside [0, num_buckets), get code num_buckets.
struct SortPlan {
  int64_t rows, blocks, seq;
  int token_bits, code_bits, passes, threads;
  bool wide;    // words of 64 bits
  bool staged;  // rows stay on chip
};

struct CodeSort {
  SortPlan plan;
  int64_t heads, num_hashes;
  int32_t num_buckets, entries;
  Operand codes;         // [B, H, R, seq]  u16 | i32
  Operand mask;          // [B, seq]        bool, optional
  Operand order;         // [B, H, R, seq]          i32
  Operand offsets;       // [B, H, R, entries + 1]  i32
  Operand sorted_codes;  // [B, H, R, seq]          i32, optional
  int shift;
  bool descending;    // equal codes in descending token order
  bool lists_hidden;  // hidden tokens follow the others in `order`, in token order
  void* scratch;
};

SortPlan plan_sort(int64_t rows, int64_t seq, int64_t num_buckets);
int64_t sort_scratch_bytes(const SortPlan& plan);
const char* sort_codes(const Queue& queue, const CodeSort& sort);

/// The begin of row `index` of all in an array [B, H, R, .].
template <class T>
__device__ inline T* row_at(const CodeSort& s, const Operand& x, unsigned index) {
  const unsigned hashes = unsigned(s.num_hashes), heads = unsigned(s.heads);
  const unsigned r = index % hashes, h = index / hashes % heads, b = index / hashes / heads;
  return static_cast<T*>(x.data) + b * x.stride[0] + h * x.stride[1] + r * x.stride[2];
}

/// A row, and the shared memory of its block.
template <class Word, class Code>
struct SortRow {
  const Code* codes;
  const uint8_t* mask;
  int32_t* order;
  Word *words, *next_words;  // of two passes in turn
  int *counts, *totals;      // [warps, kBins], [kBins]
  uint32_t begin, end;       // the range of this warp in the first pass
};

template <class Word>
__device__ inline int32_t code_of(const CodeSort& s, Word word) {
  return int32_t(word >> s.plan.token_bits);
}

template <class Word>
__device__ inline int32_t token_of(const CodeSort& s, Word word) {
  return int32_t(word & ((Word(1) << s.plan.token_bits) - 1));
}

struct Digit {
  int low, bits;
};

template <class Word>
__device__ inline int digit_of(const CodeSort& s, Digit digit, Word word) {
  const int32_t code = code_of(s, word);
  return code < s.num_buckets ? code >> digit.low & ((1 << digit.bits) - 1) : 1 << digit.bits;
}

/// The word of the token that comes at place i before the sort.
template <class Word, class Code>
__device__ inline Word first_word(const CodeSort& s, const SortRow<Word, Code>& row, uint32_t i) {
  const uint32_t token = s.descending ? uint32_t(s.plan.seq) - 1 - i : i;
  int32_t code = int32_t(row.codes[token]);
  if (code < 0 || code >= s.num_buckets || (row.mask && !row.mask[token])) code = s.num_buckets;
  return Word(uint32_t(code)) << s.plan.token_bits | token;
}

/// Words [begin, end) of the present order, lane by lane, into registers.
template <class Word, class Code>
__device__ inline void load_words(const CodeSort& s, const SortRow<Word, Code>& row, bool first, uint32_t begin,
                                  uint32_t end, Word (&words)[kSortItems<Word>]) {
#pragma unroll
  for (int j = 0; j < kSortItems<Word>; ++j) {
    const uint32_t i = begin + uint32_t(kWarp * j + lane_id());
    words[j] = i >= end ? 0 : first ? first_word(s, row, i) : row.words[i];
  }
}

template <class Word>
__device__ inline void count_words(const CodeSort& s, Digit digit, uint32_t begin, uint32_t end,
                                   const Word (&words)[kSortItems<Word>], int* counts) {
#pragma unroll
  for (int j = 0; j < kSortItems<Word>; ++j) {
    if (begin + uint32_t(kWarp * j) >= end) break;
    const bool exists = begin + uint32_t(kWarp * j + lane_id()) < end;
    const int bin = exists ? digit_of(s, digit, words[j]) : -1;
    const unsigned peers = __match_any_sync(kFullMask, bin);
    if (exists && __ffs(int(peers)) - 1 == lane_id()) counts[bin] += __popc(peers);
    __syncwarp();
  }
}

/// Counts of all warps to the place of each warp's first word of each bin. `totals` becomes the begin of each bin.
__device__ inline void scan_counts(int bins, int* counts, int* totals) {
  const int warps = int(blockDim.x) / kWarp, lane = lane_id();
  __syncthreads();
  for (int bin = int(threadIdx.x); bin < bins; bin += int(blockDim.x)) {
    int sum = 0;
    for (int w = 0; w < warps; ++w) {
      const int count = counts[w * kBins + bin];
      counts[w * kBins + bin] = sum;
      sum += count;
    }
    totals[bin] = sum;
  }
  __syncthreads();
  if (warp_id() == 0) {
    const int share = (bins + kWarp - 1) / kWarp, begin = min(lane * share, bins), end = min(begin + share, bins);
    int sum = 0;
    for (int bin = begin; bin < end; ++bin) sum += totals[bin];
    int place = sum;
    for (int step = 1; step < kWarp; step *= 2) {
      const int before = __shfl_up_sync(kFullMask, place, unsigned(step));
      if (lane >= step) place += before;
    }
    place -= sum;
    for (int bin = begin; bin < end; ++bin) {
      const int count = totals[bin];
      totals[bin] = place;
      place += count;
    }
  }
  __syncthreads();
  for (int bin = lane; bin < bins; bin += kWarp) counts[warp_id() * kBins + bin] += totals[bin];
  __syncwarp();
}

/// Words to their places; hidden ones only to the end of `order`. `places` are those of this warp.
template <class Word, class Code>
__device__ inline void place_words(const CodeSort& s, const SortRow<Word, Code>& row, Digit digit, uint32_t begin,
                                   uint32_t end, const Word (&words)[kSortItems<Word>], Word* to, int* places) {
#pragma unroll
  for (int j = 0; j < kSortItems<Word>; ++j) {
    if (begin + uint32_t(kWarp * j) >= end) break;
    const bool exists = begin + uint32_t(kWarp * j + lane_id()) < end;
    const int bin = exists ? digit_of(s, digit, words[j]) : -1;
    const unsigned peers = __match_any_sync(kFullMask, bin);
    const int rank = __popc(peers & ((1u << lane_id()) - 1));
    const int place = exists ? places[bin] : 0;
    __syncwarp();
    if (exists && rank == 0) places[bin] = place + __popc(peers);
    __syncwarp();
    if (exists && bin < 1 << digit.bits) to[uint32_t(place + rank)] = words[j];
    if (exists && bin == 1 << digit.bits && s.lists_hidden) row.order[uint32_t(place + rank)] = token_of(s, words[j]);
  }
}

/// One stable pass over `count` words; returns how many of them are not hidden.
template <class Word, class Code>
__device__ inline uint32_t sort_pass(const CodeSort& s, const SortRow<Word, Code>& row, bool first, uint32_t count,
                                     Digit digit) {
  constexpr uint32_t kTile = kWarp * kSortItems<Word>;
  const int bins = (1 << digit.bits) + 1;
  int* counts = row.counts + warp_id() * kBins;
  for (int bin = lane_id(); bin < bins; bin += kWarp) counts[bin] = 0;
  __syncwarp();
  const uint32_t begin = min(row.begin, count), end = min(row.end, count);
  Word words[kSortItems<Word>];
  for (uint32_t i = begin; i < end; i += kTile) {
    load_words(s, row, first, i, end, words);
    count_words(s, digit, i, end, words, counts);
  }
  scan_counts(bins, row.counts, row.totals);
  // A staged row is one tile, still in registers: the memory it came from is now the memory it goes to.
  for (uint32_t i = begin; i < end; i += kTile) {
    if (!s.plan.staged) load_words(s, row, first, i, end, words);
    place_words(s, row, digit, i, end, words, s.plan.staged ? row.words : row.next_words, counts);
  }
  __syncthreads();
  return uint32_t(row.totals[1 << digit.bits]);
}

/// offsets[e] = place for the entries e in (before, entry] of every lane. Long gaps are filled by the whole warp.
__device__ inline void fill_offsets(int32_t* offsets, int before, int entry, uint32_t place) {
  constexpr int kShort = 4;
  const bool is_long = entry - before > kShort;
  if (!is_long)
    for (int e = before + 1; e <= entry; ++e) offsets[e] = int32_t(place);
  for (unsigned lanes = __ballot_sync(kFullMask, is_long); lanes; lanes &= lanes - 1) {
    const int lane = __ffs(int(lanes)) - 1;
    const int first = __shfl_sync(kFullMask, before, lane) + 1, last = __shfl_sync(kFullMask, entry, lane);
    const int32_t value = int32_t(__shfl_sync(kFullMask, place, lane));
    for (int e = first + lane_id(); e <= last; e += kWarp) offsets[e] = value;
  }
}

/// The outputs, from `count` sorted words.
template <class Word, class Code>
__device__ inline void write_row(const CodeSort& s, const SortRow<Word, Code>& row, unsigned index, uint32_t count) {
  int32_t* offsets = row_at<int32_t>(s, s.offsets, index);
  int32_t* codes = s.sorted_codes.data ? row_at<int32_t>(s, s.sorted_codes, index) : nullptr;
  // The place behind the last word ends the entries behind it. Whole warps take part to its end.
  for (uint32_t base = threadIdx.x - uint32_t(lane_id()); base <= count; base += blockDim.x) {
    const uint32_t place = base + uint32_t(lane_id());
    int before = -1, entry = s.entries;
    if (place < count) {
      const Word word = row.words[place];
      row.order[place] = token_of(s, word);
      if (codes) codes[place] = code_of(s, word);
      entry = code_of(s, word) >> s.shift;
    }
    if (place > 0 && place <= count) before = code_of(s, row.words[place - 1]) >> s.shift;
    if (place > count) before = entry;
    fill_offsets(offsets, before, entry, place);
  }
}

/// Row `index` of all, with shared memory [words of a staged row], [warps, kBins] counts, [kBins] totals.
template <class Word, class Code>
__device__ inline SortRow<Word, Code> sort_row_at(const CodeSort& s, unsigned index) {
  const int warps = int(blockDim.x) / kWarp;
  SortRow<Word, Code> row = {};
  row.codes = row_at<const Code>(s, s.codes, index);
  const int64_t b = index / unsigned(s.heads * s.num_hashes);
  if (s.mask.data) row.mask = static_cast<const uint8_t*>(s.mask.data) + b * s.mask.stride[0];
  row.order = row_at<int32_t>(s, s.order, index);
  Word* shared = dynamic_shared<Word>();
  if (s.plan.staged) {
    row.words = shared;
  } else {
    const int64_t buffers = s.plan.passes > 1 ? 2 : 1;
    row.next_words = static_cast<Word*>(s.scratch) + int64_t(blockIdx.x) * buffers * s.plan.seq;
    row.words = row.next_words + (buffers - 1) * s.plan.seq;
  }
  row.counts = reinterpret_cast<int*>(shared + (s.plan.staged ? s.plan.seq : 0));
  row.totals = row.counts + warps * kBins;
  const uint32_t share = uint32_t((s.plan.seq + warps * kWarp - 1) / (warps * kWarp)) * kWarp;
  row.begin = uint32_t(warp_id()) * share;
  row.end = row.begin + share;
  return row;
}

template <class Word, class Code>
__global__ void __launch_bounds__(kSortThreads) sort_codes_kernel(const __grid_constant__ CodeSort s) {
  for (unsigned index = blockIdx.x; index < unsigned(s.plan.rows); index += gridDim.x) {
    SortRow<Word, Code> row = sort_row_at<Word, Code>(s, index);
    uint32_t count = uint32_t(s.plan.seq);
    for (int pass = 0, low = 0; pass < s.plan.passes; ++pass) {
      const Digit digit = {low, (s.plan.code_bits - low) / (s.plan.passes - pass)};
      count = sort_pass(s, row, pass == 0, count, digit);
      low += digit.bits;
      if (!s.plan.staged) {
        Word* sorted = row.next_words;
        row.next_words = row.words, row.words = sorted;
      }
    }
    // The next row writes nothing that another warp still reads here before its first barrier.
    write_row(s, row, index, count);
  }
}

}  // namespace subquad::cuda
