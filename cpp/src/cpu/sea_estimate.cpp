#include "cpu/sea_decoder.h"
#include "cpu/sea_encoder.h"
#include "cpu/table.h"

// The encoder works on segments of a head's tokens. Of each segment the keys are summed on their own, from zero, and a
// segment starts from the sum of those before it (bidirectional: of all), in their order. Causal: where there are
// enough heads for the threads, a task goes through all segments of a head and keeps these sums as it passes; else one
// pass sums the segments and a second one encodes them. Both give the same bits.

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace sea;

// Tokens that outweigh what a segment costs beside them; at most kMostSegments states are held per head.
constexpr int64_t kSegment = 256, kMostSegments = 64;
// Summing the segments first takes about a sixth of the time of encoding them.
constexpr int64_t kSumShare = 6;

struct Segments {
  int64_t length, count;
};

/// Of an item with `tokens` valid tokens: depends on nothing else, so that padding changes no bit.
Segments segments_of(int64_t tokens) {
  const int64_t length = larger(kSegment, round_up((tokens + kMostSegments - 1) / kMostSegments, kChunk));
  return {length, (tokens + length - 1) / length};
}

/// Everything that a worker of the encoder holds.
struct Worker {
  Keys keys;
  Rows rows;
  State state, part, start;
};

Worker take_worker(Arena& arena, const Args& a, const Dims& d) {
  Worker w = {};
  w.keys = take_keys(arena, d);
  w.rows = take_rows(arena, a, d);
  w.state = take_state(arena, d), w.part = take_state(arena, d), w.start = take_state(arena, d);
  return w;
}

struct Encoder {
  Dims d;
  Weights weights;
  int64_t most_segments;  // of an item
  bool by_head;           // a task is all of a head
  char* states;           // [B, H, most_segments] where it is not
  char* workers;
  int64_t worker_bytes;
  Queue queue;  // with no more threads than tasks
};

Encoder take_encoder(Arena& arena, const Queue& queue, const Args& a) {
  Encoder e = {};
  e.d = dims_of(a);
  e.weights = take_weights(arena, e.d);
  const int64_t heads = a.batch * a.heads, threads = queue.num_threads;
  const int64_t rounds = (heads + threads - 1) / threads;
  e.most_segments = smaller(kMostSegments, (a.seq + kSegment - 1) / kSegment);
  e.by_head = a.is_causal && (e.most_segments <= 1 || kSumShare * rounds * threads <= (kSumShare + 1) * heads);
  e.states = take<char>(arena, e.by_head ? 0 : heads * larger(1, e.most_segments) * state_bytes(e.d));
  Arena worker = {};
  take_worker(worker, a, e.d);
  e.worker_bytes = worker.used;
  e.queue = queue;
  e.queue.num_threads = int32_t(larger(1, smaller(threads, e.by_head ? heads : heads * e.most_segments)));
  e.workers = take<char>(arena, e.queue.num_threads * e.worker_bytes);
  return e;
}

Worker worker_at(const Args& a, const Encoder& e, int worker) {
  Arena arena = {e.workers + worker * e.worker_bytes, 0};
  return take_worker(arena, a, e.d);
}

State segment_state(const Args& a, const Encoder& e, int64_t b, int64_t h, int64_t segment) {
  return state_at(e.d, e.states, (b * a.heads + h) * larger(1, e.most_segments) + segment);
}

/// Calls f(chunk) for the tokens of a segment.
template <class F>
void for_each_chunk(const SeaRows& rows, int64_t b, int64_t h, int64_t segment, F&& f) {
  const Segments s = segments_of(rows.counts[b]);
  const int64_t end = smaller(rows.counts[b], (segment + 1) * s.length);
  for (int64_t t = segment * s.length; t < end; t += kChunk) f(Chunk{b, h, t, smaller(kChunk, end - t)});
}

