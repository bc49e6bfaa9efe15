#include "core/parallel.h"
#include "cpu/exp.h"
#include "cpu/table.h"
#include "cpu/tile.h"
#include "cpu/unit_row.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = MergeStatesArgs;

// Weights of this many rows are computed together, so that exponentials fill whole vectors.
constexpr int64_t kRows = 64;

/// Rows [first, first + rows) of one head, at most kRows.
struct Block {
  int64_t b, h, first, rows;
};

/// The shares of the two states in each row, 0 and 0 where neither has a key, and the joint lse.
struct Weights {
  alignas(64) float w1[kRows], w2[kRows], lse[kRows];
};

float* values_of(const Operand& x, const Block& block) {
  return static_cast<float*>(x.data) + block.b * x.stride[0] + block.h * x.stride[1] + block.first * x.stride[2];
}

void read_lse(const Operand& x, const Block& block, float* to) {
  const float* from = values_of(x, block);
  for (int64_t r = 0; r < block.rows; ++r) to[r] = from[r * x.stride[2]];
  for (int64_t r = block.rows; r < kRows; ++r) to[r] = 0;
}

void weigh(const Args& a, const Block& block, Weights& w) {
  read_lse(a.lse1, block, w.w1);
  read_lse(a.lse2, block, w.w2);
  for (int64_t r = 0; r < block.rows; r += kLanes) {
    const F32 lse1 = load(w.w1 + r), lse2 = load(w.w2 + r), none = set(-kInfinity);
    const F32 larger_lse = max(lse1, lse2), top = select(larger_lse == none, F32{}, larger_lse);
    const F32 e1 = exp(lse1 - top), e2 = exp(lse2 - top), sum = e1 + e2;
    store(w.w1 + r, select(lse1 == none, F32{}, e1 / sum));
    store(w.w2 + r, select(lse2 == none, F32{}, e2 / sum));
    store(w.lse + r, top + log(sum));
  }
}

/// to = factor x, or 0 for the factor 0 whatever x is.
template <class T>
void scale_into(const T* x, float factor, float* to, int64_t dim) {
  if (factor == 0) {
    memset(to, 0, size_t(dim) * sizeof(float));
    return;
  }
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) store(to + i, load(x + i) * set(factor));
  for (; i < dim; ++i) to[i] = to_float(x[i]) * factor;
}

/// to += factor x, but nothing for the factor 0.
template <class T>
void add_scaled(const T* x, float factor, float* to, int64_t dim) {
  if (factor == 0) return;
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) store(to + i, fma(set(factor), load(x + i), load(to + i)));
  for (; i < dim; ++i) to[i] += factor * to_float(x[i]);
}

/// Calls f(pointer to row n of x in its own type).
template <class F>
void with_row(const Operand& x, const Block& block, int64_t n, F&& f) {
  visit_float(x.dtype, [&](auto tag) {
    f(static_cast<const decltype(tag)*>(x.data) + block.b * x.stride[0] + block.h * x.stride[1] + n * x.stride[2]);
  });
}

void merge_rows(const Args& a, const Block& block) {
  Weights w;
  weigh(a, block, w);
  float* lse = values_of(a.lse, block);
  for (int64_t r = 0; r < block.rows; ++r) {
    alignas(64) float row[kMaxHeadDim];
    const int64_t n = block.first + r;
    with_row(a.out1, block, n, [&](const auto* x) { scale_into(x, w.w1[r], row, a.dim); });
    with_row(a.out2, block, n, [&](const auto* x) { add_scaled(x, w.w2[r], row, a.dim); });
    store_row(a.out, block.b, block.h, n, row, a.dim);
    lse[r * a.lse.stride[2]] = w.lse[r];
  }
}

/// <dout, out1 - out2> of a row.
float contrast(const Args& a, const Block& block, int64_t n, float* row) {
  alignas(64) float out1[kMaxHeadDim], out2[kMaxHeadDim];
  with_row(a.dout, block, n, [&](const auto* x) { widen_padded(x, row, a.dim); });
  with_row(a.out1, block, n, [&](const auto* x) { widen_padded(x, out1, a.dim); });
  with_row(a.out2, block, n, [&](const auto* x) { widen_padded(x, out2, a.dim); });
  for (int64_t i = 0; i < a.dim; i += kLanes) store(out1 + i, load(out1 + i) - load(out2 + i));
  return dot(row, out1, padded(a.dim));
}

void differentiate_rows(const Args& a, const Block& block) {
  Weights w;
  weigh(a, block, w);
  const float* dlse = a.dlse.data ? values_of(a.dlse, block) : nullptr;
  float *dlse1 = values_of(a.dlse1, block), *dlse2 = values_of(a.dlse2, block);
  for (int64_t r = 0; r < block.rows; ++r) {
    alignas(64) float row[kMaxHeadDim];
    const int64_t n = block.first + r;
    const float w1 = w.w1[r], w2 = w.w2[r], joint = dlse ? dlse[r * a.dlse.stride[2]] : 0.0f;
    // out1 - out = w2 (out1 - out2) and out2 - out = -w1 (out1 - out2), since the weights sum to 1.
    const float difference = w1 == 0 || w2 == 0 ? 0.0f : contrast(a, block, n, row);
    dlse1[r * a.dlse1.stride[2]] = w1 == 0 ? 0.0f : w1 * (w2 * difference + joint);
    dlse2[r * a.dlse2.stride[2]] = w2 == 0 ? 0.0f : w2 * (joint - w1 * difference);
    with_row(a.dout, block, n, [&](const auto* x) { scale_into(x, w1, row, a.dim); });
    store_row(a.dout1, block.b, block.h, n, row, a.dim);
    with_row(a.dout, block, n, [&](const auto* x) { scale_into(x, w2, row, a.dim); });
    store_row(a.dout2, block.b, block.h, n, row, a.dim);
  }
}

template <class F>
void for_each_block(const Queue& queue, const Args& a, F&& f) {
  // A task is long enough to pay for waking a thread.
  const int64_t rows = round_up(1 + 16384 / (a.dim + 16), kRows), pieces = (a.seq + rows - 1) / rows;
  core::parallel_for(queue, a.batch * a.heads * pieces, [&](int64_t task, int) {
    const int64_t head = task / pieces, first = task % pieces * rows, end = smaller(first + rows, a.seq);
    for (int64_t n = first; n < end; n += kRows) f(Block{head / a.heads, head % a.heads, n, smaller(kRows, end - n)});
  });
}

const char* run(const Queue& queue, const Args& a, void*) {
  for_each_block(queue, a, [&](const Block& block) { merge_rows(a, block); });
  return nullptr;
}

const char* run_bwd(const Queue& queue, const Args& a, void*) {
  for_each_block(queue, a, [&](const Block& block) { differentiate_rows(a, block); });
  return nullptr;
}

const char* supports(const Args& a) { return a.dim > kMaxHeadDim ? kTooWide : nullptr; }

int64_t workspace_bytes(const Queue&, const Args&) { return 0; }

}  // namespace

const Slot<MergeStatesArgs> merge_states_slot = {supports, workspace_bytes, run};
const Slot<MergeStatesArgs> merge_states_bwd_slot = {supports, workspace_bytes, run_bwd};

}  // namespace subquad::cpu::SUBQUAD_ISA
