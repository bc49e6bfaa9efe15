/// The selection of the k largest entries of groups of rows: what select_blocks and topk_select share.
///
/// A group is a run of segments, rows of `width` contiguous entries, in flat order. A source says what they hold and
/// what becomes of the choice:
///
///   int64_t extent(Segment)                          entries from here on are no candidates
///   const char* address(Segment)                     of its first entry, of entry_bytes() bytes
///   void load(Segment, first, count, keys)           keys of entries [first, first + count)
///   int64_t budget(group, candidates)                how many to select, at most `candidates`
///   void emit(group, i, Segment, first, count, keys, threshold, taken)
///                                                    stores the choice among these entries of segment i; `taken`
///                                                    counts the entries selected so far
///   void finish(group, taken)                        after the last entry
///
/// Small groups are selected each by one thread from keys in its cache. Large ones are cut into pieces, and three
/// histograms of digits of the keys find the threshold; nothing as large as the group is stored.
#pragma once
#include "core/operand.h"
#include "core/parallel.h"
#include "cpu/top_k.h"
#include "subquad/options.h"

namespace subquad::cpu::SUBQUAD_ISA {

struct GroupShape {
  int64_t batch, heads, rows, width;
  Group group;
};

struct Segment {
  int64_t b, h, n;
};

/// Whether a group has entries of one head only, of one row only.
static inline bool by_head(const GroupShape& s) { return s.group == Group::query || s.group == Group::head; }
static inline bool by_row(const GroupShape& s) { return s.group == Group::query || s.group == Group::row_heads; }

static inline int64_t group_count(const GroupShape& s) {
  return s.batch * (by_head(s) ? s.heads : 1) * (by_row(s) ? s.rows : 1);
}

static inline int64_t segment_count(const GroupShape& s) {
  return (by_head(s) ? 1 : s.heads) * (by_row(s) ? 1 : s.rows);
}

/// The first segment of a group.
static inline Segment group_at(const GroupShape& s, int64_t group) {
  if (s.group == Group::query) return {group / s.rows / s.heads, group / s.rows % s.heads, group % s.rows};
  if (s.group == Group::row_heads) return {group / s.rows, 0, group % s.rows};
  if (s.group == Group::head) return {group / s.heads, group % s.heads, 0};
  return {group, 0, 0};
}

/// From the first segment of a group to that of the next.
static inline void next_group(const GroupShape& s, Segment& first) {
  if (by_row(s) && ++first.n < s.rows) return;
  first.n = 0;
  if (by_head(s) && ++first.h < s.heads) return;
  first.h = 0, ++first.b;
}

/// How segment i of a group differs from its first one.
static inline Segment offset_at(const GroupShape& s, int64_t i) {
  if (s.group == Group::query) return {0, 0, 0};
  if (s.group == Group::row_heads) return {0, i, 0};
  if (s.group == Group::head) return {0, 0, i};
  return {0, i / s.rows, i % s.rows};
}

/// From the offset of a segment to that of the next.
static inline void next_offset(const GroupShape& s, Segment& offset) {
  if (s.group == Group::row_heads) ++offset.h;
  if (s.group == Group::head) ++offset.n;
  if (s.group == Group::batch && ++offset.n == s.rows) offset.n = 0, ++offset.h;
}

static inline Segment sum(const Segment& a, const Segment& b) { return {a.b + b.b, a.h + b.h, a.n + b.n}; }

// Above this a group is shared by the threads: its keys would leave the L2 cache.
static constexpr int64_t kSmallGroup = int64_t(1) << 17;

static inline int64_t group_size(const GroupShape& s) { return segment_count(s) * s.width; }

static inline const char* unsupported_groups(const GroupShape& s) {
  return group_size(s) > INT32_MAX ? "a group of 2^31 entries or more" : nullptr;
}

// Small groups

/// Groups of one task: their keys fit into the L1 cache, and a segment index after the other reads runs of rows.
static inline int64_t groups_a_task(const GroupShape& s) { return larger(1, 8192 / group_size(s)); }

static inline int64_t key_pitch(const GroupShape& s) { return round_up(group_size(s), kKeyPadding) + kKeyPadding; }

/// Asks for the segment that will be loaded next; the heads of a row lie too far apart for the hardware to guess.
/// Inlined by force, as prefetch is.
template <class Source>
static __attribute__((always_inline)) inline void ask_for(const Source& source, const Segment& segment, int64_t width) {
  prefetch(source.address(segment), smaller(4096, width * source.entry_bytes()));
}

struct SmallScratch {
  int32_t* keys;   // [threads, groups of a task, pitch]
  int32_t* spare;  // [threads, pitch]
};

static inline SmallScratch take_small(Arena& arena, const Queue& queue, const GroupShape& s) {
  SmallScratch scratch;
  scratch.keys = take<int32_t>(arena, queue.num_threads * groups_a_task(s) * key_pitch(s));
  scratch.spare = take<int32_t>(arena, group_size(s) < kSampleFrom ? 0 : queue.num_threads * key_pitch(s));
  return scratch;
}

template <class Source>
static inline void select_from_keys(const GroupShape& s, const Source& source, int64_t group, const Segment& first,
                                    int64_t width, int32_t* keys, int32_t* spare) {
  const int64_t segments = segment_count(s), size = segments * width, end = round_up(size, kKeyPadding);
  fill_keys(keys, size, end);
  const int64_t candidates = count_above(keys, end, kNoCandidate);
  Threshold threshold = find_threshold(keys, end, candidates, source.budget(group, candidates), spare);
  int64_t taken = 0;
  Segment offset = {};
  for (int64_t i = 0; i < segments; ++i, next_offset(s, offset))
    source.emit(group, i, sum(first, offset), 0, width, keys + i * width, threshold, taken);
  source.finish(group, taken);
}

template <class Source>
static inline void select_small(const Queue& queue, const GroupShape& s, const Source& source,
                                const SmallScratch& scratch) {
  const int64_t groups = group_count(s), segments = segment_count(s), step = groups_a_task(s), pitch = key_pitch(s);
  core::parallel_for(queue, (groups + step - 1) / step, [&](int64_t task, int worker) {
    int32_t* keys = scratch.keys + worker * step * pitch;
    const int64_t begin = task * step, count = smaller(step, groups - begin);
    const Segment first = group_at(s, begin);
    Segment offset = {};
    for (int64_t i = 0; i < segments; ++i, next_offset(s, offset)) {
      Segment at = first, next = offset;
      next_offset(s, next);
      for (int64_t g = 0; g < count; ++g, next_group(s, at)) {
        if (i + 1 < segments) ask_for(source, sum(at, next), s.width);
        const Segment segment = sum(at, offset);
        const int64_t width = segments > 1 ? s.width : source.extent(segment);
        source.load(segment, 0, width, keys + g * pitch + i * width);
      }
    }
    Segment at = first;
    for (int64_t g = 0; g < count; ++g, next_group(s, at))
      select_from_keys(s, source, begin + g, at, segments > 1 ? s.width : source.extent(at), keys + g * pitch,
                       scratch.spare + worker * pitch);
  });
}

// Large groups

// Three digits of the keys as unsigned numbers, from the top: 11, 11 and 10 bits.
static constexpr int kLevels = 3, kBins = 2048;
static constexpr int kShift[kLevels] = {21, 10, 0};
static constexpr int64_t kChunkKeys = 2048, kPieceEntries = 65536;

/// A group in chunks of a segment each, and in pieces of some chunks each; both in flat order.
struct Pieces {
  int64_t chunk, chunks_a_segment, chunks, chunks_a_piece, count;
};

static inline Pieces pieces_of(const GroupShape& s) {
  Pieces p;
  p.chunk = smaller(s.width, kChunkKeys);
  p.chunks_a_segment = (s.width + p.chunk - 1) / p.chunk;
  p.chunks = segment_count(s) * p.chunks_a_segment;
  p.chunks_a_piece = larger(1, kPieceEntries / p.chunk);
  p.count = (p.chunks + p.chunks_a_piece - 1) / p.chunks_a_piece;
  return p;
}

struct GroupState {
  uint32_t prefix;  // the digits of the threshold found so far
  int64_t wanted;   // its rank among the keys with this prefix; 0: nothing is selected
};

struct PieceState {
  int64_t candidates, above, ties, taken;
};

struct LargeScratch {
  uint32_t* bins;  // [groups, pieces, kBins]
  GroupState* groups;
  PieceState* pieces;  // [groups, pieces]
};

static inline LargeScratch take_large(Arena& arena, const GroupShape& s) {
  const int64_t groups = group_count(s), pieces = groups * pieces_of(s).count;
  LargeScratch scratch;
  scratch.bins = take<uint32_t>(arena, pieces * kBins);
  scratch.groups = take<GroupState>(arena, groups);
  scratch.pieces = take<PieceState>(arena, pieces);
  return scratch;
}

/// Calls f(i, segment, first, count, keys) for the chunks of a piece; the keys are padded.
template <class Source, class F>
static inline void for_each_chunk(const GroupShape& s, const Pieces& p, const Source& source, int64_t group,
                                  int64_t piece, F&& f) {
  alignas(64) int32_t keys[kChunkKeys + kKeyPadding];
  const Segment first = group_at(s, group);
  const int64_t begin = piece * p.chunks_a_piece, end = smaller(begin + p.chunks_a_piece, p.chunks);
  int64_t i = begin / p.chunks_a_segment, at = begin % p.chunks_a_segment * p.chunk;
  Segment offset = offset_at(s, i);
  for (int64_t c = begin; c < end; ++c) {
    const int64_t count = smaller(p.chunk, s.width - at);
    const Segment segment = sum(first, offset);
    source.load(segment, at, count, keys);
    fill_keys(keys, count, round_up(count, kKeyPadding));
    f(i, segment, at, count, keys);
    at += p.chunk;
    if (at >= s.width) at = 0, ++i, next_offset(s, offset);
  }
}

static inline uint32_t unsigned_key(int32_t key) { return uint32_t(key) ^ 0x80000000u; }

/// Counts the first digits of all keys. Two sets of bins, since neighbours often fall into the same bin.
template <class Source>
static inline void count_first_digits(const GroupShape& s, const Pieces& p, const Source& source, int64_t group,
                                      int64_t piece, uint32_t* bins, PieceState& state) {
  uint32_t odd[kBins] = {};
  state = {};
  for_each_chunk(s, p, source, group, piece, [&](int64_t, const Segment&, int64_t, int64_t count, const int32_t* keys) {
    const int64_t padded_count = round_up(count, kKeyPadding);
    state.candidates += count_above(keys, padded_count, kNoCandidate);
    for (int64_t i = 0; i < padded_count; i += 2) {
      ++bins[unsigned_key(keys[i]) >> kShift[0]];
      ++odd[unsigned_key(keys[i + 1]) >> kShift[0]];
    }
  });
  for (int i = 0; i < kBins; ++i) bins[i] += odd[i];
}

/// Counts the digits of one level of the keys that begin with `prefix`.
template <class Source>
static inline void count_digits(const GroupShape& s, const Pieces& p, const Source& source, int64_t group,
                                int64_t piece, int level, uint32_t prefix, uint32_t* bins) {
  const U32 flip = set(0x80000000u), wanted = set(prefix);
  const uint32_t digits = (uint32_t(1) << (kShift[level - 1] - kShift[level])) - 1;
  for_each_chunk(s, p, source, group, piece, [&](int64_t, const Segment&, int64_t, int64_t count, const int32_t* keys) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const U32 key = (U32)load(keys + i) ^ flip;
      uint32_t match = lane_bits((I32)(key >> kShift[level - 1] == wanted));
      for (; match; match &= match - 1) ++bins[unsigned_key(keys[i + __builtin_ctz(match)]) >> kShift[level] & digits];
    }
  });
}

