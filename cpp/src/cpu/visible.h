/// Which keys a query sees, and by which queries a key is seen, under the rules of softmax_attention.
#pragma once
#include "cpu/simd.h"
#include "ops/softmax_attention_args.h"

namespace subquad::cpu::SUBQUAD_ISA {

struct Interval {
  int64_t lo, hi;
};

/// Floor of a / b for b > 0.
static inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
static inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

static inline Interval clipped(int64_t lo, int64_t hi, int64_t end) {
  lo = larger(0, smaller(lo, end)), hi = larger(0, smaller(hi, end));
  return {lo, larger(lo, hi)};
}

/// The keys of [0, seq_k) that query `row` sees. Both ends grow with the row.
static inline Interval keys_seen(const VisibleRule& rule, int64_t row, int64_t seq_k) {
  const int64_t p = row + rule.offset;
  if (rule.kind == Visible::band)
    return clipped(rule.left < 0 ? 0 : p - rule.left, rule.right < 0 ? seq_k : p + rule.right + 1, seq_k);
  if (rule.kind == Visible::cell) return clipped(row * rule.chunk, (row + 1) * rule.chunk, seq_k);
  if (rule.kind == Visible::all) return {0, seq_k};
  const int64_t block = floor_div(p, rule.block), begin = block * rule.block, end = begin + rule.block;
  if (rule.kind == Visible::before) return clipped(0, floor_div(begin, rule.chunk), seq_k);
  if (rule.kind == Visible::after) return clipped(ceil_div(end, rule.chunk), seq_k, seq_k);
  return clipped(begin, rule.causal ? p + 1 : end, seq_k);
}

/// The queries of [0, seq_q) that see key `key`: the inverse of keys_seen. Both ends grow with the key.
static inline Interval rows_seeing(const VisibleRule& rule, int64_t key, int64_t seq_q) {
  int64_t lo = rule.offset, hi = rule.offset + seq_q;  // in positions p
  if (rule.kind == Visible::band) {
    if (rule.right >= 0) lo = key - rule.right;
    if (rule.left >= 0) hi = key + rule.left + 1;
  } else if (rule.kind == Visible::cell) {
    return clipped(key / rule.chunk, key / rule.chunk + 1, seq_q);
  } else if (rule.kind == Visible::all) {
    return {0, seq_q};
  } else if (rule.kind == Visible::before) {
    lo = ceil_div((key + 1) * rule.chunk, rule.block) * rule.block;
  } else if (rule.kind == Visible::after) {
    hi = floor_div(key * rule.chunk, rule.block) * rule.block;
  } else {
    const int64_t begin = key / rule.block * rule.block;
    lo = rule.causal ? key : begin, hi = begin + rule.block;
  }
  return clipped(lo - rule.offset, hi - rule.offset, seq_q);
}

}  // namespace subquad::cpu::SUBQUAD_ISA
