#include "core/parallel.h"
#include "core/visit.h"
#include "cpu/pair_sample.h"
#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

constexpr int64_t kBlock = 4;

/// What a side is made from, and where its gradient goes.
struct Source {
  const Operand *unit, *value, *codes, *mask, *grad;
  int64_t b, h, dim_unit, dim_value;
  bool are_queries;
  uint32_t draw_head;  // third counter word of the draws
};

template <class T>
T* row_at(const Operand& x, const Source& source, int64_t n) {
  return static_cast<T*>(x.data) + source.b * x.stride[0] + source.h * x.stride[1] + n * x.stride[2];
}

const uint8_t* mask_of(const Source& source) {
  const uint8_t* mask = static_cast<const uint8_t*>(source.mask->data);
  return mask ? mask + source.b * source.mask->stride[0] : nullptr;
}

void widen_row(const Operand& x, const Source& source, int64_t n, float* row, int64_t dim) {
  visit_float(x.dtype, [&](auto tag) { widen_padded(row_at<decltype(tag)>(x, source, n), row, dim); });
}

bool is_zero_row(const float* row, int64_t size) {
  I32 bits = {};
  for (int64_t i = 0; i < size; i += kLanes) bits |= as_i32(abs(load(row + i)));
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= bits[i];
  return any == 0;
}

void pack_rows(const Source& source, const Side& side, int64_t begin, int64_t end) {
  const uint8_t* mask = mask_of(source);
  for (int64_t n = begin; n < end; ++n) {
    std::memset(sum_of(side, n), 0, size_t(side.unit_size) * sizeof(float));
    side.active[n] = 0;
    if (mask && !mask[n]) continue;
    float *unit = row_of(side, n), *value = unit + side.unit_size;
    widen_row(*source.unit, source, n, unit, source.dim_unit);
    widen_row(*source.value, source, n, value, source.dim_value);
    side.lengths[n] = normalize_row(unit, side.unit_size);
    const bool has_gradient = !source.are_queries || !is_zero_row(value, side.row_size - side.unit_size);
    side.active[n] = has_gradient && side.lengths[n].significand != 0;
  }
}

void sort_codes(const Source& source, const Side& side, int64_t hash, int32_t* scratch) {
  const uint8_t* mask = mask_of(source);
  const BucketIndex index = index_of(side, hash);
  if (source.codes->dtype == DType::u16)
    build_bucket_index(side.plan, row_at<const uint16_t>(*source.codes, source, hash), mask, scratch, index);
  else
    build_bucket_index(side.plan, row_at<const int32_t>(*source.codes, source, hash), mask, scratch, index);
}

/// Takes the gradients of the unit rows through the normalisation and writes them.
void finish_rows(const Source& source, const Side& side, int64_t begin, int64_t end) {
  const int64_t size = side.unit_size;
  for (int64_t n = begin; n < end; ++n) {
    float* sum = sum_of(side, n);
    if (side.active[n]) {
      const float* unit = row_of(side, n);
      const F32 along = set(dot(unit, sum, size));
      for (int64_t i = 0; i < size; i += kLanes) store(sum + i, fma(-along, load(unit + i), load(sum + i)));
      divide_row(sum, size, side.lengths[n].significand);
      scale_row_by_power(sum, size, -side.lengths[n].exponent);
    }
    visit_float(source.grad->dtype,
                [&](auto tag) { narrow(sum, row_at<decltype(tag)>(*source.grad, source, n), source.dim_unit); });
  }
}

template <int Step, int... L>
F32 rotate(F32 x, Lanes<L...>) {
  return __builtin_shufflevector(x, x, ((L + Step) % kLanes)...);
}

/// Lane i < 4 of the result is the sum of the lanes of x[i].
F32 reduce_four(F32 (&x)[4]) {
  exchange<1>(x[0], x[1], AllLanes{});
  exchange<1>(x[2], x[3], AllLanes{});
  F32 low = x[0] + x[1], high = x[2] + x[3];
  exchange<2>(low, high, AllLanes{});
  F32 sum = low + high;
  if constexpr (kLanes > 8) sum += rotate<8>(sum, AllLanes{});
  if constexpr (kLanes > 4) sum += rotate<4>(sum, AllLanes{});
  return sum;
}

