/// Is this a SparsePattern? Its shapes, and on the CPU its values; for the operators that take one.
#pragma once
#include <algorithm>
#include <atomic>

#include "core/check.h"
#include "core/parallel.h"
#include "ops/sparse_pattern_args.h"
#include "ops/visible_check.h"
#include "subquad/sparse_pattern.h"

namespace subquad::ops {

inline void check_absent(const char* op, const char* argument, const ConstTensor& t, const char* form) {
  if (t.defined()) core::mismatch(op, argument, std::string("none in a pattern of ") + form, "an array");
}

inline void check_index_list(const char* op, const Queue& queue, const SparsePattern& p, int64_t batch, int64_t heads_q,
                             int64_t heads_kv, int64_t seq_q) {
  using core::kAny;
  core::check_array(op, "indices", queue, p.indices, {{"B", batch}, {"heads", kAny}, {"N", seq_q}, {"S", kAny}},
                    {DType::i32});
  const int64_t heads = p.indices.shape[1];
  if (heads != heads_q && (heads_q == 0 || (heads != 1 && heads != heads_kv)))
    core::invalid(op, "indices",
                  "1, Hkv = " + std::to_string(heads_kv) + " or H = " + std::to_string(heads_q) + " heads",
                  std::to_string(heads));
  if (p.log_weights.defined())
    core::check_array(op, "log_weights", queue, p.log_weights,
                      {{"B", batch}, {"heads", heads}, {"N", seq_q}, {"S", p.indices.shape[3]}}, {DType::f32});
}

inline void check_csr(const char* op, const Queue& queue, const SparsePattern& p, int64_t rows) {
  core::check_array(op, "indptr", queue, p.indptr, {{"B H N + 1", rows + 1}}, {DType::i32, DType::i64});
  core::check_array(op, "indices", queue, p.indices, {{"nnz", core::kAny}}, {DType::i32});
  if (p.log_weights.defined())
    core::check_array(op, "log_weights", queue, p.log_weights, {{"nnz", p.indices.shape[0]}}, {DType::f32});
}

inline void check_blocks(const char* op, const Queue& queue, const SparsePattern& p, int64_t batch, int64_t heads_q,
                         int64_t seq_q, int64_t seq_k) {
  check_absent(op, "indices", p.indices, "blocks");
  check_absent(op, "log_weights", p.log_weights, "blocks");
  check_absent(op, "indptr", p.indptr, "blocks");
  core::check_range(op, "num_columns", p.num_columns, 1, int64_t(1) << 20);
  core::check_array(op, "bits", queue, p.bits,
                    {{"B", batch}, {"H", heads_q}, {"N", seq_q}, {"ceil(K / 8)", (p.num_columns + 7) / 8}},
                    {DType::u8});
  check_visible(op, queue, p.visible, p.positions, batch, seq_q, seq_k);
  if (p.block_cap < 1) core::invalid(op, "block_cap", "a value of at least 1", std::to_string(p.block_cap));
}

/// Checks shapes, dtypes and devices, and gives the pattern as kernels take it. Reads no data.
inline PatternArgs check_pattern(const char* op, const Queue& queue, const SparsePattern& p, int64_t batch,
                                 int64_t heads_q, int64_t heads_kv, int64_t seq_q, int64_t seq_k) {
  PatternArgs args = {};
  args.heads = heads_q;
  if (p.bits.defined()) {
    check_blocks(op, queue, p, batch, heads_q, seq_q, seq_k);
    args.form = PatternForm::blocks;
    args.num_columns = p.num_columns, args.block_cap = p.block_cap;
  } else {
    check_absent(op, "visible", p.visible, "indices");
    check_absent(op, "positions", p.positions, "indices");
    args.form = p.indptr.defined() ? PatternForm::csr : PatternForm::indices;
    if (args.form == PatternForm::csr) {
      check_csr(op, queue, p, batch * heads_q * seq_q);
      args.entries = p.indices.shape[0];
    } else {
      check_index_list(op, queue, p, batch, heads_q, heads_kv, seq_q);
      args.heads = p.indices.shape[1], args.slots = p.indices.shape[3];
    }
  }
  args.indices = core::operand(p.indices), args.log_weights = core::operand(p.log_weights);
  args.indptr = core::operand(p.indptr);
  args.bits = core::operand(p.bits), args.visible = core::operand(p.visible);
  args.positions = core::operand(p.positions);
  return args;
}

// Values. A first pass, free of branches and on all threads, only finds out whether all is well; the second looks for
// the place to name.

/// True where holds(row) for every row; rows of about `row_size` elements each.
template <class F>
bool all_rows(const Queue& queue, int64_t rows, int64_t row_size, F&& holds) {
  constexpr int64_t kPiece = 1 << 15;
  const int64_t step = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, row_size));
  std::atomic<bool> all{true};
  const auto check = [&](int64_t task) {
    bool held = true;
    for (int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) held &= holds(row);
    if (!held) all.store(false, std::memory_order_relaxed);
  };
  const int64_t tasks = (rows + step - 1) / step;
  if (tasks == 1) check(0);
  if (tasks > 1) core::parallel_for(queue, tasks, [&](int64_t task, int) { check(task); });
  return all.load();
}

