#include "core/parallel.h"
#include "core/visit.h"
#include "cpu/simd.h"
#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

// A lane is a token, so that a transform or a projection needs no step across lanes. A tile is [D][tokens].

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

// Register tile of the projections: kPlanes x kVectors sums, kVectors inputs and a broadcast; plane pointers stay in
// general registers.
constexpr int kPlanes = 6;
constexpr int kVectors = kRegisters == 32 ? 4 : 2;

/// One worker's scratch memory; a tile has `tokens` columns.
struct Scratch {
  float* x;      // [D2 or D][tokens]
  float* y;      // [bits][tokens], the numbers whose signs are the bits of the codes
  float* work;   // [D2][tokens], Hadamard only
  float* signs;  // [3][P][D2] of exactly +1 or -1, Hadamard only
};

int64_t tile_tokens(const LshHashArgs& args) {
  const int64_t vectors = (args.seq + kLanes - 1) / kLanes;
  return args.hadamard ? kLanes : kLanes * (vectors < kVectors ? vectors : kVectors);
}

Scratch lay_out(Arena& arena, const LshHashArgs& args) {
  const int64_t tokens = tile_tokens(args);
  Scratch s = {};
  if (args.hadamard) {
    const int64_t coordinates = int64_t(args.parts) * args.padded;
    s.x = take<float>(arena, args.padded * tokens);
    s.y = take<float>(arena, coordinates * tokens);
    s.work = take<float>(arena, args.padded * tokens);
    s.signs = take<float>(arena, 3 * coordinates);
  } else {
    s.x = take<float>(arena, args.dim * tokens);
    s.y = take<float>(arena, (int64_t(args.num_hashes) * args.hash_bits + kPlanes) * tokens);
  }
  return s;
}

bool any(I32 mask) {
  int32_t lane[kLanes], bits = 0;
  store(lane, mask);
  for (int i = 0; i < kLanes; ++i) bits |= lane[i];
  return bits != 0;
}

/// Coordinates that pack_block takes at once.
template <class T>
constexpr int kBlock = kLanes;
template <>
constexpr int kBlock<bfloat16> = 2 * kLanes;

template <class T>
inline void pack_block(const T* const (&row)[kLanes], int64_t d, float* tile, int64_t pitch) {
  F32 block[kLanes];
  for (int i = 0; i < kLanes; ++i) block[i] = load(row[i] + d);
  transpose(block);
  for (int i = 0; i < kLanes; ++i) store(tile + (d + i) * pitch, block[i]);
}

/// Moves pairs of coordinates and takes them apart afterwards: half the shuffles.
inline void pack_block(const bfloat16* const (&row)[kLanes], int64_t d, float* tile, int64_t pitch) {
  typedef float Pairs __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
  F32 block[kLanes];
  for (int i = 0; i < kLanes; ++i) block[i] = *(const Pairs*)(row[i] + d);
  transpose(block);
  for (int i = 0; i < kLanes; ++i) {
    const U32 pair = as_u32(block[i]);
    store(tile + (d + 2 * i) * pitch, as_f32(pair << 16));
    store(tile + (d + 2 * i + 1) * pitch, as_f32(pair & 0xffff0000u));
  }
}

/// tile[d][0..kLanes) = x[token][d], `dim` rows. Lanes from `tokens` on repeat the last token.
template <class T>
void pack(const T* x, int64_t stride, int tokens, int64_t dim, float* tile, int64_t pitch) {
  const T* row[kLanes];
  for (int i = 0; i < kLanes; ++i) row[i] = x + (i < tokens ? i : tokens - 1) * stride;
  if (dim < kBlock<T>) {
    for (int64_t d = 0; d < dim; ++d)
      for (int i = 0; i < kLanes; ++i) tile[d * pitch + i] = to_float(row[i][d]);
    return;
  }
  // The last block overlaps the one before it instead of ending early.
  for (int64_t d = 0; d < dim; d += kBlock<T>) pack_block(row, d + kBlock<T> <= dim ? d : dim - kBlock<T>, tile, pitch);
}

/// True unless the sums of squares show that every token's largest |x| is inside [2^-100, 2^100].
bool may_need_rescale(const float* tile, int64_t dim, int64_t pitch) {
  F32 sum[4] = {};
  int64_t d = 0;
  for (; d + 4 <= dim; d += 4)
    for (int i = 0; i < 4; ++i) {
      const F32 x = load(tile + (d + i) * pitch);
      sum[i] = fma(x, x, sum[i]);
    }
  for (; d < dim; ++d) sum[0] = fma(load(tile + d * pitch), load(tile + d * pitch), sum[0]);
  const F32 total = sum[0] + sum[1] + sum[2] + sum[3];
  return any(~((total > set(0x1p-100f)) & (total < set(0x1p100f))));
}

