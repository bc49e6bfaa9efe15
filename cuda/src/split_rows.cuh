/// Rows of any storage type copied into the form that tensor cores multiply: 16-bit parts whose sum is the element,
///
///   data[row][part][column],   x = sum_part data[part],   columns padded with zeros to a multiple of 16
///
/// and, where lengths matter, with factors that make of a product of two copies their cosine. A masked row becomes
/// zeros, so that whatever it holds meets no product. A bfloat16 is one part, a half is two parts of bfloat16,
/// a float is three. One and two parts hold the row as it is (over a power of two where its squares leave the
/// range of float) and the factor is 1 / length; three parts hold the unit row. A warp copies a row. One read and one
/// write of every element: bound by memory.
#pragma once
#include "operand_rows.cuh"
#include "unit_row.cuh"

namespace subquad::cuda {

static constexpr int kSplitThreads = 256;
static constexpr int kMostSplits = 4;

/// The copy of an array [B, H, N, D]: rows in the order of its axes.
struct SplitRows {
  void* data;
  float* factor;  // [B, H, factor_pitch]; null where not wanted
  int64_t heads, seq, factor_pitch;
  int32_t width;  // columns with their padding
};

struct SplitTask {
  Operand x, mask;
  SplitRows to;
  int64_t dim;
};

struct SplitTasks {
  SplitTask task[kMostSplits];
  int64_t batch;
};

/// 1 / the length of the row after it is divided by its power of two; 0 for a row of zeros.
template <int Count>
__device__ inline double invert_length(WarpRow<Count>& row) {
  if (measure_row(row).significand == 0) return 0;
  double square = 0;
#pragma unroll
  for (int i = 0; i < Count; ++i) square += double(row.value[i]) * row.value[i];
  for (int step = kWarp / 2; step > 0; step /= 2) square += __shfl_xor_sync(kFullMask, square, step);
  return 1 / sqrt(square);
}

/// The parts of x, each the nearest to what the ones before it leave.
template <int Parts>
__device__ inline void split(float x, bfloat16 (&parts)[Parts]) {
  from_float(x, &parts[0]);
  const float infinity = bits_to_float(0x7f800000u);
  // Floats above the largest bfloat16 would round to infinity; infinity and NaN leave nothing behind.
  if (Parts > 1 && fabsf(x) < infinity && !(fabsf(to_float(parts[0])) < infinity))
    parts[0].bits = uint16_t(float_to_bits(x) >> 16);
  const bool finite = fabsf(to_float(parts[0])) < infinity;
#pragma unroll
  for (int i = 1; i < Parts; ++i) {
    x = finite ? x - to_float(parts[i - 1]) : 0.0f;
    from_float(x, &parts[i]);
  }
}

template <int Count, int Parts>
__global__ void __launch_bounds__(kSplitThreads) split_rows_kernel(const __grid_constant__ SplitTasks tasks) {
  const SplitTask& task = tasks.task[blockIdx.y];
  const SplitRows& to = task.to;
  const int64_t row = int64_t(blockIdx.x) * (kSplitThreads / kWarp) + warp_id();
  if (row >= tasks.batch * to.heads * to.seq) return;
  const int64_t head = row / to.seq, n = row % to.seq, b = head / to.heads;
  WarpRow<Count> x = {};
  if (is_kept(task.mask, b, n))
    visit_row(task.x, b, head % to.heads, n, [&](const auto* from) { x = load_row<Count>(from, task.dim); });
  if (to.factor) {
    double factor = invert_length(x);
    if (Parts == 3) {
#pragma unroll
      for (int i = 0; i < Count; ++i) x.value[i] = float(x.value[i] * factor);
      factor = 1;
    }
    if (lane_id() == 0) to.factor[head * to.factor_pitch + n] = float(factor);
  }
  bfloat16* data = static_cast<bfloat16*>(to.data) + row * Parts * to.width;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    const int column = lane_id() + kWarp * i;
    if (column >= to.width) continue;
    bfloat16 parts[Parts];
    split(x.value[i], parts);
#pragma unroll
    for (int part = 0; part < Parts; ++part) data[part * to.width + column] = parts[part];
  }
}

}  // namespace subquad::cuda
