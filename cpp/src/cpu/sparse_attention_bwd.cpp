#include "core/parallel.h"
#include "core/visit.h"
#include "cpu/sparse_dot.h"
#include "cpu/sparse_gradient.h"
#include "cpu/table.h"
#include "cpu/unit_row.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

// Two passes over the entries. The row pass knows all entries of a query: it forms p and dx, sums dq, and puts what an
// entry gives to its key among the gifts of that key. The key pass adds those up, in the order of the queries.

using Args = SparseAttentionArgs;

/// One call of the backward pass for rows of type T.
template <class T>
struct Pass {
  const Args& a;
  const GradientPlan& plan;
  const GradientScratch& scratch;
  int64_t first_gift;  // of the wave, among those of all heads

  bool is_kept(int64_t b, int64_t n) const {
    const bool* keep = mask_of(a.query_mask, b);
    return !keep || keep[n];
  }

  PatternRow row_of(int64_t b, int64_t h, int64_t n) const {
    return pattern_row(a.pattern, a.heads_q, a.seq_q, b, h, n);
  }

  int64_t indptr(int64_t row) const {
    const Operand& bounds = a.pattern.indptr;
    return bounds.dtype == DType::i32 ? static_cast<const int32_t*>(bounds.data)[row]
                                      : static_cast<const int64_t*>(bounds.data)[row];
  }

  /// Where the entries of a head begin, among `heads` heads an item.
  int64_t head_begin(int64_t b, int64_t h, int64_t heads) const {
    const int64_t head = b * heads + h;
    return a.pattern.form == PatternForm::indices ? head * plan.head_entries : indptr(head * a.seq_q);
  }

  /// Where those of a row begin, inside its head.
  int64_t row_begin(int64_t b, int64_t h, int64_t n) const {
    if (a.pattern.form == PatternForm::indices) return n * a.pattern.slots;
    const int64_t first = (b * a.heads_q + h) * a.seq_q;
    return indptr(first + n) - indptr(first);
  }

  uint32_t* places_of(int64_t b, int64_t h, int64_t n) const {
    const int64_t heads = a.pattern.heads;
    return scratch.places + head_begin(b, h / (a.heads_q / heads), heads) + row_begin(b, h, n);
  }

  Gift* gifts_of(int64_t b, int64_t h) const { return scratch.gifts + (head_begin(b, h, a.heads_q) - first_gift); }

  void sort_by_key(const Queue& queue) const;
  int64_t form_scores(int64_t b, int64_t h, int64_t n, const float* q, const float* dout, float* x, float* g) const;
  void form_gifts(int64_t b, int64_t h, int64_t n, int64_t count, float* x, float* g, float d) const;
  void query_row(int64_t b, int64_t h, int64_t n, float* x, float* g) const;
  void add_gifts(int64_t b, int64_t h, int64_t key, float* dk, float* dv) const;
  void key_row(int64_t b, int64_t g, int64_t key) const;
  void sum_context(const Queue& queue) const;
  void run(const Queue& queue);
};

template <class T>
void Pass<T>::sort_by_key(const Queue& queue) const {
  const int64_t heads = a.pattern.heads;
  const auto walk = [&](int64_t matrix, int64_t begin, int64_t end, auto&& f) {
    const int64_t b = matrix / heads, h = matrix % heads * (a.heads_q / heads);
    EntryBuffer buffer;
    Entries piece;
    for (int64_t n = begin; n < end; ++n) {
      if (!is_kept(b, n)) continue;
      int64_t entry = row_begin(b, h, n);
      const PatternRow row = row_of(b, h, n);
      for (RowCursor cursor = {}; next_piece(row, cursor, buffer, piece);)
        for (int64_t i = 0; i < piece.count; ++i) f(piece.keys[i], n, entry++);
    }
  };
  transpose_entries(
      queue, plan.transposition, scratch.early, scratch.ends, [](int64_t) { return 0; }, walk,
      [&](int64_t matrix, int64_t number, int64_t, int64_t entry) {
        scratch.places[head_begin(matrix / heads, matrix % heads, heads) + entry] = uint32_t(number);
      });
}

