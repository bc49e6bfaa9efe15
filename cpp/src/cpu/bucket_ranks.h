/// Codes renumbered by the buckets that are in use, so that a table of buckets takes memory O(tokens) however many
/// buckets there could be.
#pragma once
#include <cstdint>
#include <cstring>

namespace subquad::cpu::SUBQUAD_ISA {

/// Codes of several heads: codes[h * head_step + r * hash_step + t] for t < tokens.
template <class Code>
struct CodeRows {
  const Code* codes;
  int64_t head_step, hash_step;
  int64_t heads, tokens;
  const Code* at(int64_t head, int64_t hash) const { return codes + head * head_step + hash * hash_step; }
};

/// The codes that decide which buckets exist, and those that are looked up among them.
template <class Code>
struct Sides {
  CodeRows<Code> source, target;
};

static inline int ceil_log2(int64_t n) {
  int bits = 0;
  while ((int64_t(1) << bits) < n) ++bits;
  return bits;
}

/// log2 of the entries of the map that `rank_codes` needs: 16 for every source and for the targets without one.
static inline int rank_map_bits(int64_t sources) { return ceil_log2(sources + 1) + 4; }

/// One level of a trie over the codes. `ranks`, so far the numbers of prefixes of the codes, become the numbers of the
/// prefixes that are longer by the `bits` bits at `shift`. Sources extend the map by those that appear for the first
/// time; for targets a prefix that is not there has the number `count`. Returns how many prefixes there are.
template <bool IsSource, class Code>
static uint32_t descend(const CodeRows<Code>& rows, int64_t hash, int shift, int bits, uint32_t count, uint32_t* map,
                        int32_t* ranks) {
  const int32_t digits = (1 << bits) - 1;
  for (int64_t h = 0; h < rows.heads; ++h, ranks += rows.tokens) {
    const Code* codes = rows.at(h, hash);
    for (int64_t t = 0; t < rows.tokens; ++t) {
      const int64_t entry = (int64_t(ranks[t]) << bits) + (int32_t(codes[t]) >> shift & digits);
      // Without a branch, which nobody could predict. A free entry is 2^32 - 1, any other is below `count`.
      const uint32_t number = map[entry] < count ? map[entry] : count;
      ranks[t] = int32_t(number);
      if (IsSource) map[entry] = number, count += number == count;
    }
  }
  return count;
}

/// Replaces the codes of one hash, below 2^code_bits, by the numbers 0, 1, ... of the buckets that have sources;
/// targets whose bucket has none get the next number, which is returned. The ranks are [heads, tokens]. Time and memory
/// are O(sources + targets) whatever the codes.
template <class Code>
static uint32_t rank_codes(const Sides<Code>& sides, int64_t hash, int code_bits, uint32_t* map, int32_t* of_sources,
                           int32_t* of_targets) {
  const int64_t sources = sides.source.heads * sides.source.tokens, targets = sides.target.heads * sides.target.tokens;
  std::memset(of_sources, 0, size_t(sources) * sizeof(int32_t));
  std::memset(of_targets, 0, size_t(targets) * sizeof(int32_t));
  uint32_t count = 0;
  int64_t prefixes = 1;
  for (int shift = code_bits; shift > 0; prefixes = int64_t(count) + 1) {
    const int room = rank_map_bits(sources) - ceil_log2(prefixes), bits = room < shift ? room : shift;
    shift -= bits;
    std::memset(map, 0xff, size_t(prefixes << bits) * sizeof(uint32_t));
    count = descend<true>(sides.source, hash, shift, bits, 0, map, of_sources);
    descend<false>(sides.target, hash, shift, bits, count, map, of_targets);
  }
  return count;
}

}  // namespace subquad::cpu::SUBQUAD_ISA