/// Lane i < 4 of the result is <a, b[i]> over [begin, end) of the rows.
F32 dot_four(const float* a, const float* const (&b)[4], int64_t begin, int64_t end) {
  F32 sum[4] = {};
  for (int64_t i = begin; i < end; i += kLanes) {
    const F32 left = load(a + i);
    for (int j = 0; j < 4; ++j) sum[j] = fma(left, load(b[j] + i), sum[j]);
  }
  return reduce_four(sum);
}

/// |a - sign b|^2
float distance(const float* a, const float* b, float sign, int64_t size) {
  F32 sum = {};
  for (int64_t i = 0; i < size; i += kLanes) {
    const F32 difference = load(a + i) - set(sign) * load(b + i);
    sum = fma(difference, difference, sum);
  }
  return reduce_add(sum);
}

/// Below this 1 - x^2 it is taken from the difference of the two rows, which does not cancel.
constexpr float kNear = 0.2f;

/// Divides the weighted products by sqrt(1 - x^2), so that what is left of t is candidate - x target. Where x is near
/// +-1 it becomes +-1, so that the rows are subtracted from each other: that changes only the part of t along the
/// target, which the normalisation takes out.
void divide_by_sine(const float* target, const float* const (&rows)[4], int64_t size, F32 product, float* coefficient,
                    float* x) {
  const F32 cosine = dot_four(target, rows, 0, size);
  const F32 square = (set(1.0f) - cosine) * (set(1.0f) + cosine);
  store(x, cosine);
  store(coefficient, product / sqrt(max(square, set(kNear))));
  for (int j = 0; j < 4; ++j) {
    if (square[j] >= kNear) continue;
    x[j] = x[j] > 0 ? 1.0f : -1.0f;
    const float gap = 0.5f * distance(rows[j], target, x[j], size), near = gap * (2 - gap);
    coefficient[j] = near < 1e-8f ? 0 : product[j] / sqrt(near);
  }
}

/// Turns the weights of the pairs into the coefficients of the candidates' unit rows.
template <bool Exact>
void weigh_pairs(const Side& targets, const Side& candidates, Picks& picks) {
  const float* target = row_of(targets, picks.target);
  const int64_t size = targets.unit_size;
  for (int32_t first = 0; first < picks.count; first += 4) {
    const float* rows[4];
    for (int j = 0; j < 4; ++j) rows[j] = row_of(candidates, picks.tokens[first + j]);
    const F32 product = dot_four(target, rows, size, targets.row_size) * load(picks.weights + first);
    float coefficient[kLanes], x[kLanes];
    if constexpr (Exact) {
      divide_by_sine(target, rows, size, product, coefficient, x);
      std::memcpy(picks.cosines + first, x, 4 * sizeof(float));
    } else {
      store(coefficient, product);
    }
    std::memcpy(picks.weights + first, coefficient, 4 * sizeof(float));
  }
}

template <bool Exact>
void add_pairs(const Side& targets, const Side& candidates, const Picks& picks) {
  const float* target = row_of(targets, picks.target);
  float* sum = sum_of(targets, picks.target);
  for (int32_t first = 0; first < picks.count; first += 4) {
    const float* rows[4];
    F32 c[4], minus_x[4];
    for (int j = 0; j < 4; ++j) {
      rows[j] = row_of(candidates, picks.tokens[first + j]);
      c[j] = set(picks.weights[first + j]);
      minus_x[j] = Exact ? set(-picks.cosines[first + j]) : F32{};
    }
    for (int64_t i = 0; i < targets.unit_size; i += kLanes) {
      F32 total = load(sum + i);
      for (int j = 0; j < 4; ++j) {
        F32 row = load(rows[j] + i);
        if constexpr (Exact) row = fma(minus_x[j], load(target + i), row);
        total = fma(c[j], row, total);
      }
      store(sum + i, total);
    }
  }
}