/// x [count], behind it room for a vector, to p; returns d = sum p g. Without an entry of weight, p is 0.
float to_probabilities(float* x, float* g, int64_t count) {
  const int64_t end = round_up(count, kLanes);
  for (int64_t i = count; i < end; ++i) x[i] = -kInfinity, g[i] = 0;
  F32 most = set(-kInfinity);
  for (int64_t i = 0; i < end; i += kLanes) most = max(load(x + i), most);
  const float best = reduce_max(most);
  const F32 shift = set(best == -kInfinity ? 0.0f : best);
  F32 sum = {}, weighted = {};
  for (int64_t i = 0; i < end; i += kLanes) {
    const F32 weight = exp(load(x + i) - shift);
    store(x + i, weight);
    sum += weight, weighted = fma(weight, load(g + i), weighted);
  }
  const float total = reduce_add(sum);
  if (total == 0) return 0;
  // Where one entry has nearly all the weight, dx is what rounding leaves of g - d; so d is corrected once.
  const float estimate = reduce_add(weighted) / total;
  F32 rest = {};
  for (int64_t i = 0; i < end; i += kLanes) {
    const F32 p = load(x + i) / set(total);
    store(x + i, p);
    rest = fma(p, load(g + i) - set(estimate), rest);
  }
  return estimate + reduce_add(rest);
}

float float_or(const Operand& x, int64_t b, int64_t h, int64_t n, float otherwise) {
  const float* value = row_value(x, b, h, n);
  return value ? *value : otherwise;
}

void set_if_wanted(const Operand& x, int64_t b, int64_t h, int64_t n, float value) {
  if (float* to = row_value(x, b, h, n)) *to = value;
}

void load_row(const Operand& x, int64_t b, int64_t h, int64_t n, int64_t dim, float* to) {
  visit_float(x.dtype, [&](auto tag) {
    using Element = decltype(tag);
    widen_padded(rows_of_head<Element>(x, b, h, dim).at(n), to, dim);
  });
}

template <class T>
void form_products(const float* row, const HeadRows<T>& rows, const Entries& piece, float* products) {
  visit_int<64, 128>(
      rows.dim, [&](auto dim) { dot_piece<1, int(decltype(dim)::value) / kLanes>(row, 0, rows, piece, products); });
}

/// sum += sum_i weights[i] * (row list[i]), `count` rows of at most kPiece.
template <class T>
void add_rows(const HeadRows<T>& rows, const int32_t* list, const float* weights, int64_t count, float* sum) {
  alignas(64) float part[kMaxHeadDim];
  memset(part + rows.dim, 0, size_t(padded(rows.dim) - rows.dim) * sizeof(float));
  weigh_piece<1>(weights, rows, {list, nullptr, count}, part, 0);
  add_row(part, sum, padded(rows.dim));
}

/// Logits x_e and products g_e of the entries of a row; returns how many there are.
template <class T>
int64_t Pass<T>::form_scores(int64_t b, int64_t h, int64_t n, const float* q, const float* dout, float* x,
                             float* g) const {
  const int64_t head = h / (a.heads_q / a.heads_kv);
  const HeadRows<T> keys = rows_of_head<T>(a.k, b, head, a.dim), values = rows_of_head<T>(a.v, b, head, a.dim_v);
  const PatternRow row = row_of(b, h, n);
  EntryBuffer buffer;
  Entries piece;
  int64_t count = 0;
  for (RowCursor cursor = {}; next_piece(row, cursor, buffer, piece); count += piece.count) {
    form_products(q, keys, piece, x + count);
    form_products(dout, values, piece, g + count);
    for (int64_t i = 0; i < piece.count; ++i)
      x[count + i] = x[count + i] * a.scale + (piece.log_weights ? piece.log_weights[i] : 0.0f);
  }
  return count;
}

/// Replaces p by dx, and puts what the entries give where their keys will read it.
template <class T>
void Pass<T>::form_gifts(int64_t b, int64_t h, int64_t n, int64_t count, float* x, float* g, float d) const {
  const float factor = float_or(a.mix, b, h, n, 1) * float_or(a.row_scale, b, h, n, 1);
  const F32 dlse = set(float_or(a.dlse, b, h, n, 0));
  for (int64_t i = 0; i < count; i += kLanes) {
    const F32 p = load(x + i), slope = fma(set(factor), load(g + i) - set(d), dlse);
    store(x + i, p * slope), store(g + i, p * set(factor));
  }
  const uint32_t* places = places_of(b, h, n);
  Gift* gifts = gifts_of(b, h);
  for (int64_t i = 0; i < count; ++i) gifts[places[i]] = {int32_t(n), g[i], x[i]};
}