/// Adds a digit to the threshold of a group. Padding counts as keys of the lowest value, of which none is wanted.
static inline void add_digit(const Pieces& p, int level, const uint32_t* bins, GroupState& group, PieceState* pieces) {
  int64_t total[kBins] = {};
  for (int64_t piece = 0; piece < p.count; ++piece)
    for (int i = 0; i < kBins; ++i) total[i] += bins[piece * kBins + i];
  int digit = kBins - 1;
  for (; digit > 0 && total[digit] < group.wanted; --digit) group.wanted -= total[digit];
  group.prefix = level == 0 ? uint32_t(digit) : group.prefix << (kShift[level - 1] - kShift[level]) | uint32_t(digit);
  for (int64_t piece = 0; piece < p.count; ++piece) {
    const uint32_t* own = bins + piece * kBins;
    for (int i = digit + 1; i < kBins; ++i) pieces[piece].above += own[i];
    pieces[piece].ties = own[digit];
  }
}

/// Hands the ties out in order, and says where in the group's choice every piece begins.
static inline int64_t distribute(const Pieces& p, GroupState& group, PieceState* pieces) {
  int64_t taken = 0;
  for (int64_t piece = 0; piece < p.count; ++piece) {
    PieceState& state = pieces[piece];
    state.ties = smaller(state.ties, group.wanted), state.taken = taken;
    group.wanted -= state.ties, taken += state.above + state.ties;
  }
  return taken;
}