/// Adds the pairs of one hash to the sums of the targets at [begin, end) of its order. A block's pairs are picked,
/// which begins to fetch their rows, while the rows of the block before arrive; steps over a block have no chain of
/// dependences from target to target.
template <bool Exact>
void accumulate(const BucketGradientArgs& args, const Side& targets, const Side& candidates, bool targets_are_queries,
                int64_t hash, int64_t begin, int64_t end) {
  constexpr float kPi = 3.14159265f;
  const float scale = float(args.hash_bits) / (Exact ? kPi : 2.0f) / float(args.num_hashes);
  Picker picker = make_picker(args, targets, candidates, targets_are_queries, hash, scale, begin);
  Picks block[2][kBlock] = {};
  int64_t ready = 0;
  for (int which = 0; begin < end || ready > 0; which ^= 1) {
    const int64_t next = end - begin < kBlock ? end - begin : kBlock;
    for (int64_t i = 0; i < next; ++i) pick(picker, begin + i, block[which][i]);
    for (int64_t i = 0; i < ready; ++i) weigh_pairs<Exact>(targets, candidates, block[!which][i]);
    for (int64_t i = 0; i < ready; ++i) add_pairs<Exact>(targets, candidates, block[!which][i]);
    begin += next, ready = next;
  }
}

struct Head {
  Side queries, keys;
};

Side take_side(Arena& arena, const BucketGradientArgs& args, int64_t seq) {
  Side side = {};
  side.seq = seq;
  side.unit_size = padded(args.dim_qk);
  side.row_size = side.unit_size + padded(args.dim_v);
  side.plan = bucket_plan(seq, int64_t(1) << args.hash_bits);
  side.rows = take<float>(arena, seq * (side.row_size + side.unit_size));
  side.lengths = take<Length>(arena, seq);
  side.active = take<uint8_t>(arena, seq);
  side.indices = take<int32_t>(arena, args.num_hashes * bucket_index_words(side.plan));
  side.words = take<uint32_t>(arena, seq * num_draws(args) * (args.exact ? 2 : 1));
  return side;
}

/// Scratch memory: the heads that are worked on at the same time, then what each worker needs to sort.
struct Layout {
  int64_t slots, head_bytes, sort_words;
  char* heads;
  int32_t* sort;
};

Head head_at(const Layout& layout, const BucketGradientArgs& args, int64_t slot) {
  Arena arena = {layout.heads + slot * layout.head_bytes, 0};
  const Side queries = take_side(arena, args, args.seq_q);
  return {queries, take_side(arena, args, args.seq_k)};
}

Layout take_layout(Arena& arena, const Queue& queue, const BucketGradientArgs& args) {
  Arena head = {};
  const Side queries = take_side(head, args, args.seq_q), keys = take_side(head, args, args.seq_k);
  const int64_t words_q = bucket_scratch_words(queries.plan), words_k = bucket_scratch_words(keys.plan);
  const int64_t heads = args.batch * args.heads_kv;
  Layout layout = {};
  layout.slots = heads < queue.num_threads ? heads : queue.num_threads;
  layout.head_bytes = head.used;
  layout.sort_words = words_q > words_k ? words_q : words_k;
  layout.heads = take<char>(arena, layout.slots * layout.head_bytes);
  layout.sort = take<int32_t>(arena, queue.num_threads * layout.sort_words);
  return layout;
}

/// The gradients of `count` key heads and of their groups of query heads, in steps: by all threads of a queue, or
/// without a queue by the one thread that calls.
struct Job {
  const BucketGradientArgs& args;
  const Layout& layout;
  const Queue* queue;
  int worker;
  int64_t parts, first_head, first_slot, count;

  template <class F>
  void step(int64_t tasks, F&& f) const {
    if (queue) return core::parallel_for(*queue, tasks, static_cast<F&&>(f));
    for (int64_t task = 0; task < tasks; ++task) f(task, worker);
  }

  int64_t cut(int64_t total, int64_t part) const { return total * part / parts; }

  Head head(int64_t i) const { return head_at(layout, args, first_slot + i); }

  Source source(bool queries, int64_t i, int64_t member) const {
    const int64_t b = (first_head + i) / args.heads_kv, h = (first_head + i) % args.heads_kv;
    const int64_t query_head = h * (args.heads_q / args.heads_kv) + member;
    if (queries)
      return {&args.q,     &args.dout, &args.codes_q, &args.query_mask,    &args.dq, b, query_head,
              args.dim_qk, args.dim_v, true,          uint32_t(query_head)};
    return {&args.k,
            &args.v,
            &args.codes_k,
            &args.key_mask,
            &args.dk,
            b,
            h,
            args.dim_qk,
            args.dim_v,
            false,
            0x80000000u + uint32_t(query_head)};
  }