/// Calls f(b, h, segment, worker) for every segment, in parallel.
template <class F>
void for_each_segment(const Args& a, const Encoder& e, const SeaRows& rows, F&& f) {
  core::parallel_for(e.queue, a.batch * a.heads * e.most_segments, [&](int64_t task, int worker) {
    const int64_t segment = task / (a.batch * a.heads), head = task % (a.batch * a.heads);
    const int64_t b = head / a.heads;
    if (segment < segments_of(rows.counts[b]).count) f(b, head % a.heads, segment, worker);
  });
}

/// Causal: encodes a segment that starts from w.state, which goes along. With `part` it is summed there on its own too.
void encode_segment(const Args& a, const Encoder& e, const SeaRows& rows, int64_t b, int64_t h, int64_t segment,
                    Worker& w, State* part) {
  for_each_chunk(rows, b, h, segment, [&](const Chunk& c) {
    load_keys(a, e.d, e.weights, rows, c, w.state, w.keys);
    encode(a, e.d, e.weights, rows, c, w.state, w.keys, w.rows);
    sum_keys(e.d, c.count, w.keys);
    add_state(e.d, w.keys.sum, w.state);
    if (part) add_state(e.d, w.keys.sum, *part);
  });
}

void encode_heads(const Args& a, const Encoder& e, const SeaRows& rows) {
  core::parallel_for(e.queue, a.batch * a.heads, [&](int64_t task, int worker) {
    Worker w = worker_at(a, e, worker);
    const int64_t b = task / a.heads, h = task % a.heads;
    load_state(a, e.d, b, h, rows.counts[b] > kChunk ? w.start : w.state);
    if (rows.counts[b] <= kChunk) {  // one sum: nothing to keep apart
      encode_segment(a, e, rows, b, h, 0, w, nullptr);
      return store_state(a, e.d, b, h, w.state);
    }
    for (int64_t segment = 0; segment < segments_of(rows.counts[b]).count; ++segment) {
      copy_state(e.d, w.start, w.state);
      clear_state(e.d, w.part);
      encode_segment(a, e, rows, b, h, segment, w, &w.part);
      add_state(e.d, w.part, w.start);
    }
    store_state(a, e.d, b, h, w.start);
  });
}

/// The keys of every segment on their own.
void sum_segments(const Args& a, const Encoder& e, const SeaRows& rows) {
  for_each_segment(a, e, rows, [&](int64_t b, int64_t h, int64_t segment, int worker) {
    Worker w = worker_at(a, e, worker);
    State part = segment_state(a, e, b, h, segment);
    clear_state(e.d, part);
    for_each_chunk(rows, b, h, segment, [&](const Chunk& c) {
      load_keys(a, e.d, e.weights, rows, c, part, w.keys);
      if (!a.is_causal) return add_scaled_keys(e.d, c.count, w.keys, part);
      sum_keys(e.d, c.count, w.keys);
      add_state(e.d, w.keys.sum, part);
    });
  });
}

/// Causal: the state that each segment starts from, and the one behind the last.
void start_segments(const Args& a, const Encoder& e, const SeaRows& rows) {
  core::parallel_for(e.queue, a.batch * a.heads, [&](int64_t task, int worker) {
    Worker w = worker_at(a, e, worker);
    const int64_t b = task / a.heads, h = task % a.heads;
    load_state(a, e.d, b, h, w.start);
    for (int64_t segment = 0; segment < segments_of(rows.counts[b]).count; ++segment) {
      State part = segment_state(a, e, b, h, segment);
      copy_state(e.d, part, w.part);
      copy_state(e.d, w.start, part);
      add_state(e.d, w.part, w.start);
    }
    store_state(a, e.d, b, h, w.start);
  });
}

/// Bidirectional: the sums over all keys of each head, in place of those of its first segment.
void merge_segments(const Args& a, const Encoder& e, const SeaRows& rows) {
  core::parallel_for(e.queue, a.batch * a.heads, [&](int64_t task, int) {
    const int64_t b = task / a.heads, h = task % a.heads, count = segments_of(rows.counts[b]).count;
    if (count == 0) return;
    State total = segment_state(a, e, b, h, 0);
    for (int64_t segment = 1; segment < count; ++segment) merge_state(e.d, segment_state(a, e, b, h, segment), total);
    add_epsilon(e.d, total);
  });
}

