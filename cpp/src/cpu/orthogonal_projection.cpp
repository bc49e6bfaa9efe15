#include "core/parallel.h"
#include "cpu/table.h"
#include "cpu/unit_row.h"

// A task is one block. Every step works on vectors of columns, so that no sum runs over lanes; Q is transposed when its
// columns are written as rows. A cut block takes only the steps that its rows need, which does not change their bits.

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = OrthogonalProjectionArgs;

struct Scratch {
  float* matrix;       // [rows of a block, padded for the transpose; pitch]
  float* reflections;  // [dim, pitch]: row j is the vector v_j, zero before element j; none for hadamard
};

/// D, or the next power of two for hadamard.
int64_t block_rows(const Args& a) {
  int64_t rows = a.kind == ProjectionKind::hadamard ? 1 : a.dim;
  while (rows < a.dim) rows *= 2;
  return rows;
}

Scratch lay_out(Arena& arena, const Args& a) {
  const int64_t pitch = padded(a.dim);
  Scratch s;
  s.matrix = take<float>(arena, padded(block_rows(a)) * pitch);
  s.reflections = take<float>(arena, a.kind == ProjectionKind::hadamard ? 0 : a.dim * pitch);
  return s;
}

/// A -= tau v (v^T A) for the rows [begin, end) of some vectors of columns.
template <int kVectors>
inline void reflect_columns(float* columns, int64_t pitch, const float* v, float tau, int64_t begin, int64_t end) {
  F32 sum[kVectors] = {};
  for (int64_t i = begin; i < end; ++i)
    for (int k = 0; k < kVectors; ++k) sum[k] = fma(set(v[i]), load(columns + i * pitch + k * kLanes), sum[k]);
  for (int k = 0; k < kVectors; ++k) sum[k] *= set(-tau);
  for (int64_t i = begin; i < end; ++i) {
    for (int k = 0; k < kVectors; ++k) {
      float* x = columns + i * pitch + k * kLanes;
      store(x, fma(set(v[i]), sum[k], load(x)));
    }
  }
}

/// The reflection for columns [first, last) of a matrix of `rows` rows, rounded outwards to whole vectors.
void reflect(float* matrix, int64_t pitch, const float* v, float tau, int64_t begin, int64_t rows, int64_t first,
             int64_t last) {
  int64_t c = first / kLanes * kLanes;
  for (; c + 3 * kLanes < last; c += 4 * kLanes) reflect_columns<4>(matrix + c, pitch, v, tau, begin, rows);
  for (; c < last; c += kLanes) reflect_columns<1>(matrix + c, pitch, v, tau, begin, rows);
}

/// The reflection I - tau v v^T that maps column j of the matrix to (.., beta, 0, ..) from element j on, as in LAPACK:
/// beta has the sign that alpha has not, and the last column is left alone. Returns the diagonal element of R.
float make_reflection(const float* matrix, int64_t pitch, int64_t j, int64_t dim, float* v, float* tau) {
  memset(v, 0, size_t(pitch) * sizeof(float));
  for (int64_t i = j + 1; i < dim; ++i) v[i] = matrix[i * pitch + j];
  const float alpha = matrix[j * pitch + j], rest = dot(v, v, pitch);
  *tau = 0;
  if (rest == 0.0f) return alpha;
  const float norm = sqrt(alpha * alpha + rest), beta = alpha < 0.0f ? norm : -norm;
  *tau = (beta - alpha) / beta;
  divide_row(v, pitch, alpha - beta);
  v[j] = 1;
  return beta;
}

/// The first `count` columns of Q, in place of a matrix; signs[j]: that of the diagonal of R, which is to be undone.
void orthogonalize(const Scratch& s, int64_t dim, int64_t count, float* signs) {
  const int64_t pitch = padded(dim);
  float tau[kMaxHeadDim];
  for (int64_t j = 0; j < count; ++j) {
    float* v = s.reflections + j * pitch;
    signs[j] = make_reflection(s.matrix, pitch, j, dim, v, &tau[j]) < 0.0f ? -1.0f : 1.0f;
    reflect(s.matrix, pitch, v, tau[j], j, dim, j + 1, count);
  }
  memset(s.matrix, 0, size_t(padded(dim) * pitch) * sizeof(float));
  for (int64_t j = count - 1; j >= 0; --j) {
    s.matrix[j * pitch + j] = 1;
    reflect(s.matrix, pitch, s.reflections + j * pitch, tau[j], j, dim, j, count);
  }
}

struct Block {
  int64_t head, index, first, count;  // rows [first, first + count) of the head
};

/// |z_i| of row i of the block.
float length_of(const Args& a, const Block& b, int64_t i) {
  alignas(64) float z[kMaxHeadDim];
  const float* from = static_cast<const float*>(a.lengths.data);
  widen_padded(from + b.head * a.lengths.stride[0] + (b.first + i) * a.lengths.stride[1], z, a.dim);
  return sqrt(dot(z, z, padded(a.dim)));
}

