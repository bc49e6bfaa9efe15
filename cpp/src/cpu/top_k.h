/// The k largest of many floats without a sort: integer keys in the order of the values, and the key of rank k.
///
/// A selection is a threshold: all keys above it, and of those equal to it the first few in flat order. So the result
/// does not depend on how the threshold is found: by bisection, whose counting passes run at the speed of the cache,
/// after the range has been narrowed by a sample.
#pragma once
#include "cpu/simd.h"

namespace subquad::cpu::SUBQUAD_ISA {

/// The key of an entry that may not be selected. NaN comes next, then -inf.
static constexpr int32_t kNoCandidate = INT32_MIN, kNanKey = INT32_MIN + 1;
/// Above every key.
static constexpr int32_t kNoKey = INT32_MAX;
/// Arrays of keys are padded with kNoCandidate to a multiple of this: four vectors of the widest row.
static constexpr int64_t kKeyPadding = 64;

/// Selected are the keys above `key` and the first `ties` of those equal to it.
struct Threshold {
  int32_t key;
  int64_t ties;
};

typedef uint8_t LooseU8 __attribute__((vector_size(kLanes), aligned(1), may_alias));

/// Larger floats have larger keys; -0 and +0 have the same.
static inline I32 ordered_key(F32 x) {
  const I32 bits = as_i32(x);
  const I32 key = select(bits < I32{}, (I32)(set(0x80000000u) - as_u32(x)), bits);
  return select(x != x, set(kNanKey), key);
}

/// keys[0..count) of a row of values; up to kLanes - 1 keys behind are overwritten.
template <class T>
static inline void ordered_keys(const T* values, int64_t count, int32_t* keys) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(keys + i, ordered_key(load(values + i)));
  if (i == count) return;
  T rest[kLanes] = {};
  memcpy(rest, values + i, size_t(count - i) * sizeof(T));
  store(keys + i, ordered_key(load(rest)));
}

static inline void fill_keys(int32_t* keys, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) keys[i] = kNoCandidate;
}

/// Bit i is lane i of a mask, as comparisons give.
static inline uint32_t lane_bits(I32 mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)mask));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_ps((__m128)mask));
#elif defined(__aarch64__)
  const uint32x4_t weight = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32((uint32x4_t)mask, weight));
#endif
}

static inline int64_t sum_lanes(I32 x) {
  int64_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

/// How many of keys[0..size) are above `key`; size is a multiple of kKeyPadding.
static inline int64_t count_above(const int32_t* keys, int64_t size, int32_t key) {
#if defined(__AVX512F__)
  int64_t count[4] = {};
  const __m512i bound = _mm512_set1_epi32(key);
  for (int64_t i = 0; i < size; i += 64)
    for (int j = 0; j < 4; ++j)
      count[j] += __builtin_popcount(_mm512_cmpgt_epi32_mask(_mm512_loadu_si512(keys + i + 16 * j), bound));
  return count[0] + count[1] + count[2] + count[3];
#else
  I32 count[4] = {};
  const I32 bound = set(key);
  for (int64_t i = 0; i < size; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) count[j] -= load(keys + i + j * kLanes) > bound;
  return sum_lanes(count[0] + count[1] + count[2] + count[3]);
#endif
}

struct KeyRange {
  int32_t low, high;  // of the candidates
};

/// Of at least one candidate.
static inline KeyRange range_of(const int32_t* keys, int64_t size) {
  I32 low = set(kNoKey), high = set(kNoCandidate);
  for (int64_t i = 0; i < size; i += kLanes) {
    const I32 key = load(keys + i), floor = select(key == set(kNoCandidate), set(kNoKey), key);
    low = select(floor < low, floor, low), high = select(key > high, key, high);
  }
  KeyRange range = {low[0], high[0]};
  for (int i = 1; i < kLanes; ++i) {
    range.low = low[i] < range.low ? low[i] : range.low;
    range.high = high[i] > range.high ? high[i] : range.high;
  }
  return range;
}

/// The threshold of the `wanted` >= 1 largest of keys, of which at least so many are candidates.
static inline Threshold bisect(const int32_t* keys, int64_t size, int64_t wanted) {
  const KeyRange range = range_of(keys, size);
  // count_above(low) >= wanted > count_above(high) = above
  int64_t low = int64_t(range.low) - 1, high = range.high, above = 0;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2, count = count_above(keys, size, int32_t(middle));
    if (count == wanted) return {int32_t(middle), 0};
    if (count > wanted)
      low = middle;
    else
      high = middle, above = count;
  }
  return {int32_t(high), wanted - above};
}