void encode_segments(const Args& a, const Encoder& e, const SeaRows& rows) {
  for_each_segment(a, e, rows, [&](int64_t b, int64_t h, int64_t segment, int worker) {
    Worker w = worker_at(a, e, worker);
    const State state = segment_state(a, e, b, h, a.is_causal ? segment : 0);
    if (a.is_causal) {
      copy_state(e.d, state, w.state);
      return encode_segment(a, e, rows, b, h, segment, w, nullptr);
    }
    for_each_chunk(rows, b, h, segment,
                   [&](const Chunk& c) { encode(a, e.d, e.weights, rows, c, state, w.keys, w.rows); });
  });
}

/// Zeros for a masked token.
void clear_token(const Args& a, int64_t b, int64_t n) {
  for (int64_t h = 0; h < a.heads; ++h) {
    memset(element<float>(a.probs, b, h, n), 0, size_t(a.columns) * sizeof(float));
    *element<float>(a.row_scale, b, h, n) = 0;
    *element<float>(a.mix, b, h, n) = 0;
  }
}

/// The rows before the first token of item b.
void load_history(const Args& a, const SeaRows& rows, int64_t b) {
  const Operand& from = a.state.rows1;
  for (int64_t t = 0; t < history_of(a); ++t) {
    float* to = row_at(a, rows, b, t - kHistory);
    if (!from.data) memset(to, 0, size_t(row_size(a)) * sizeof(float));
    for (int64_t c = 0; from.data && c < a.channels; ++c)
      memcpy(to + c * a.width, element<float>(from, b, c, t), size_t(a.width) * sizeof(float));
  }
}

/// Tells valid tokens from masked ones.
void find_tokens(const Queue& queue, const Args& a, const SeaRows& rows) {
  const auto* before = static_cast<const int32_t*>(a.state.count.data);
  auto* after = static_cast<int32_t*>(a.new_state.count.data);
  core::parallel_for(queue, a.batch, [&](int64_t b, int) {
    const bool* mask = mask_of(a.key_mask, b);
    int64_t count = mask ? 0 : a.seq;
    for (int64_t n = 0; mask && n < a.seq; ++n) {
      if (mask[n])
        rows.positions[b * a.seq + count++] = int32_t(n);
      else
        clear_token(a, b, n);
    }
    rows.counts[b] = int32_t(count);
    if (after) after[b] = (before ? before[b] : 0) + int32_t(count);
    load_history(a, rows, b);
  });
}

const char* supports(const SeaEstimateArgs& a) { return a.dim > kMaxHeadDim ? kTooWide : nullptr; }

int64_t workspace_bytes(const Queue& queue, const SeaEstimateArgs& a) {
  Arena arena = {};
  take_sea_rows(arena, a);
  Arena encoder = arena, decoder = arena;
  take_encoder(encoder, queue, a);
  take_decoder(decoder, queue, a);
  arena.used = larger(encoder.used, decoder.used);
  return with_alignment(arena);
}

const char* run(const Queue& queue, const SeaEstimateArgs& a, void* workspace) {
  Arena arena = arena_at(workspace);
  const SeaRows rows = take_sea_rows(arena, a);
  Arena space = arena;  // of the encoder, then of the decoder
  const Encoder e = take_encoder(space, queue, a);
  find_tokens(queue, a, rows);
  if (a.seq > 0) pack_weights(queue, a, e.d, e.weights);
  if (e.by_head) {
    encode_heads(a, e, rows);
  } else {
    sum_segments(a, e, rows);
    (a.is_causal ? start_segments : merge_segments)(a, e, rows);
    encode_segments(a, e, rows);
  }
  decode(queue, a, rows, take_decoder(arena, queue, a));
  return nullptr;
}

}  // namespace

const Slot<SeaEstimateArgs> sea_estimate_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