float* row_of(const Args& a, const Block& b, int64_t i) {
  return static_cast<float*>(a.out.data) + b.head * a.out.stride[0] + (b.first + i) * a.out.stride[1];
}

/// Row i of the output = factors[i] * column i of the matrix.
void write_columns(const Args& a, const Block& b, const float* matrix, const float* factors) {
  const int64_t pitch = padded(a.dim);
  for (int64_t first = 0; first < b.count; first += kLanes) {
    for (int64_t d = 0; d < a.dim; d += kLanes) {
      F32 x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = load(matrix + (d + i) * pitch + first);
      transpose(x);
      for (int i = 0; i < smaller(kLanes, b.count - first); ++i) {
        const F32 y = x[i] * set(factors[first + i]);
        float* to = row_of(a, b, first + i) + d;
        if (d + kLanes <= a.dim)
          store(to, y);
        else
          store_part(to, y, a.dim - d);
      }
    }
  }
}

void householder_block(const Args& a, const Block& b, const Scratch& s) {
  const int64_t pitch = padded(a.dim);
  const float* normals = static_cast<const float*>(a.normals.data) + b.head * a.normals.stride[0];
  for (int64_t i = 0; i < a.dim; ++i)
    widen_padded(normals + (b.index * a.dim + i) * a.normals.stride[1], s.matrix + i * pitch, a.dim);
  float factors[kMaxHeadDim];
  orthogonalize(s, a.dim, b.count, factors);
  for (int64_t i = 0; i < b.count; ++i)
    factors[i] = length_of(a, b, i) * (a.kind == ProjectionKind::haar ? factors[i] : 1.0f);
  write_columns(a, b, s.matrix, factors);
}

/// The Walsh-Hadamard transform of every column.
void transform_columns(float* matrix, int64_t rows, int64_t pitch) {
  for (int64_t half = 1; half < rows; half *= 2) {
    for (int64_t i = 0; i < rows; ++i) {
      if (i & half) continue;
      float *x = matrix + i * pitch, *y = x + half * pitch;
      for (int64_t d = 0; d < pitch; d += kLanes) {
        const F32 sum = load(x + d) + load(y + d), difference = load(x + d) - load(y + d);
        store(x + d, sum), store(y + d, difference);
      }
    }
  }
}

void hadamard_block(const Args& a, const Block& b, const Scratch& s) {
  const int64_t rows = block_rows(a), pitch = padded(a.dim);
  const float* signs = static_cast<const float*>(a.signs.data) + b.head * a.signs.stride[0];
  memset(s.matrix, 0, size_t(rows * pitch) * sizeof(float));
  for (int64_t d = 0; d < a.dim; ++d) s.matrix[d * pitch + d] = 1;
  // Without its factors the product of the three has integral elements up to rows^2, all exact.
  for (int64_t step = 0; step < 3; ++step) {
    const float* sign = signs + (3 * b.index + step) * a.signs.stride[1];
    for (int64_t i = 0; i < rows; ++i) scale_row(s.matrix + i * pitch, pitch, sign[i]);
    transform_columns(s.matrix, rows, pitch);
  }
  for (int64_t i = 0; i < b.count; ++i) {
    float* row = s.matrix + i * pitch;
    scale_row(row, pitch, length_of(a, b, i) / (float(rows) * sqrt(float(a.dim))));
    narrow(row, row_of(a, b, i), a.dim);
  }
}

struct Plan {
  Queue queue;
  int64_t worker_bytes;
};

Plan plan(const Queue& queue, const Args& a) {
  Arena worker = {};
  lay_out(worker, a);
  Plan p = {queue, worker.used};
  p.queue.num_threads = int32_t(smaller(queue.num_threads, larger(1, a.heads * a.blocks)));
  return p;
}

const char* supports(const Args& a) { return a.dim > kMaxHeadDim ? kTooWide : nullptr; }

int64_t workspace_bytes(const Queue& queue, const Args& a) {
  const Plan p = plan(queue, a);
  return with_alignment({nullptr, p.queue.num_threads * p.worker_bytes});
}

const char* run(const Queue& queue, const Args& a, void* workspace) {
  const Plan p = plan(queue, a);
  const int64_t rows = block_rows(a);
  char* base = arena_at(workspace).base;
  core::parallel_for(p.queue, a.heads * a.blocks, [&](int64_t task, int worker) {
    Arena arena = {base + worker * p.worker_bytes, 0};
    const Scratch s = lay_out(arena, a);
    const int64_t first = task % a.blocks * rows;
    const Block b = {task / a.blocks, task % a.blocks, first, smaller(rows, a.num_features - first)};
    if (a.kind == ProjectionKind::hadamard)
      hadamard_block(a, b, s);
    else
      householder_block(a, b, s);
  });
  return nullptr;
}

}  // namespace

const Slot<OrthogonalProjectionArgs> orthogonal_projection_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