/// Everything that belongs to one query. x, g: room for its entries and a vector.
template <class T>
void Pass<T>::query_row(int64_t b, int64_t h, int64_t n, float* x, float* g) const {
  alignas(64) float q[kMaxHeadDim], dout[kMaxHeadDim], context[kMaxHeadDim], sum[kMaxHeadDim];
  memset(sum, 0, size_t(padded(a.dim)) * sizeof(float));
  const float mix = float_or(a.mix, b, h, n, 1), row_scale = float_or(a.row_scale, b, h, n, 1);
  const bool kept = is_kept(b, n);
  float d = 0, of_context = 0;
  if (kept) {
    widen_padded(rows_of_head<T>(a.q, b, h, a.dim).at(n), q, a.dim);
    widen_padded(rows_of_head<T>(a.dout, b, h, a.dim_v).at(n), dout, a.dim_v);
    const int64_t count = form_scores(b, h, n, q, dout, x, g);
    d = to_probabilities(x, g, count);
    form_gifts(b, h, n, count, x, g, d);
    const HeadRows<T> keys = rows_of_head<T>(a.k, b, h / (a.heads_q / a.heads_kv), a.dim);
    const PatternRow row = row_of(b, h, n);
    EntryBuffer buffer;
    Entries piece;
    for (RowCursor cursor = {}; next_piece(row, cursor, buffer, piece); x += piece.count)
      add_rows(keys, piece.keys, x, piece.count, sum);
    scale_row(sum, padded(a.dim), a.scale);
    if (a.dmix.data && a.context.data) {
      load_row(a.context, b, h, n, a.dim_v, context);
      of_context = dot(dout, context, padded(a.dim_v));
    }
  }
  store_row(a.dq, b, h, n, sum, a.dim);
  set_if_wanted(a.drow_scale, b, h, n, kept ? mix * d : 0.0f);
  set_if_wanted(a.dmix, b, h, n, kept ? row_scale * d - of_context : 0.0f);
  if (!a.dcontext.data || a.context_rows != a.seq_q) return;
  kept ? scale_row(dout, padded(a.dim_v), 1 - mix) : void(memset(dout, 0, sizeof(dout)));
  store_row(a.dcontext, b, h, n, dout, a.dim_v);
}

/// Adds what the queries of one head give to a key.
template <class T>
void Pass<T>::add_gifts(int64_t b, int64_t h, int64_t key, float* dk, float* dv) const {
  int32_t list[kPiece];
  float value_weights[kPiece], score_weights[kPiece];
  const HeadRows<T> queries = rows_of_head<T>(a.q, b, h, a.dim), douts = rows_of_head<T>(a.dout, b, h, a.dim_v);
  const int64_t heads = a.pattern.heads, pattern_head = h / (a.heads_q / heads);
  const uint32_t* ends = scratch.ends + (b * heads + pattern_head) * a.seq_k;
  const Gift* gifts = gifts_of(b, h);
  for (int64_t first = key ? ends[key - 1] : 0; first < ends[key]; first += kPiece) {
    const int64_t count = smaller(kPiece, ends[key] - first);
    for (int64_t i = 0; i < count; ++i) {
      const Gift gift = gifts[first + i];
      list[i] = gift.row, value_weights[i] = gift.value, score_weights[i] = gift.score;
    }
    add_rows(queries, list, score_weights, count, dk);
    add_rows(douts, list, value_weights, count, dv);
  }
}

/// dk and dv of one key.
template <class T>
void Pass<T>::key_row(int64_t b, int64_t g, int64_t key) const {
  alignas(64) float dk[kMaxHeadDim], dv[kMaxHeadDim];
  const int64_t group = a.heads_q / a.heads_kv;
  memset(dk, 0, size_t(padded(a.dim)) * sizeof(float)), memset(dv, 0, size_t(padded(a.dim_v)) * sizeof(float));
  for (int64_t h = g * group; h < (g + 1) * group; ++h) add_gifts(b, h, key, dk, dv);
  scale_row(dk, padded(a.dim), a.scale);
  store_row(a.dk, b, g, key, dk, a.dim), store_row(a.dv, b, g, key, dv, a.dim_v);
}