  /// Calls f(source, side, begin, end) for parts of the tokens of one side of every head.
  template <class F>
  void for_each_range(bool queries, int64_t member, F&& f) const {
    step(count * parts, [&](int64_t task, int) {
      const int64_t i = task / parts, part = task % parts;
      const Head own = head(i);
      const Side& side = queries ? own.queries : own.keys;
      f(source(queries, i, member), side, cut(side.seq, part), cut(side.seq, part + 1));
    });
  }

  void prepare(bool queries, int64_t member) const {
    for_each_range(queries, member, pack_rows);
    step(count * args.num_hashes, [&](int64_t task, int by) {
      const int64_t i = task / args.num_hashes, hash = task % args.num_hashes;
      const Head own = head(i);
      const Side& side = queries ? own.queries : own.keys;
      sort_codes(source(queries, i, member), side, hash, layout.sort + by * layout.sort_words);
    });
  }

  void draw(bool queries, int64_t member) const {
    const uint64_t seed = args.seed_ptr ? uint64_t(*args.seed_ptr) : args.seed;
    for_each_range(queries, member, [&](const Source& source, const Side& side, int64_t begin, int64_t end) {
      const int64_t draws = num_draws(args);
      draw_words(side, side.words, draws, seed, 0, source.draw_head, begin, end);
      if (!args.exact) return;
      draw_words(side, side.words + draws * side.seq, draws, seed, 1u << 30, source.draw_head, begin, end);
    });
  }

  void add_hash(int64_t hash) const {
    step(2 * count * parts, [&](int64_t task, int) {
      const bool queries = task % 2 == 0;
      const Head own = head(task / 2 / parts);
      const int64_t part = task / 2 % parts;
      const Side &targets = queries ? own.queries : own.keys, &candidates = queries ? own.keys : own.queries;
      const int64_t total = bucket_index_count(index_of(targets, hash));
      const auto add = args.exact ? accumulate<true> : accumulate<false>;
      add(args, targets, candidates, queries, hash, cut(total, part), cut(total, part + 1));
    });
  }

  void run() const {
    prepare(false, 0);
    for (int64_t member = 0; member < args.heads_q / args.heads_kv; ++member) {
      prepare(true, member);
      draw(true, member);
      draw(false, member);
      for (int64_t hash = 0; hash < args.num_hashes; ++hash) add_hash(hash);
      for_each_range(true, member, finish_rows);
    }
    for_each_range(false, 0, finish_rows);
  }
};

const char* run(const Queue& queue, const BucketGradientArgs& args, void* workspace) {
  Arena arena = arena_at(workspace);
  const Layout layout = take_layout(arena, queue, args);
  // A thread alone on a head never waits, so as many rounds of heads as fill all threads go that way. The heads that
  // are left go together, step by step.
  const int64_t heads = args.batch * args.heads_kv, alone = heads / queue.num_threads * queue.num_threads;
  // In small parts the two directions take turns, and where queries and keys have similar codes the second finds in the
  // cache the rows that the first has read.
  const int64_t enough = 1 + (args.seq_q + args.seq_k) / 1024, parts = 4 * int64_t(queue.num_threads);
  core::parallel_for(queue, alone, [&](int64_t head, int worker) {
    Job{args, layout, nullptr, worker, enough, head, worker, 1}.run();
  });
  if (alone == heads) return nullptr;
  Job{args, layout, &queue, 0, enough < parts ? enough : parts, alone, 0, heads - alone}.run();
  return nullptr;
}

const char* supports(const BucketGradientArgs& args) {
  if (args.dim_qk > kMaxHeadDim || args.dim_v > kMaxHeadDim) return kTooWide;
  if (args.seq_q > INT32_MAX || args.seq_k > INT32_MAX) return "more than 2^31 - 1 tokens";
  return nullptr;
}

int64_t workspace_bytes(const Queue& queue, const BucketGradientArgs& args) {
  Arena arena = {};
  take_layout(arena, queue, args);
  return with_alignment(arena);
}

}  // namespace

const Slot<BucketGradientArgs> bucket_gradient_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