/// Bit 31 is clear exactly if lowest <= key < bound, for a lowest of -1 or 0 and a bound below 2^31.
inline uint32_t outside(int32_t key, uint32_t lowest, uint32_t bound) {
  return (uint32_t(key) - lowest) | (bound - 1 - uint32_t(key));
}

inline uint32_t largest_bound(int64_t seq_k) { return uint32_t(std::min<int64_t>(seq_k, INT32_MAX)); }

inline void check_index_values(const char* op, const Queue& queue, const PatternArgs& p, int64_t batch, int64_t seq_q,
                               int64_t seq_k) {
  const uint32_t bound = largest_bound(seq_k);
  const auto keys_of = [&](int64_t row) {
    return element<int32_t>(p.indices, row / seq_q / p.heads, row / seq_q % p.heads, row % seq_q);
  };
  const int64_t rows = batch * p.heads * seq_q;
  if (all_rows(queue, rows, p.slots, [&](int64_t row) {
        const int32_t* keys = keys_of(row);
        uint32_t bad = 0;
        for (int64_t i = 0; i < p.slots; ++i) bad |= outside(keys[i], uint32_t(-1), bound);
        return !(bad >> 31);
      }))
    return;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < p.slots; ++i)
      if (const int32_t key = keys_of(row)[i]; key < -1 || key >= seq_k)
        core::invalid(
            op, "indices", "keys in [0, " + std::to_string(seq_k) + "), or -1 for none",
            std::to_string(key) + core::at_place({row / seq_q / p.heads, row / seq_q % p.heads, row % seq_q, i}));
}

template <class Offset>
void check_offsets(const char* op, const PatternArgs& p, int64_t rows) {
  const Offset* indptr = element<Offset>(p.indptr);
  if (indptr[0] != 0) core::invalid(op, "indptr", "0 as its first value", std::to_string(indptr[0]));
  bool rises = true;
  for (int64_t r = 0; r < rows; ++r) rises &= indptr[r] <= indptr[r + 1];
  for (int64_t r = 0; !rises && r < rows; ++r)
    if (indptr[r] > indptr[r + 1])
      core::invalid(op, "indptr", "values that never fall",
                    std::to_string(indptr[r + 1]) + " after " + std::to_string(indptr[r]) + core::at_place({r + 1}));
  if (indptr[rows] != p.entries)
    core::invalid(op, "indptr", "the length of indices, " + std::to_string(p.entries) + ", as its last value",
                  std::to_string(indptr[rows]));
}

template <class Offset>
void check_csr_values(const char* op, const Queue& queue, const PatternArgs& p, int64_t rows, int64_t seq_k) {
  check_offsets<Offset>(op, p, rows);
  const Offset* indptr = element<Offset>(p.indptr);
  const int32_t* keys = element<int32_t>(p.indices);
  const uint32_t bound = largest_bound(seq_k);
  if (all_rows(queue, rows, p.entries / std::max<int64_t>(1, rows), [&](int64_t row) {
        const int64_t begin = indptr[row], end = indptr[row + 1];
        if (begin == end) return true;
        uint32_t bad = outside(keys[begin], 0, bound) | outside(keys[end - 1], 0, bound);
        for (int64_t i = begin + 1; i < end; ++i)
          bad |= uint32_t(keys[i]) | (uint32_t(keys[i]) - uint32_t(keys[i - 1]) - 1);
        return !(bad >> 31);
      }))
    return;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = indptr[row]; i < indptr[row + 1]; ++i) {
      if (keys[i] < 0 || keys[i] >= seq_k)
        core::invalid(op, "indices", "keys in [0, " + std::to_string(seq_k) + ")",
                      std::to_string(keys[i]) + core::at_place({i}));
      if (i > indptr[row] && keys[i] <= keys[i - 1])
        core::invalid(op, "indices", "keys that ascend inside a row",
                      std::to_string(keys[i]) + " after " + std::to_string(keys[i - 1]) + core::at_place({i}));
    }
  }
}

/// Checks the values of a pattern that check_pattern gave; for queues on the CPU, and only when the operator runs.
inline void check_pattern_values(const char* op, const Queue& queue, const PatternArgs& p, int64_t batch,
                                 int64_t heads_q, int64_t seq_q, int64_t seq_k) {
  if (queue.device.type != DeviceType::cpu) return;
  if (p.form == PatternForm::indices) check_index_values(op, queue, p, batch, seq_q, seq_k);
  if (p.form == PatternForm::blocks) check_visible_values(op, queue, p.visible, p.positions, batch, seq_q, seq_k);
  if (p.form != PatternForm::csr) return;
  if (p.indptr.dtype == DType::i32)
    check_csr_values<int32_t>(op, queue, p, batch * heads_q * seq_q, seq_k);
  else
    check_csr_values<int64_t>(op, queue, p, batch * heads_q * seq_q, seq_k);
}

}  // namespace subquad::ops
