#include "cpu/block_map.h"
#include "cpu/group_select.h"
#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = SelectBlocksArgs;

// More than any group has entries.
constexpr int64_t kAll = int64_t(1) << 31;

/// x = numerator / 2^shift >= 1, exactly; whatever is at least kAll^2 counts as that.
struct Rational {
  int64_t numerator;
  int shift;
};

Rational rational(double x) {
  if (x >= 0x1p62) return {kAll * kAll, 0};
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  int exponent = int(bits >> 52) - 1023 - 52;
  int64_t significand = int64_t((bits & ((uint64_t(1) << 52) - 1)) | uint64_t(1) << 52);
  for (; exponent < 0 && significand % 2 == 0; ++exponent) significand /= 2;
  if (exponent <= 0) return {significand, -exponent};
  return {significand << exponent, 0};
}

/// x factor / divisor rounded to the nearest integer, ties to even; kAll if that is less.
int64_t rounded_quotient(const Rational& x, int64_t factor, int64_t divisor) {
  using Wide = unsigned __int128;
  const Wide top = Wide(x.numerator) * Wide(factor), bottom = Wide(divisor) << x.shift;
  Wide quotient = top / bottom;
  const Wide twice = (top - quotient * bottom) * 2;
  quotient += twice > bottom || (twice == bottom && quotient % 2 == 1);
  return quotient < Wide(kAll) ? int64_t(quotient) : kAll;
}

GroupShape shape_of(const Args& a) { return {a.batch, a.heads, a.seq_q, a.columns, a.group}; }

struct Source {
  const Args& a;
  GroupShape shape;
  Rational top_k;

  int64_t visible(int64_t b, int64_t n) const { return element<int32_t>(a.visible, b)[n]; }

  int64_t extent(const Segment&) const { return a.columns; }

  const float* row(const Segment& s) const { return element<float>(a.probs, s.b, s.h, s.n); }
  const char* address(const Segment& s) const { return reinterpret_cast<const char*>(row(s)); }
  int64_t entry_bytes() const { return sizeof(float); }

  void load(const Segment& s, int64_t first, int64_t count, int32_t* keys) const {
    const float* from = row(s) + first;
    const int64_t n = visible(s.b, s.n);
    if (n > 0 && (n >= a.columns || !a.skip_dead)) return ordered_keys(from, count, keys);
    fill_keys(keys, 0, count);
    // The live columns of a row with fewer keys than columns are those of its keys.
    for (int64_t rank = 0; rank < n; ++rank) {
      const int64_t column = column_of(rank, n, a.columns) - first;
      if (column < 0 || column >= count) continue;
      keys[column] = ordered_key(set(from[column]))[0];
    }
  }

  /// max(1, rhe(k K / n)), of the paper.
  int64_t row_budget(int64_t n) const { return larger(1, rounded_quotient(top_k, a.columns, n)); }

  /// Sum over the rows of an item.
  int64_t paper_budget(int64_t b) const {
    int64_t sum = 0, last = 0, budget = 0;
    for (int64_t row = 0; row < a.seq_q; ++row) {
      const int64_t n = visible(b, row);
      if (n > 0 && n != last) last = n, budget = row_budget(n);
      if (n > 0) sum += budget;
    }
    return sum;
  }

  int64_t unclamped_budget(const Segment& first) const {
    const bool paper = a.budget == BudgetRule::paper;
    const int64_t entries = a.heads * a.columns;
    if (a.group == Group::head) return paper ? paper_budget(first.b) : rounded_quotient(top_k, a.columns, 1);
    if (a.group == Group::batch) return paper ? a.heads * paper_budget(first.b) : rounded_quotient(top_k, entries, 1);
    const int64_t n = visible(first.b, first.n), heads = a.group == Group::row_heads ? a.heads : 1;
    return paper ? heads * row_budget(n) : rounded_quotient(top_k, heads * a.columns, n);
  }

  int64_t budget(int64_t group, int64_t candidates) const {
    if (candidates == 0) return 0;
    return smaller(candidates, larger(1, unclamped_budget(group_at(shape, group))));
  }

  void emit(int64_t, int64_t, const Segment& s, int64_t first, int64_t count, const int32_t* keys, Threshold& threshold,
            int64_t&) const {
    uint8_t* row = element<uint8_t>(a.bits, s.b, s.h, s.n);
    for (int64_t c = 0; c < count; c += 64) {
      uint64_t bits = 0;
      const int64_t end = smaller(64, count - c);
      for (int64_t i = 0; i < end; i += kLanes)
        bits |= uint64_t(pick(SUBQUAD_ISA::load(keys + c + i), first_lanes(end - i), threshold)) << i;
      uint8_t* to = row + (first + c) / 8;
      if (end == 64)
        memcpy(to, &bits, sizeof bits);
      else
        memcpy(to, &bits, size_t((end + 7) / 8));
    }
  }

  void finish(int64_t, int64_t) const {}
};

const char* run(const Queue& queue, const Args& a, void* workspace) {
  select_groups(queue, shape_of(a), Source{a, shape_of(a), rational(a.top_k)}, workspace);
  return nullptr;
}

const char* supports(const Args& a) { return unsupported_groups(shape_of(a)); }

int64_t workspace_bytes(const Queue& queue, const Args& a) { return select_bytes(queue, shape_of(a)); }

}  // namespace

const Slot<SelectBlocksArgs> select_blocks_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