/// Brings tokens whose largest |x| is outside [2^-100, 2^100] to where sums neither overflow nor lose bits below the
/// normal range. The factor is the token's own, so a code never depends on the neighbours.
void rescale(float* tile, int64_t dim, int64_t pitch) {
  if (!may_need_rescale(tile, dim, pitch)) return;
  F32 highest = {}, lowest = {};
  for (int64_t d = 0; d < dim; ++d) {
    highest = max(load(tile + d * pitch), highest);
    lowest = min(load(tile + d * pitch), lowest);
  }
  const F32 largest = max(highest, -lowest);
  const I32 huge = largest > set(0x1p100f), tiny = largest < set(0x1p-100f);
  const F32 factor = select(huge, set(0x1p-64f), select(tiny, set(0x1p64f), set(1.0f)));
  for (int64_t d = 0; d < dim; ++d) store(tile + d * pitch, load(tile + d * pitch) * factor);
}

[[gnu::always_inline]] inline void butterfly(F32& a, F32& b) {
  const F32 sum = a + b;
  b = a - b;
  a = sum;
}

/// Butterflies of strides Stride, 2 Stride, ... below Count on registers.
template <int Count, int Stride>
[[gnu::always_inline]] inline void butterflies(F32 (&a)[Count]) {
  for (int i = 0; i < Count; ++i)
    if (!(i & Stride)) butterfly(a[i], a[i + Stride]);
  if constexpr (2 * Stride < Count) butterflies<Count, 2 * Stride>(a);
}

/// Count rows of x, `step` rows apart, to rows of y that are `y_step` rows apart.
template <int Count>
[[gnu::always_inline]] inline void butterfly_rows(const float* x, int64_t step, float* y, int64_t y_step) {
  F32 a[Count];
  for (int i = 0; i < Count; ++i) a[i] = load(x + i * step * kLanes);
  butterflies<Count, 1>(a);
  for (int i = 0; i < Count; ++i) store(y + i * y_step * kLanes, a[i]);
}

/// The first three strides on eight neighbouring rows of W S x. The products with +1 or -1 are exact, so folding them
/// into the first additions changes no rounding, with or without a fused instruction.
[[gnu::always_inline]] inline void signed_butterfly_rows(const float* x, const float* sign, float* y) {
  F32 a[8];
  for (int i = 0; i < 8; i += 2) {
    const F32 first = load(x + i * kLanes) * set(sign[i]), second = load(x + (i + 1) * kLanes);
    a[i] = fma(second, set(sign[i + 1]), first);
    a[i + 1] = fma(-second, set(sign[i + 1]), first);
  }
  butterflies<8, 2>(a);
  for (int i = 0; i < 8; ++i) store(y + i * kLanes, a[i]);
}

/// y = W S x. Rows of y are `step` rows apart; `work` has room for one transform and may be x. One pass over the rows
/// takes the strides 1 2 4, one 8 16 32, one the rest; with enough registers 8 16 32 64 are one pass.
void signed_transform(const float* x, const float* sign, int64_t padded, float* work, float* y, int64_t step) {
  for (int64_t i = 0; i < padded; i += 8) signed_butterfly_rows(x + i * kLanes, sign + i, work + i * kLanes);
  if (padded == 64) {
    for (int64_t i = 0; i < 8; ++i) butterfly_rows<8>(work + i * kLanes, 8, y + i * step * kLanes, 8 * step);
  } else if (padded == 128 && kRegisters == 32) {
    for (int64_t i = 0; i < 8; ++i) butterfly_rows<16>(work + i * kLanes, 8, y + i * step * kLanes, 8 * step);
  } else {
    for (int64_t c = 0; c < padded; c += 64)
      for (int64_t i = c; i < c + 8; ++i) butterfly_rows<8>(work + i * kLanes, 8, work + i * kLanes, 8);
    for (int64_t i = 0; i < 64; ++i) {
      const float* from = work + i * kLanes;
      float* to = y + i * step * kLanes;
      if (padded == 128) butterfly_rows<2>(from, 64, to, 64 * step);
      if (padded == 256) butterfly_rows<4>(from, 64, to, 64 * step);
      if (padded == 512) butterfly_rows<8>(from, 64, to, 64 * step);
    }
  }
}

