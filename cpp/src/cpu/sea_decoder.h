/// The decoder of sea_estimate: from the rows of the row linear to probabilities, by convolutions over tokens and
/// columns.
///
/// A task is a tile of tokens of one item. It computes the rows of the first convolutions around the tile itself, so
/// that tasks share nothing; rows of the causal decoder before the present call come from the state.
#pragma once
#include "core/parallel.h"
#include "cpu/sea_conv.h"
#include "cpu/sea_layout.h"
#include "cpu/sea_resize.h"

namespace subquad::cpu::SUBQUAD_ISA::sea {

struct Decoder {
  Planes planes;
  int64_t tile, tiles;    // in tokens, or in pairs of tokens when bidirectional
  int64_t worker_floats;  // of scratch
  float* scratch;         // [num_threads, worker_floats]
  float *first, *second;  // bidirectional: weights of the last convolution for the rows 2u and 2u + 1, [H, C, 2, 3]
};

/// The pieces of a worker's scratch. `a` holds two sets of planes when bidirectional: even and odd tokens.
struct DecoderScratch {
  float *a, *b;  // [C, planes.size]
  float* x;      // [a few heads, whole_vectors(K)]
  float* y;      // [w], and at least one element on either side
};

/// Rows of the planes before the tile: what the convolutions reach back (bidirectional: and ahead).
static inline int64_t rows_before(bool is_causal) { return is_causal ? 2 * kHistory : 3; }

static inline DecoderScratch take_decoder_scratch(Arena& arena, const SeaEstimateArgs& a, const Planes& planes) {
  DecoderScratch s;
  s.a = take<float>(arena, (a.is_causal ? 1 : 2) * a.channels * planes.size);
  s.b = take<float>(arena, a.channels * planes.size);
  s.x = take<float>(arena, smaller(kMostRows, a.heads) * whole_vectors(a.columns));
  s.y = take<float>(arena, 16 + whole_vectors(a.width) + kLanes);
  return s;
}

static inline Decoder take_decoder(Arena& arena, const Queue& queue, const SeaEstimateArgs& a) {
  Decoder d = {};
  const int64_t gap = a.is_causal ? 2 : 1, steps = a.is_causal ? a.seq : (a.seq + 1) / 2;
  // A tile of 64 steps repeats little work; wide ones are cut down to stay within the L2 cache, and few enough steps
  // are shared among the threads. The bits do not depend on it.
  d.tile = larger(16, smaller(64, 65536 / larger(1, a.channels * (a.width + gap))));
  while (d.tile > 16 && a.batch * ((steps + d.tile - 1) / d.tile) < 4 * queue.num_threads) d.tile = (d.tile + 1) / 2;
  d.tile = larger(1, smaller(d.tile, steps));
  d.tiles = larger(1, (steps + d.tile - 1) / d.tile);
  d.planes = planes_of(a.width, gap, d.tile + (a.is_causal ? 1 : 2) * rows_before(a.is_causal));
  Arena measure = {};
  take_decoder_scratch(measure, a, d.planes);
  d.worker_floats = measure.used / int64_t(sizeof(float));
  d.scratch = take<float>(arena, queue.num_threads * d.worker_floats);
  if (!a.is_causal) {
    d.first = take<float>(arena, a.heads * a.channels * 6);
    d.second = take<float>(arena, a.heads * a.channels * 6);
  }
  return d;
}

/// Room for the columns of the heads from h on.
static inline Columns columns_of(const SeaEstimateArgs& a, const DecoderScratch& s, int64_t h) {
  return {s.x, a.columns, whole_vectors(a.columns), int(smaller(kMostRows, a.heads - h))};
}

/// Row `row` of all planes = from [C, width].
static inline void put_row(const Planes& p, int64_t channels, const float* from, int64_t row, float* planes) {
  float* to = planes + row_offset(p, row);
  for (int64_t c = 0; c < channels; ++c) widen(from + c * p.width, to + c * p.size, p.width);
}

/// A 3 x 3 convolution of all channels: the taps of time step i at offset steps[i], columns `spread` apart.
static inline Conv conv_3x3(const SeaEstimateArgs& a, const Operand& weight, const Operand& bias,
                            const int64_t (&steps)[3], int64_t spread) {
  Conv conv = {element<float>(weight), weight.stride[0], element<float>(bias), a.channels, a.channels, 9, {}, true};
  for (int j = 0; j < 9; ++j) conv.shift[j] = steps[j / 3] + (j % 3 - 1) * spread;
  return conv;
}

// Causal

/// Row i of the history of a state, i in [0, kHistory), as row `row` of all planes; zeros without a state.
static inline void put_state(const SeaEstimateArgs& a, const Operand& state, int64_t batch, int64_t i, int64_t row,
                             const Planes& p, float* planes) {
  for (int64_t c = 0; c < a.channels; ++c) {
    float* to = planes + c * p.size + row_offset(p, row);
    if (state.data)
      widen(element<float>(state, batch, c, i), to, p.width);
    else
      memset(to, 0, size_t(p.width) * sizeof(float));
  }
}

/// The rows of the first convolution that the next call will reach back to: those of the last kHistory tokens that are
/// in [first, end), which lie in the planes from row `row` on.
static inline void keep_state(const SeaEstimateArgs& a, int64_t batch, int64_t count, int64_t first, int64_t end,
                              int64_t row, const Planes& p, const float* planes) {
  if (!a.new_state.rows2.data) return;
  for (int64_t t = larger(first, count - kHistory); t < end; ++t)
    for (int64_t c = 0; c < a.channels; ++c)
      widen(planes + c * p.size + row_offset(p, row + t - first),
            element<float>(a.new_state.rows2, batch, c, t - (count - kHistory)), p.width);
}

/// Tokens [first, end) of an item of `count` tokens.
static inline void decode_tokens(const SeaEstimateArgs& a, const SeaRows& rows, const Planes& p,
                                 const DecoderScratch& s, int64_t batch, int64_t count, int64_t first, int64_t end) {
  const SeaWeightArgs& w = a.weights;
  const int64_t begin = rows_before(true), last = begin + end - first;
  const auto row = [&](int64_t t) { return begin + t - first; };
  // Before the first token of a call the first convolution has run already.
  const int64_t reach = first == 0 ? 0 : kHistory;
  for (int64_t t = first - reach - kHistory; t < end; ++t)
    put_row(p, a.channels, row_at(a, rows, batch, t), row(t), s.a);
  for (int64_t c = 0; c < a.channels; ++c) clear_gaps(p, begin - reach - kHistory, last, s.a + c * p.size);

  const int64_t steps[3] = {-4 * p.pitch, -2 * p.pitch, 0};
  convolve(conv_3x3(a, w.conv1_weight, w.conv1_bias, steps, 2), p, s.a, begin - reach, last, s.b);
  if (first == 0) {
    for (int64_t i = 0; i < kHistory; ++i) put_state(a, a.state.rows2, batch, i, begin - kHistory + i, p, s.b);
    for (int64_t c = 0; c < a.channels; ++c) clear_gaps(p, begin - kHistory, begin, s.b + c * p.size);
    keep_state(a, batch, count, -kHistory, end, begin - kHistory, p, s.b);
  } else {
    keep_state(a, batch, count, first, end, begin, p, s.b);
  }
  convolve(conv_3x3(a, w.conv2_weight, w.conv2_bias, steps, 2), p, s.b, begin, last, s.a);
  // Repeating columns and the 1 x 1 convolution commute. Its bias moves all columns of a head alike, which the
  // LayerNorm takes out again.
  const Conv out = {element<float>(w.out_weight), w.out_weight.stride[0], nullptr, a.channels, a.heads, 1, {0}, false};
  convolve(out, p, s.a, begin, last, s.b);

  for (int64_t t = first; t < end; ++t) {
    const int64_t token = token_of(a, rows, batch, t);
    for (int64_t h = 0; h < a.heads; h += kMostRows) {
      const Columns x = columns_of(a, s, h);
      float sum[kMostRows];
      for (int r = 0; r < x.rows; ++r)
        sum[r] = average_areas(s.b + (h + r) * p.size + row_offset(p, row(t)), p.width, x.x + r * x.pitch);
      normalize_columns(x, sum, element<float>(w.norm_weight), element<float>(w.norm_bias));
      softmax_columns(x, element<float>(a.probs, batch, h, token), a.probs.stride[1]);
    }
  }
}

/// The last kHistory rows of the row linear, history included.
static inline void keep_rows(const SeaEstimateArgs& a, const SeaRows& rows, int64_t batch) {
  if (!a.new_state.rows1.data) return;
  for (int64_t i = 0; i < kHistory; ++i) {
    const float* from = row_at(a, rows, batch, rows.counts[batch] - kHistory + i);
    for (int64_t c = 0; c < a.channels; ++c)
      widen(from + c * a.width, element<float>(a.new_state.rows1, batch, c, i), a.width);
  }
}

// Bidirectional

/// Behind rows repeated twice, two of the three time steps of the last convolution fall on the same row: u - 1, u, u of
/// row 2u, and u, u, u + 1 of row 2u + 1.
static inline void fold_weights(const SeaEstimateArgs& a, const Decoder& d) {
  for (int64_t h = 0; h < a.heads; ++h) {
    const float* from = element<float>(a.weights.out_weight, h);
    for (int64_t c = 0; c < a.channels; ++c, from += 9) {
      float *first = d.first + (h * a.channels + c) * 6, *second = d.second + (h * a.channels + c) * 6;
      for (int j = 0; j < 3; ++j) {
        first[j] = from[j], first[3 + j] = from[3 + j] + from[6 + j];
        second[j] = from[j] + from[3 + j], second[3 + j] = from[6 + j];
      }
    }
  }
}

/// The last convolution for the rows 2u (weights `first`, u - 1 and u) or 2u + 1 (weights `second`, u and u + 1).
static inline Conv out_conv(const SeaEstimateArgs& a, const Planes& p, const float* weight, bool is_second) {
  Conv conv = {weight, 6 * a.channels, element<float>(a.weights.out_bias), a.channels, a.heads, 6, {}, false};
  for (int j = 0; j < 6; ++j) conv.shift[j] = (j / 3 - !is_second) * p.pitch + j % 3 - 1;
  return conv;
}

/// A convolution at the steps [first, end), and zeros at those of them outside [0, steps). Row `row` is that of step 0.
static inline void convolve_steps(const Conv& conv, const Planes& p, const float* in, int64_t first, int64_t end,
                                  int64_t steps, int64_t row, float* out) {
  const int64_t from = larger(first, 0), to = smaller(end, steps);
  convolve(conv, p, in, row + from, row + to, out);
  for (int64_t o = 0; o < conv.outputs; ++o) {
    clear_rows(p, row + first, row + from, out + o * p.size);
    clear_rows(p, row + to, row + end, out + o * p.size);
  }
}

/// y[0..width) = one row of the output in time, with its end columns repeated on either side. An odd number of tokens
/// takes rows between those of the pairs: token t lies (2t + 1) / (2 count) behind row t.
static inline void resize_time(const Planes& p, const float* row, const float* next, int64_t token, int64_t count,
                               float* y) {
  const float part = float(double(2 * token + 1) / double(2 * count)), rest = 1.0f - part;
  if (count % 2 == 0)
    widen(row, y, p.width);
  else
    for (int64_t i = 0; i < p.width; ++i) y[i] = rest * row[i] + part * next[i];
  y[-1] = y[0], y[p.width] = y[p.width - 1];
}

/// The pairs of tokens [first, end) of an item of `count` tokens.
static inline void decode_pairs(const SeaEstimateArgs& a, const SeaRows& rows, const Decoder& d,
                                const DecoderScratch& s, int64_t batch, int64_t count, int64_t first, int64_t end) {
  const SeaWeightArgs& w = a.weights;
  const Planes& p = d.planes;
  const int64_t steps = (count + 1) / 2, row = rows_before(false) - first, odd = a.channels * p.size;
  // With an odd number of tokens the last one needs the row behind it too.
  const int64_t out_end = smaller(end + count % 2, steps);
  for (int64_t t = 2 * (first - 3); t < 2 * (out_end + 2); ++t) {
    float* planes = s.a + (t % 2 != 0 ? odd : 0);
    const int64_t step = t >> 1;
    if (t >= 0 && t < count) put_row(p, a.channels, row_at(a, rows, batch, t), row + step, planes);
    for (int64_t c = 0; c < a.channels; ++c) {
      float* plane = planes + c * p.size;
      if (t >= 0 && t < count)
        clear_gaps(p, row + step, row + step + 1, plane);
      else
        clear_rows(p, row + step, row + step + 1, plane);
    }
  }
  const int64_t strided[3] = {odd - p.pitch, 0, odd}, near[3] = {-p.pitch, 0, p.pitch};
  const Conv conv1 = conv_3x3(a, w.conv1_weight, w.conv1_bias, strided, 1);
  const Conv conv2 = conv_3x3(a, w.conv2_weight, w.conv2_bias, near, 1);
  convolve_steps(conv1, p, s.a, first - 2, out_end + 2, steps, row, s.b);
  convolve_steps(conv2, p, s.b, first - 1, out_end + 1, steps, row, s.a);
  float* out[2] = {s.b, s.b + a.heads * p.size};
  convolve(out_conv(a, p, d.first, false), p, s.a, row + first, row + out_end, out[0]);
  convolve(out_conv(a, p, d.second, true), p, s.a, row + first, row + out_end, out[1]);

  for (int64_t t = 2 * first; t < smaller(2 * end, count); ++t) {
    const int64_t token = token_of(a, rows, batch, t);
    for (int64_t h = 0; h < a.heads; h += kMostRows) {
      const Columns x = columns_of(a, s, h);
      for (int r = 0; r < x.rows; ++r) {
        const auto at = [&](int64_t i) { return out[i % 2] + (h + r) * p.size + row_offset(p, row + i / 2); };
        resize_time(p, at(t), at(t + 1), t, count, s.y + 16);
        double_columns(s.y + 16, p.width, x.x + r * x.pitch);
      }
      softmax_columns(x, element<float>(a.probs, batch, h, token), a.probs.stride[1]);
    }
  }
}

static inline void decode(const Queue& queue, const SeaEstimateArgs& a, const SeaRows& rows, const Decoder& d) {
  if (!a.is_causal) fold_weights(a, d);
  core::parallel_for(queue, a.batch * d.tiles, [&](int64_t task, int worker) {
    Arena arena = {reinterpret_cast<char*>(d.scratch + worker * d.worker_floats), 0};
    const DecoderScratch s = take_decoder_scratch(arena, a, d.planes);
    const int64_t batch = task / d.tiles, count = rows.counts[batch], first = task % d.tiles * d.tile;
    const int64_t end = smaller(first + d.tile, a.is_causal ? count : (count + 1) / 2);
    if (a.is_causal && first == 0) keep_rows(a, rows, batch);
    // The first task of a causal item hands on the state, tokens or not.
    if (first < end && !a.is_causal) decode_pairs(a, rows, d, s, batch, count, first, end);
    if ((first < end || first == 0) && a.is_causal) decode_tokens(a, rows, d.planes, s, batch, count, first, end);
  });
}

}  // namespace subquad::cpu::SUBQUAD_ISA::sea
