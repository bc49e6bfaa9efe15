/// The entries of one row of a sparse pattern, whatever its form, in pieces of at most kPiece.
///
///   EntryBuffer buffer;
///   PatternRow row = pattern_row(pattern, b, h, n, ...);
///   for (RowCursor cursor = {}; next_piece(row, cursor, buffer, piece);) use piece.keys[0 .. piece.count)
///
/// Entries come in the order of the pattern (ascending keys in CSR and blocks) and all of them count: slots without a
/// key and entries of weight -inf are gone.
#pragma once
#include "cpu/block_map.h"
#include "cpu/exp.h"

namespace subquad::cpu::SUBQUAD_ISA {

// Keys and values of a piece stay in the L2 cache, and sums over one need no rescaling.
static constexpr int64_t kPiece = 256;

/// `log_weights` is null where there are none.
struct Entries {
  const int32_t* keys;
  const float* log_weights;
  int64_t count;
};

/// Room for the entries of a piece that are not simply those of the arrays.
struct EntryBuffer {
  int32_t keys[kPiece + kLanes];
  float log_weights[kPiece + kLanes];
};

struct PatternRow {
  bool is_blocks, may_skip;  // may_skip: there may be slots of -1
  // Indices and CSR
  const int32_t* keys;
  const float* log_weights;
  int64_t slots;
  // Blocks
  const uint8_t* bits;
  const int32_t* positions;
  int64_t visible, columns, cap;
};

/// Where the next piece begins: a slot; or a column and how many of its kept ranks have been given out.
struct RowCursor {
  int64_t next, given;
};

/// Row n of head h of item b; `seq_q` and `heads_q` are those of the queries.
static inline PatternRow pattern_row(const PatternArgs& p, int64_t heads_q, int64_t seq_q, int64_t b, int64_t h,
                                     int64_t n) {
  PatternRow row = {};
  if (p.form == PatternForm::blocks) {
    const Operand &bits = p.bits, &positions = p.positions;
    row.is_blocks = true;
    row.bits = static_cast<const uint8_t*>(bits.data) + b * bits.stride[0] + h * bits.stride[1] + n * bits.stride[2];
    row.visible = static_cast<const int32_t*>(p.visible.data)[b * p.visible.stride[0] + n];
    row.positions = positions.data ? static_cast<const int32_t*>(positions.data) + b * positions.stride[0] : nullptr;
    row.columns = p.num_columns, row.cap = p.block_cap;
    return row;
  }
  int64_t first, first_weight;
  if (p.form == PatternForm::csr) {
    const int64_t r = (b * heads_q + h) * seq_q + n;
    const bool narrow = p.indptr.dtype == DType::i32;
    const int32_t* indptr_i32 = static_cast<const int32_t*>(p.indptr.data);
    const int64_t* indptr_i64 = static_cast<const int64_t*>(p.indptr.data);
    first = first_weight = narrow ? indptr_i32[r] : indptr_i64[r];
    row.slots = (narrow ? indptr_i32[r + 1] : indptr_i64[r + 1]) - first;
  } else {
    const int64_t head = h / (heads_q / p.heads);
    const int64_t *s = p.indices.stride, *w = p.log_weights.stride;
    first = b * s[0] + head * s[1] + n * s[2], first_weight = b * w[0] + head * w[1] + n * w[2];
    row.slots = p.slots, row.may_skip = true;
  }
  row.keys = static_cast<const int32_t*>(p.indices.data) + first;
  if (p.log_weights.data) row.log_weights = static_cast<const float*>(p.log_weights.data) + first_weight;
  return row;
}

/// Whether a slot is to be left out, for any of `count` slots.
static inline bool any_left_out(const PatternRow& row, int64_t first, int64_t count) {
  I32 left_out = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    if (row.may_skip) left_out |= load(row.keys + first + i) < 0;
    if (row.log_weights) left_out |= load(row.log_weights + first + i) == set(-kInfinity);
  }
  bool found = any(left_out);
  for (; i < count; ++i)
    found |= (row.may_skip && row.keys[first + i] < 0) || (row.log_weights && row.log_weights[first + i] == -kInfinity);
  return found;
}

