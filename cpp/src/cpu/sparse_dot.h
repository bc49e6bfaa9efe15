/// Products with rows of keys and values that stand anywhere in memory, named by their indices.
///
///   scores[r][i] = <q_r, k_{keys[i]}>,   sums[r][:] = sum_i weights[r][i] v_{keys[i]}
///
/// for R rows of queries that have the same keys. Each score is a chain of fused multiply-adds over the vectors of a
/// row and a tree over their lanes, each sum one chain in the order of the keys: the bits do not depend on R.
/// There are no prefetches: the loads do not depend on each other, and asking for rows ahead was measured to be slower.
#pragma once
#include "cpu/gathered_rows.h"
#include "cpu/sparse_rows.h"

namespace subquad::cpu::SUBQUAD_ISA {

// Distance between the rows of scores: a last vector may reach past a piece.
static constexpr int64_t kScorePitch = kPiece + kLanes;

/// The groups of four lanes with even and with odd numbers of two vectors.
template <int... L>
static inline F32 add_neighbour_groups(F32 a, F32 b, Lanes<L...>) {
  return __builtin_shufflevector(a, b, (L / 4 * 8 + L % 4)...) +
         __builtin_shufflevector(a, b, (L / 4 * 8 + L % 4 + 4)...);
}

template <int Count>
static inline void add_groups(F32* x) {
  for (int i = 0; i < Count; ++i) x[i] = add_neighbour_groups(x[2 * i], x[2 * i + 1], AllLanes{});
  if constexpr (Count > 1) add_groups<Count / 2>(x);
}

/// Lane i of the result is the sum of the lanes of x[i]. All steps are shuffles within or of whole groups of four
/// lanes, the cheap ones.
static inline F32 sum_each(F32 (&x)[kLanes]) {
  for (int i = 0; i < kLanes / 4; ++i) {
    F32 *own = x + 4 * i, sum[2];
    for (int j = 0; j < 2; ++j) {
      interleave_groups<1>(own[2 * j], own[2 * j + 1], AllLanes{});
      sum[j] = own[2 * j] + own[2 * j + 1];
    }
    interleave_groups<2>(sum[0], sum[1], AllLanes{});
    x[i] = sum[0] + sum[1];
  }
  if constexpr (kLanes > 4) add_groups<kLanes / 8>(x);
  return x[0];
}

/// Products of R queries [R, pitch] and kLanes / R keys; the result holds those of the first query first. `Vectors`
/// whole vectors of a row, or as many as its dimension has for 0.
template <int R, int Vectors, class T>
static inline F32 dot_group(const float* q, int64_t pitch, const HeadRows<T>& k, const RowTail& tail,
                            const int32_t* keys) {
  constexpr int kKeys = kLanes / R;
  const int64_t vectors = Vectors ? Vectors : k.dim / kLanes;
  F32 sum[kLanes];
  for (int i = 0; i < kKeys; ++i) {
    const T* row = k.at(keys[i]);
    F32 s[R] = {};
    for (int64_t d = 0; d < vectors; ++d) {
      const F32 x = load(row + d * kLanes);
      for (int r = 0; r < R; ++r) s[r] = fma(load(q + r * pitch + d * kLanes), x, s[r]);
    }
    if (tail.rest) {
      const F32 x = load_tail(row, k.dim, tail);
      for (int r = 0; r < R; ++r) s[r] = fma(load(q + r * pitch + tail.begin), x, s[r]);
    }
    for (int r = 0; r < R; ++r) sum[r * kKeys + i] = s[r];
  }
  return sum_each(sum);
}

/// scores [R, kScorePitch] of a piece for queries padded with zeros.
template <int R, int Vectors, class T>
static inline void dot_piece(const float* q, int64_t pitch, const HeadRows<T>& k, const Entries& piece, float* scores) {
  constexpr int kKeys = kLanes / R;
  const RowTail tail = Vectors ? RowTail{} : row_tail(k.dim);
  for (int64_t i = 0; i < piece.count; i += kKeys) {
    const int32_t* keys = piece.keys + i;
    int32_t last[kKeys];
    if (i + kKeys > piece.count) {
      for (int j = 0; j < kKeys; ++j) last[j] = piece.keys[smaller(i + j, piece.count - 1)];
      keys = last;
    }
    const F32 dots = dot_group<R, Vectors>(q, pitch, k, tail, keys);
    if constexpr (R == 1) {
      store(scores + i, dots);
    } else {
      float lane[kLanes];
      store(lane, dots);
      for (int r = 0; r < R; ++r) memcpy(scores + r * kScorePitch + i, lane + r * kKeys, sizeof(float) * kKeys);
    }
  }
}

/// Columns `offset[..]` of the sums, a vector each.
template <int R, int Vectors, class T>
static inline void weigh_columns(const float* weights, const HeadRows<T>& v, const Entries& piece,
                                 const int64_t (&offset)[Vectors], float* sums, int64_t pitch) {
  F32 sum[R][Vectors] = {};
  for (int64_t i = 0; i < piece.count; ++i) {
    const T* row = v.at(piece.keys[i]);
    F32 x[Vectors];
    for (int j = 0; j < Vectors; ++j) x[j] = load(row + offset[j]);
    for (int r = 0; r < R; ++r) {
      const F32 weight = set(weights[r * kScorePitch + i]);
      for (int j = 0; j < Vectors; ++j) sum[r][j] = fma(weight, x[j], sum[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < Vectors; ++j) store(sums + r * pitch + offset[j], sum[r][j]);
}

/// Rows narrower than a vector.
template <int R, class T>
static inline void weigh_narrow(const float* weights, const HeadRows<T>& v, const Entries& piece, float* sums,
                                int64_t pitch) {
  F32 sum[R] = {};
  for (int64_t i = 0; i < piece.count; ++i) {
    const F32 x = load_part(v.at(piece.keys[i]), v.dim);
    for (int r = 0; r < R; ++r) sum[r] = fma(set(weights[r * kScorePitch + i]), x, sum[r]);
  }
  for (int r = 0; r < R; ++r) store(sums + r * pitch, sum[r]);
}

/// sums [R, pitch] = weights [R, kScorePitch] times the values of a piece.
template <int R, class T>
static inline void weigh_piece(const float* weights, const HeadRows<T>& v, const Entries& piece, float* sums,
                               int64_t pitch) {
  if (v.dim < kLanes) return weigh_narrow<R>(weights, v, piece, sums, pitch);
  // The last vector may overlap the one before: it forms the same sums again.
  const auto at = [&](int64_t e) { return smaller(e, v.dim - kLanes); };
  int64_t e = 0;
  for (; e + 3 * kLanes < v.dim; e += 4 * kLanes) {
    const int64_t offset[4] = {e, e + kLanes, e + 2 * kLanes, at(e + 3 * kLanes)};
    weigh_columns<R>(weights, v, piece, offset, sums, pitch);
  }
  for (; e < v.dim; e += kLanes) {
    const int64_t offset[1] = {at(e)};
    weigh_columns<R>(weights, v, piece, offset, sums, pitch);
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA
