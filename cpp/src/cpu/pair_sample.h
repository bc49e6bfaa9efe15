/// Which pairs the sampled gradient evaluates: for every target at most `num_samples` of the candidates that share its
/// bucket, and with the exact rule as many of those in the buckets one bit away.
#pragma once
#include "core/philox.h"
#include "cpu/bucket_index.h"
#include "cpu/unit_row.h"
#include "ops/bucket_gradient_args.h"

namespace subquad::cpu::SUBQUAD_ISA {

static constexpr int32_t kMaxSamples = 64, kMaxBits = 24;

/// The queries of one head, or the keys of one key head, in scratch memory. A row is a unit row (of q or k) next to a
/// value row (of dout or v), so that a pair reads one contiguous burst of its candidate; the gradient of the unit row
/// follows, so that a target is one burst too.
struct Side {
  int64_t seq, unit_size, row_size;
  BucketPlan plan;
  float* rows;      // [seq, row_size + unit_size]: row, gradient of the unit row; rows of masked tokens are not written
  Length* lengths;  // [seq] of the rows of q or k
  uint8_t* active;  // [seq] whether the token has a gradient
  int32_t* indices;  // [R, bucket_index_words(plan)]
  uint32_t* words;   // [draws, seq] random words: those for the own buckets, then those for the buckets one bit away
};

static inline float* row_of(const Side& side, int64_t token) {
  return side.rows + token * (side.row_size + side.unit_size);
}
static inline float* sum_of(const Side& side, int64_t token) { return row_of(side, token) + side.row_size; }

static inline BucketIndex index_of(const Side& side, int64_t hash) {
  return bucket_index_at(side.plan, side.indices + hash * bucket_index_words(side.plan));
}

/// Inlined by force, as prefetch is.
static __attribute__((always_inline)) inline void prefetch_candidate(const Side& side, int64_t token) {
  prefetch(row_of(side, token), side.row_size * int64_t(sizeof(float)));
}

/// Draws a target needs for one kind of buckets: a counter gives 4 words.
static inline int64_t num_draws(const BucketGradientArgs& args) { return (args.num_hashes + 3) / 4 * 4; }

/// Fills words[draw, n] for `draws` draws and the targets n in [begin, end); `first` is the second counter word of draw
/// 0, `head` the third.
static inline void draw_words(const Side& side, uint32_t* words, int64_t draws, uint64_t seed, uint32_t first,
                              uint32_t head, int64_t begin, int64_t end) {
  for (int64_t draw = 0; draw < draws; draw += 4)
    for (int64_t n = begin; n < end; ++n) {
      const philox::Words drawn = philox::words(seed, uint32_t(n), first + uint32_t(draw / 4), head, philox::kPairs);
      for (int64_t i = 0; i < 4; ++i) words[(draw + i) * side.seq + n] = drawn.w[i];
    }
}

/// How a sum over n candidates is estimated from at most `samples` of them, and the weight of each.
struct Steps {
  int64_t n;
  int32_t samples, step, rest;  // n = samples * step + rest
  float weight;
};

static inline Steps make_steps(int64_t n, int32_t samples, float scale) {
  if (n <= samples) return {n, samples, 0, 0, scale};
  const int32_t step = int32_t(uint32_t(n) / uint32_t(samples));
  return {n, samples, step, int32_t(n) - step * samples, scale * (float(n) / float(samples))};
}

/// Calls take(i) for all i < n if n <= samples, else for i = (start + floor(t n / samples)) mod n, t < samples, with a
/// random start: each i is as likely as any other.
template <class F>
static inline void spread(const Steps& steps, uint32_t word, F&& take) {
  if (steps.n <= steps.samples) {
    for (int64_t i = 0; i < steps.n; ++i) take(i);
    return;
  }
  int64_t i = philox::below(word, steps.n);
  for (int32_t t = 0, carry = 0; t < steps.samples; ++t) {
    take(i);
    i += steps.step, carry += steps.rest;
    if (carry >= steps.samples) carry -= steps.samples, ++i;
    if (i >= steps.n) i -= steps.n;
  }
}

/// The pairs of one target. Arithmetic goes by groups of 4 pairs; what fills up the last group has weight 0.
struct Picks {
  int32_t target, count;
  int32_t tokens[2 * kMaxSamples + 4];
  float weights[2 * kMaxSamples + kLanes];
  float cosines[2 * kMaxSamples + 4];  // room for the exact rule
};

/// Goes through the targets of one hash in the order of their buckets. Range 0 is the bucket of the present target,
/// range 1 + j the bucket whose code differs in bit j, each cut down to what the target sees. As targets of one bucket
/// come in token order, one end of a range stays and the other moves forward.
struct Picker {
  const BucketGradientArgs* args;
  const Side *targets, *candidates;
  bool targets_are_queries;
  BucketIndex from, to;                    // of the targets and of the candidates
  const uint32_t *own_words, *flip_words;  // [seq] of the targets
  float own_scale, flip_scale;             // weight of a pair when all candidates are taken
  int64_t entry;                           // of the present target in the table of `from`
  int32_t code;                            // whose ranges are held
  int32_t num_ranges;
  bool fetch_own;  // whether rows of the own bucket are fetched when they are picked
  int64_t begin[1 + kMaxBits], end[1 + kMaxBits], limit[1 + kMaxBits];
  int32_t first_flipped[1 + kMaxBits];  // [j] candidates in the ranges 1 ... j; never reached beyond the last range
  Steps own, flipped;
};

/// A picker for the targets at `position` and after; `scale` is the weight of a pair in the own bucket.
static inline Picker make_picker(const BucketGradientArgs& args, const Side& targets, const Side& candidates,
                                 bool targets_are_queries, int64_t hash, float scale, int64_t position) {
  Picker picker = {};
  picker.args = &args, picker.targets = &targets, picker.candidates = &candidates;
  picker.targets_are_queries = targets_are_queries;
  picker.from = index_of(targets, hash), picker.to = index_of(candidates, hash);
  picker.own_words = targets.words + hash * targets.seq;
  picker.flip_words = picker.own_words + num_draws(args) * targets.seq;
  picker.own_scale = scale, picker.flip_scale = scale / float(args.hash_bits);
  picker.entry = lower_bound(picker.from.offsets, 0, picker.from.entries, position + 1) - 1;
  picker.code = -1;
  picker.own.n = picker.flipped.n = -1;
  picker.num_ranges = args.exact ? 1 + args.hash_bits : 1;
  return picker;
}

/// The first candidate that a query does not see, or that a key does.
static inline int64_t first_beyond(const Picker& picker, int64_t target) {
  const int64_t offset = picker.args->seq_k - picker.args->seq_q;
  return picker.targets_are_queries ? target + offset + 1 : target - offset;
}

/// What follows from the ranges.
static inline void plan_steps(Picker& picker) {
  const int32_t samples = picker.args->num_samples;
  const int64_t n = picker.end[0] - picker.begin[0];
  if (n != picker.own.n) picker.own = make_steps(n, samples, picker.own_scale);
  if (!picker.args->exact) return;
  int32_t* first = picker.first_flipped;
  for (int32_t j = 1; j < picker.num_ranges; ++j) first[j] = first[j - 1] + int32_t(picker.end[j] - picker.begin[j]);
  for (int32_t j = picker.num_ranges; j <= kMaxBits; ++j) first[j] = INT32_MAX;
  const int64_t flipped = first[picker.num_ranges - 1];
  if (flipped != picker.flipped.n) picker.flipped = make_steps(flipped, samples, picker.flip_scale);
}

/// Begins to fetch the whole bucket where that is no more than what its targets will pick from it.
static inline void fetch_bucket(Picker& picker, const BucketRange& bucket) {
  constexpr int64_t kMostRows = 64;
  const int64_t n = bucket.end - bucket.begin, samples = picker.args->num_samples;
  picker.fetch_own = n > kMostRows;
  if (n > samples && n <= kMostRows) {
    const BucketRange targets = find_bucket(picker.from, picker.code);
    picker.fetch_own = n > (targets.end - targets.begin) * samples;
  }
  if (picker.fetch_own) return;
  for (int64_t i = bucket.begin; i < bucket.end; ++i) prefetch_candidate(*picker.candidates, picker.to.order[i]);
}

static inline void enter_bucket(Picker& picker, int32_t code, int64_t target) {
  picker.code = code;
  for (int32_t j = 0; j < picker.num_ranges; ++j) {
    const BucketRange bucket = find_bucket(picker.to, j ? code ^ 1 << (j - 1) : code);
    picker.begin[j] = bucket.begin, picker.end[j] = picker.limit[j] = bucket.end;
    if (j == 0) fetch_bucket(picker, bucket);
    if (!picker.args->causal) continue;
    int64_t* moving = picker.targets_are_queries ? picker.end : picker.begin;
    moving[j] = lower_bound(picker.to.order, bucket.begin, bucket.end, first_beyond(picker, target));
  }
  plan_steps(picker);
}

/// The same buckets for a later target.
static inline void move_ranges(Picker& picker, int64_t target) {
  int64_t* moving = picker.targets_are_queries ? picker.end : picker.begin;
  const int64_t bound = first_beyond(picker, target);
  for (int32_t j = 0; j < picker.num_ranges; ++j)
    while (moving[j] < picker.limit[j] && picker.to.order[moving[j]] < bound) ++moving[j];
  plan_steps(picker);
}

static inline void add_pair(Picks& picks, int32_t token, float weight) {
  picks.tokens[picks.count] = token;
  picks.weights[picks.count++] = weight;
}

static inline void pick_own(const Picker& picker, Picks& picks) {
  const int32_t* order = picker.to.order + picker.begin[0];
  spread(picker.own, picker.own_words[picks.target], [&](int64_t i) {
    if (picker.fetch_own) prefetch_candidate(*picker.candidates, order[i]);
    add_pair(picks, order[i], picker.own.weight);
  });
}

/// From the buckets one bit away, as if they were one after the other.
static inline void pick_flipped(const Picker& picker, Picks& picks) {
  spread(picker.flipped, picker.flip_words[picks.target], [&](int64_t i) {
    int32_t j = 0;
    for (int32_t next = 1; next <= kMaxBits; ++next) j += picker.first_flipped[next] <= i;
    const int32_t token = picker.to.order[picker.begin[j + 1] + i - picker.first_flipped[j]];
    prefetch_candidate(*picker.candidates, token);
    add_pair(picks, token, picker.flipped.weight);
  });
}

/// The pairs of the target at `position`, which does not decrease from call to call; begins to fetch their rows.
static inline void pick(Picker& picker, int64_t position, Picks& picks) {
  picks.target = picker.from.order[position];
  picks.count = 0;
  if (!picker.targets->active[picks.target]) return;
  if (!picker.from.shift)
    while (picker.from.offsets[picker.entry + 1] <= position) ++picker.entry;
  const int32_t code = picker.from.shift ? picker.from.codes[position] : int32_t(picker.entry);
  if (code != picker.code)
    enter_bucket(picker, code, picks.target);
  else if (picker.args->causal)
    move_ranges(picker, picks.target);
  pick_own(picker, picks);
  if (picker.args->exact) pick_flipped(picker, picks);
  if (!picks.count) return;
  for (int32_t i = 0; i < 3; ++i) {
    picks.tokens[picks.count + i] = picks.tokens[0];
    picks.weights[picks.count + i] = 0;
  }
  const Side& side = *picker.targets;
  const int64_t skipped = picker.args->exact ? 0 : side.unit_size;
  const float *row = row_of(side, picks.target) + skipped, *end = sum_of(side, picks.target) + side.unit_size;
  prefetch(row, (end - row) * int64_t(sizeof(float)));
}

}  // namespace subquad::cpu::SUBQUAD_ISA