/// Copies the slots that count to the buffer.
static inline int64_t pick_entries(const PatternRow& row, int64_t first, int64_t count, EntryBuffer& to) {
  int64_t kept = 0;
  for (int64_t i = first; i < first + count; ++i) {
    to.keys[kept] = row.keys[i];
    if (row.log_weights) to.log_weights[kept] = row.log_weights[i];
    kept += !((row.may_skip && row.keys[i] < 0) || (row.log_weights && row.log_weights[i] == -kInfinity));
  }
  return kept;
}

/// The keys of ranks [begin, begin + count), whole vectors of them.
static inline void keys_of_ranks(const int32_t* positions, int64_t begin, int64_t count, int32_t* to) {
  if (positions)
    memcpy(to, positions + begin, size_t(count) * sizeof(int32_t));
  else
    for (int64_t i = 0; i < count; i += kLanes) store(to + i, lane_index() + int32_t(begin + i));
}

/// Gives out the kept ranks of the selected columns from the cursor on, at most `limit`: calls f(first rank, count, how
/// many were given before). Returns how many they are.
template <class F>
static inline int64_t walk_columns(const PatternRow& row, RowCursor& cursor, int64_t limit, F&& f) {
  int64_t count = 0;
  for (int64_t word = cursor.next / 64; row.visible > 0 && 64 * word < row.columns; ++word) {
    uint64_t bits = column_bits(row.bits, word, row.columns);
    if (word == cursor.next / 64) bits &= ~uint64_t(0) << cursor.next % 64;
    for (; bits != 0; bits &= bits - 1) {
      const int64_t column = 64 * word + __builtin_ctzll(bits);
      const RankRange kept = kept_ranks(column, row.visible, row.columns, row.cap);
      const int64_t begin = kept.begin + (column == cursor.next ? cursor.given : 0);
      const int64_t taken = smaller(kept.end - begin, limit - count);
      f(begin, taken, count);
      count += taken;
      if (begin + taken < kept.end) {
        cursor = {column, begin + taken - kept.begin};
        return count;
      }
    }
  }
  cursor = {row.columns, 0};
  return count;
}

/// How many slots the row has; of blocks, entries.
static inline int64_t count_slots(const PatternRow& row) {
  RowCursor cursor = {};
  const int64_t all = int64_t(1) << 62;
  return row.is_blocks ? walk_columns(row, cursor, all, [](int64_t, int64_t, int64_t) {}) : row.slots;
}

/// How many pieces the row has.
static inline int64_t count_pieces(const PatternRow& row) { return (count_slots(row) + kPiece - 1) / kPiece; }

/// Where piece `piece` of the row begins.
static inline RowCursor find_piece(const PatternRow& row, int64_t piece) {
  RowCursor cursor = {};
  if (row.is_blocks)
    walk_columns(row, cursor, piece * kPiece, [](int64_t, int64_t, int64_t) {});
  else
    cursor.next = piece * kPiece;
  return cursor;
}

/// Gives the next piece of the row and moves on; false behind the last.
static inline bool next_piece(const PatternRow& row, RowCursor& cursor, EntryBuffer& buffer, Entries& piece) {
  if (row.is_blocks) {
    const auto put = [&](int64_t rank, int64_t count, int64_t before) {
      keys_of_ranks(row.positions, rank, count, buffer.keys + before);
    };
    piece = {buffer.keys, nullptr, walk_columns(row, cursor, kPiece, put)};
    return piece.count > 0;
  }
  if (cursor.next >= row.slots) return false;
  const int64_t first = cursor.next, count = smaller(kPiece, row.slots - first);
  cursor.next += count;
  piece = {row.keys + first, row.log_weights ? row.log_weights + first : nullptr, count};
  if ((row.may_skip || row.log_weights) && any_left_out(row, first, count))
    piece = {buffer.keys, row.log_weights ? buffer.log_weights : nullptr, pick_entries(row, first, count, buffer)};
  return true;
}

/// The value of a row in an array [B, H, N]; null where there is no such array.
static inline float* row_value(const Operand& x, int64_t b, int64_t h, int64_t n) {
  return x.data ? element<float>(x, b, h, n) : nullptr;
}

}  // namespace subquad::cpu::SUBQUAD_ISA