/// All transforms of a tile. Strided carving takes the bits from coordinate 0 of all transforms, then coordinate 1 of
/// all, and so on: in that order they are stored. Published carving keeps each transform together.
void transform_tile(const LshHashArgs& args, const Scratch& s) {
  const int64_t padded = args.padded, round = args.parts * padded;
  for (int64_t p = 0; p < args.parts; ++p) {
    const float* sign = s.signs + p * padded;
    signed_transform(s.x, sign, padded, s.work, s.work, 1);
    signed_transform(s.work, sign + round, padded, s.work, s.work, 1);
    float* y = s.y + p * kLanes * (args.strided ? 1 : padded);
    signed_transform(s.work, sign + 2 * round, padded, s.work, y, args.strided ? args.parts : 1);
  }
}

/// sums[i][v] = <plane i, tokens of vector v>.
template <int Vectors>
[[gnu::always_inline]] inline void project(const float* tile, int64_t dim, const float* const* plane,
                                           F32 (&sums)[kPlanes][Vectors]) {
  for (int i = 0; i < kPlanes; ++i)
    for (int v = 0; v < Vectors; ++v) sums[i][v] = F32{};
  for (int64_t d = 0; d < dim; ++d) {
    F32 x[Vectors];
    for (int v = 0; v < Vectors; ++v) x[v] = load(tile + (d * Vectors + v) * kLanes);
    for (int i = 0; i < kPlanes; ++i) {
      const F32 w = set(plane[i][d]);
      for (int v = 0; v < Vectors; ++v) sums[i][v] = fma(w, x[v], sums[i][v]);
    }
  }
}

/// All projections of a tile, in the order of the bits. The last group of planes repeats the last plane.
template <int Vectors>
void project_tile(const LshHashArgs& args, const float* planes, const Scratch& s) {
  const int64_t bits = int64_t(args.num_hashes) * args.hash_bits;
  int64_t r = 0, j = 0;
  for (int64_t first = 0; first < bits; first += kPlanes) {
    const float* plane[kPlanes];
    for (int i = 0; i < kPlanes; ++i) {
      plane[i] = planes + r * args.planes.stride[1] + j * args.planes.stride[2];
      if (first + i + 1 < bits && ++j == args.hash_bits) j = 0, ++r;
    }
    F32 sums[kPlanes][Vectors];
    project<Vectors>(s.x, args.dim, plane, sums);
    for (int i = 0; i < kPlanes; ++i)
      for (int v = 0; v < Vectors; ++v) store(s.y + ((first + i) * Vectors + v) * kLanes, sums[i][v]);
  }
}

void project_tile(const LshHashArgs& args, const float* planes, const Scratch& s, int64_t vectors) {
  if (vectors == 1) project_tile<1>(args, planes, s);
  if (vectors == 2) project_tile<2>(args, planes, s);
  if constexpr (kVectors > 2) {
    if (vectors == 3) project_tile<3>(args, planes, s);
    if (vectors == 4) project_tile<4>(args, planes, s);
  }
}

void store_codes(uint16_t* out, I32 codes, int64_t count) {
  typedef uint16_t U16 __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
  const U16 narrow = __builtin_convertvector((U32)codes, U16);
  if (count >= kLanes)
    *(U16*)out = narrow;
  else
    memcpy(out, &narrow, size_t(count) * sizeof *out);
}

void store_codes(int32_t* out, I32 codes, int64_t count) {
  if (count >= kLanes)
    store(out, codes);
  else
    memcpy(out, &codes, size_t(count) * sizeof *out);
}

/// The row of y that holds bit 0 of code r; those of the other bits follow.
int64_t first_bit(const LshHashArgs& args, int64_t r) {
  const int64_t codes_a_part = args.padded / args.hash_bits;
  if (!args.hadamard || args.strided) return r * args.hash_bits;
  // Published carving leaves the last coordinates of a transform unused where hash_bits does not divide their number.
  return r / codes_a_part * args.padded + r % codes_a_part * args.hash_bits;
}

/// Packs signs into codes, four codes at a time to have independent work.
template <class Code>
void collect_codes(const LshHashArgs& args, const float* y, int64_t vectors, int64_t tokens, Code* out) {
  const int64_t last = args.num_hashes - 1, pitch = vectors * kLanes;
  for (int64_t r = 0; r <= last; r += 4) {
    const float* row[4];
    for (int i = 0; i < 4; ++i) row[i] = y + first_bit(args, r + i < last ? r + i : last) * pitch;
    for (int64_t v = 0; v < pitch; v += kLanes) {
      I32 code[4] = {}, bit = set(1);
      for (int64_t j = 0; j < args.hash_bits; ++j, bit += bit)
        for (int i = 0; i < 4; ++i) code[i] = select(load(row[i] + j * pitch + v) > F32{}, code[i] | bit, code[i]);
      for (int i = 0; i < 4 && r + i <= last; ++i)
        store_codes(out + (r + i) * args.codes.stride[2] + v, code[i], tokens - v);
    }
  }
}