template <class Source>
static inline void select_large(const Queue& queue, const GroupShape& s, const Source& source,
                                const LargeScratch& scratch) {
  const Pieces p = pieces_of(s);
  const int64_t groups = group_count(s);
  for (int level = 0; level < kLevels; ++level) {
    core::parallel_for(queue, groups * p.count, [&](int64_t task, int) {
      const int64_t group = task / p.count, piece = task % p.count;
      uint32_t* bins = scratch.bins + task * kBins;
      memset(bins, 0, kBins * sizeof(uint32_t));
      if (level == 0)
        count_first_digits(s, p, source, group, piece, bins, scratch.pieces[task]);
      else if (scratch.groups[group].wanted > 0)
        count_digits(s, p, source, group, piece, level, scratch.groups[group].prefix, bins);
    });
    core::parallel_for(queue, groups, [&](int64_t group, int) {
      PieceState* pieces = scratch.pieces + group * p.count;
      GroupState& state = scratch.groups[group];
      if (level == 0) {
        int64_t candidates = 0;
        for (int64_t piece = 0; piece < p.count; ++piece) candidates += pieces[piece].candidates;
        state = {0, source.budget(group, candidates)};
      }
      const bool any = state.wanted > 0;
      if (any) add_digit(p, level, scratch.bins + group * p.count * kBins, state, pieces);
      if (level < kLevels - 1) return;
      source.finish(group, distribute(p, state, pieces));
      state.wanted = any;
    });
  }
  core::parallel_for(queue, groups * p.count, [&](int64_t task, int) {
    const int64_t group = task / p.count;
    const PieceState& piece = scratch.pieces[task];
    const GroupState& state = scratch.groups[group];
    Threshold threshold = {state.wanted ? int32_t(state.prefix ^ 0x80000000u) : kNoKey, piece.ties};
    int64_t taken = piece.taken;
    for_each_chunk(s, p, source, group, task % p.count,
                   [&](int64_t i, const Segment& segment, int64_t first, int64_t count, const int32_t* keys) {
                     source.emit(group, i, segment, first, count, keys, threshold, taken);
                   });
  });
}

// Both

static inline int64_t select_bytes(const Queue& queue, const GroupShape& s) {
  Arena arena = {};
  if (group_size(s) <= kSmallGroup)
    take_small(arena, queue, s);
  else
    take_large(arena, s);
  return with_alignment(arena);
}

/// Groups have at least one entry.
template <class Source>
static inline void select_groups(const Queue& queue, const GroupShape& s, const Source& source, void* workspace) {
  Arena arena = arena_at(workspace);
  if (group_size(s) <= kSmallGroup)
    select_small(queue, s, source, take_small(arena, queue, s));
  else
    select_large(queue, s, source, take_large(arena, s));
}

}  // namespace subquad::cpu::SUBQUAD_ISA