struct Narrowed {
  int64_t above, within;
};

/// Counts the keys above range.high and copies those within the range to `to`, padded; `to` may be `keys`.
static inline Narrowed narrow_to(const int32_t* keys, int64_t size, KeyRange range, int32_t* to) {
  Narrowed n = {0, 0};
  const I32 low = set(range.low), high = set(range.high);
  for (int64_t i = 0; i < size; i += kLanes) {
    const I32 key = load(keys + i);
    const uint32_t above = lane_bits(key > high), within = lane_bits(key >= low) & ~above;
    n.above += __builtin_popcount(above);
#if defined(__AVX512F__)
    _mm512_storeu_si512(to + n.within, _mm512_maskz_compress_epi32(__mmask16(within), (__m512i)key));
    n.within += __builtin_popcount(within);
#else
    for (uint32_t left = within; left; left &= left - 1) to[n.within++] = key[__builtin_ctz(left)];
#endif
  }
  fill_keys(to, n.within, round_up(n.within, kKeyPadding));
  return n;
}

// Passes over fewer keys cost less than what a sample would save.
static constexpr int64_t kSample = 2048, kSampleFrom = 8192;

/// A range of keys that nearly always holds the one of rank `wanted`: its rank in a sample and about four standard
/// deviations to both sides.
static inline KeyRange sampled_range(const int32_t* keys, int64_t size, int64_t wanted) {
  alignas(64) int32_t sample[kSample];
  for (int64_t i = 0; i < kSample; ++i) sample[i] = keys[i * size / kSample];
  const int64_t candidates = count_above(sample, kSample, kNoCandidate), rank = wanted * kSample / size;
  const int64_t margin = smaller(110, 24 + rank / 8);
  const int64_t first = rank - margin, last = rank + margin;
  KeyRange range = {kNoCandidate, kNoKey};
  if (first >= 1 && candidates > 0) range.high = bisect(sample, kSample, smaller(first, candidates)).key;
  if (last <= candidates) range.low = bisect(sample, kSample, last).key;
  return range;
}

/// The threshold of the `wanted` largest of keys[0..size), `candidates` of which are candidates and `wanted` at most so
/// many. Size is a multiple of kKeyPadding; `spare` has room for the keys and kKeyPadding more.
static inline Threshold find_threshold(const int32_t* keys, int64_t size, int64_t candidates, int64_t wanted,
                                       int32_t* spare) {
  if (wanted <= 0) return {kNoKey, 0};
  if (wanted >= candidates) return {kNoCandidate, 0};
  while (size >= kSampleFrom) {
    const Narrowed n = narrow_to(keys, size, sampled_range(keys, size, wanted), spare);
    // Rarely the sample misleads, and many equal keys cannot be told apart by it.
    if (wanted <= n.above || wanted > n.above + n.within || n.within > size / 2) break;
    keys = spare, size = round_up(n.within, kKeyPadding), wanted -= n.above;
  }
  return bisect(keys, size, wanted);
}

/// Which of the lanes of `keys` that `lanes` has bits of are selected; uses up the ties of the threshold.
static inline uint32_t pick(I32 keys, uint32_t lanes, Threshold& threshold) {
  uint32_t chosen = lane_bits(keys > set(threshold.key)) & lanes;
  if (threshold.ties > 0) {
    uint32_t equal = lane_bits(keys == set(threshold.key)) & lanes;
    for (; equal && threshold.ties > 0; equal &= equal - 1, --threshold.ties) chosen |= equal & -equal;
  }
  return chosen;
}

/// Bits of the first `count` lanes.
static inline uint32_t first_lanes(int64_t count) {
  return count >= kLanes ? (uint32_t(1) << kLanes) - 1 : (uint32_t(1) << count) - 1;
}

}  // namespace subquad::cpu::SUBQUAD_ISA