/// The gradient of a context of one row: (1 - m_n) dout_n, summed over pieces of queries and then over the pieces.
template <class T>
void Pass<T>::sum_context(const Queue& queue) const {
  constexpr int64_t kColumns = 64, kRows = 64;
  const int64_t panels = (a.dim_v + kColumns - 1) / kColumns;
  core::parallel_for(queue, a.batch * a.heads_q * panels, [&](int64_t task, int) {
    const int64_t b = task / panels / a.heads_q, h = task / panels % a.heads_q, first = task % panels * kColumns;
    HeadRows<T> douts = rows_of_head<T>(a.dout, b, h, smaller(kColumns, a.dim_v - first));
    douts.base += first;
    float total[kColumns] = {};
    for (int64_t begin = 0; begin < a.seq_q; begin += kRows) {
      float sum[kColumns] = {}, weights[kRows];
      int32_t list[kRows];
      int64_t count = 0;
      for (int64_t n = begin; n < smaller(a.seq_q, begin + kRows); ++n)
        if (is_kept(b, n)) list[count] = int32_t(n), weights[count++] = 1 - float_or(a.mix, b, h, n, 1);
      add_rows(douts, list, weights, count, sum);
      for (int64_t i = 0; i < kColumns; ++i) total[i] += sum[i];
    }
    Operand to = a.dcontext;
    to.data = static_cast<char*>(to.data) + first * dtype_bytes(to.dtype);
    store_row(to, b, h, 0, total, douts.dim);
  });
}

template <class T>
void Pass<T>::run(const Queue& queue) {
  sort_by_key(queue);
  const int64_t group = a.heads_q / larger(1, a.heads_kv), all = a.batch * a.heads_kv;
  const int64_t row_tasks = (a.seq_q + plan.task_rows - 1) / plan.task_rows;
  const int64_t key_tasks = (a.seq_k + plan.task_keys - 1) / plan.task_keys;
  for (int64_t begin = 0; begin < all; begin += plan.wave) {
    const int64_t heads_kv = smaller(plan.wave, all - begin), heads_q = heads_kv * group, first_q = begin * group;
    if (heads_q > 0) first_gift = head_begin(first_q / a.heads_q, first_q % a.heads_q, a.heads_q);
    // Head after head: threads that wrote to the gifts of one head at a time would take cache lines from each other.
    core::parallel_for(queue, heads_q * row_tasks, [&](int64_t task, int worker) {
      const int64_t head = first_q + task % heads_q, first = task / heads_q * plan.task_rows;
      float* x = scratch.rows + worker * 2 * scratch.row_floats;
      for (int64_t n = first; n < smaller(a.seq_q, first + plan.task_rows); ++n)
        query_row(head / a.heads_q, head % a.heads_q, n, x, x + scratch.row_floats);
    });
    core::parallel_for(queue, heads_kv * key_tasks, [&](int64_t task, int) {
      const int64_t head = begin + task / key_tasks, first = task % key_tasks * plan.task_keys;
      for (int64_t key = first; key < smaller(a.seq_k, first + plan.task_keys); ++key)
        key_row(head / a.heads_kv, head % a.heads_kv, key);
    });
  }
  if (a.dcontext.data && a.context_rows != a.seq_q) sum_context(queue);
}

const char* supports(const Args& a) {
  if (larger(a.dim, a.dim_v) > kMaxHeadDim) return kTooWide;
  if (larger(a.seq_q, a.seq_k) > INT32_MAX) return "more than 2^31 - 1 tokens";
  const PatternForm form = a.pattern.form;
  const int64_t entries = form == PatternForm::csr       ? a.pattern.entries
                          : form == PatternForm::indices ? a.seq_q * a.pattern.slots
                                                         : a.max_entries;
  return entries > UINT32_MAX ? "more than 2^32 - 1 entries" : nullptr;
}

int64_t workspace_bytes(const Queue& queue, const Args& a) {
  Arena arena = {};
  lay_out_gradient(arena, queue, plan_gradient(queue, a));
  return with_alignment(arena);
}

const char* run(const Queue& queue, const Args& a, void* workspace) {
  Arena arena = arena_at(workspace);
  const GradientPlan plan = plan_gradient(queue, a);
  const GradientScratch scratch = lay_out_gradient(arena, queue, plan);
  visit_float(a.q.dtype, [&](auto tag) { Pass<decltype(tag)>{a, plan, scratch, 0}.run(queue); });
  return nullptr;
}

}  // namespace

const Slot<SparseAttentionArgs> sparse_attention_bwd_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