/// Codes of the tokens first..last of head h; at most one tile. T and Code are the element types of x and codes.
template <class T, class Code>
void hash_tile(const LshHashArgs& args, const Scratch& s, int64_t b, int64_t h, int64_t first, int64_t last) {
  const T* x = static_cast<const T*>(args.x.data) + b * args.x.stride[0] + h * args.x.stride[1];
  const int64_t tokens = last - first, vectors = (tokens + kLanes - 1) / kLanes, pitch = vectors * kLanes;
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t n = first + v * kLanes, count = last - n < kLanes ? last - n : kLanes;
    pack(x + n * args.x.stride[2], args.x.stride[2], int(count), args.dim, s.x + v * kLanes, pitch);
    rescale(s.x + v * kLanes, args.dim, pitch);
  }
  if (args.hadamard) {
    transform_tile(args, s);
  } else {
    const int64_t head = h / (args.heads / args.plane_heads);
    project_tile(args, static_cast<const float*>(args.planes.data) + head * args.planes.stride[0], s, vectors);
  }
  Code* codes = static_cast<Code*>(args.codes.data) + b * args.codes.stride[0] + h * args.codes.stride[1] + first;
  collect_codes(args, s.y, vectors, tokens, codes);
}

/// The signs of one head as factors, read by their sign bit only; and zeros under the last coordinate of x.
void prepare_transforms(const LshHashArgs& args, const Scratch& s, int64_t h) {
  const int64_t head = h / (args.heads / args.plane_heads);
  const float* signs = static_cast<const float*>(args.signs.data) + head * args.signs.stride[0];
  float* out = s.signs;
  for (int64_t round = 0; round < 3; ++round)
    for (int64_t p = 0; p < args.parts; ++p, out += args.padded)
      for (int64_t i = 0; i < args.padded; i += kLanes) {
        const U32 bits = as_u32(load(signs + round * args.signs.stride[1] + p * args.signs.stride[2] + i));
        store(out + i, as_f32((bits & 0x80000000u) | 0x3f800000u));
      }
  memset(s.x + args.dim * kLanes, 0, size_t(args.padded - args.dim) * kLanes * sizeof(float));
}

template <class T, class Code>
void hash(const Queue& queue, const LshHashArgs& args, void* workspace) {
  const int64_t tile = tile_tokens(args);
  Arena measure = {};
  lay_out(measure, args);
  // A task is about ten microseconds of vector operations, so that it pays for being handed to a thread.
  const int64_t kTask = 32768;
  const int64_t work =
      args.hadamard ? 24 * int64_t(args.parts) * args.padded : int64_t(args.num_hashes) * args.hash_bits * args.dim;
  const int64_t tiles = 1 + kTask / (work * (tile / kLanes)), task_tokens = tiles * tile;
  const int64_t tasks_a_head = (args.seq + task_tokens - 1) / task_tokens;
  core::parallel_for(queue, args.batch * args.heads * tasks_a_head, [&](int64_t task, int worker) {
    Arena arena = arena_at(workspace);
    arena.used = worker * measure.used;
    const Scratch s = lay_out(arena, args);
    const int64_t b = task / tasks_a_head / args.heads, h = task / tasks_a_head % args.heads;
    const int64_t first = task % tasks_a_head * task_tokens;
    const int64_t last = first + task_tokens < args.seq ? first + task_tokens : args.seq;
    if (args.hadamard) prepare_transforms(args, s, h);
    for (int64_t n = first; n < last; n += tile)
      hash_tile<T, Code>(args, s, b, h, n, n + tile < last ? n + tile : last);
  });
}

const char* supports(const LshHashArgs& args) { return args.dim > kMaxHeadDim ? kTooWide : nullptr; }

int64_t workspace_bytes(const Queue& queue, const LshHashArgs& args) {
  Arena arena = {};
  for (int i = 0; i < queue.num_threads; ++i) lay_out(arena, args);
  return with_alignment(arena);
}

const char* run(const Queue& queue, const LshHashArgs& args, void* workspace) {
  visit_float(args.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (args.codes.dtype == DType::u16)
      hash<T, uint16_t>(queue, args, workspace);
    else
      hash<T, int32_t>(queue, args, workspace);
  });
  return nullptr;
}

}  // namespace

const Slot<LshHashArgs> lsh_hash_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
