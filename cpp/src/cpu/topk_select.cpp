#include "core/visit.h"
#include "cpu/group_select.h"
#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = TopkSelectArgs;

GroupShape shape_of(const Args& a) { return {a.batch, a.heads, a.seq_q, a.seq_k, a.group}; }

/// keys[0..count) become no candidates where the mask is false; up to kLanes - 1 keys behind may change too.
void mask_keys(const bool* keep, int64_t count, int32_t* keys) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const I32 kept = __builtin_convertvector(*(const LooseU8*)(keep + i), I32);
    store(keys + i, select(kept != I32{}, load(keys + i), set(kNoCandidate)));
  }
  for (; i < count; ++i) keys[i] = keep[i] ? keys[i] : kNoCandidate;
}

/// Writes first + i for the bits i that are set; returns how many.
int64_t list_bits(uint32_t bits, int32_t first, int32_t* to) {
  const int count = __builtin_popcount(bits);
#if defined(__AVX512F__)
  const __m512i index = (__m512i)(lane_index() + set(first));
  _mm512_mask_storeu_epi32(to, __mmask16((1u << count) - 1), _mm512_maskz_compress_epi32(__mmask16(bits), index));
#else
  for (int i = 0; bits; bits &= bits - 1, ++i) to[i] = first + __builtin_ctz(bits);
#endif
  return count;
}

struct Source {
  const Args& a;
  GroupShape shape;

  int64_t extent(const Segment& s) const { return a.is_causal ? larger(0, s.n + a.seq_k - a.seq_q + 1) : a.seq_k; }

  const char* address(const Segment& s) const {
    const int64_t* stride = a.scores.stride;
    return static_cast<const char*>(a.scores.data) +
           (s.b * stride[0] + s.h * stride[1] + s.n * stride[2]) * entry_bytes();
  }
  int64_t entry_bytes() const { return dtype_bytes(a.scores.dtype); }

  void load(const Segment& s, int64_t first, int64_t count, int32_t* keys) const {
    const int64_t seen = larger(0, smaller(count, extent(s) - first));
    visit_float(a.scores.dtype, [&](auto tag) {
      ordered_keys(element<const decltype(tag)>(a.scores, s.b, s.h, s.n) + first, seen, keys);
    });
    if (a.key_mask.data) mask_keys(element<const bool>(a.key_mask, s.b) + first, seen, keys);
    fill_keys(keys, seen, count);
  }

  int64_t budget(int64_t, int64_t candidates) const { return smaller(a.k, candidates); }

  int32_t* row_of(int64_t group) const {
    const Segment s = group_at(shape, group);
    if (a.group == Group::query) return element<int32_t>(a.indices, s.b, s.h, s.n);
    return element<int32_t>(a.indices, s.b, a.group == Group::head ? s.h : s.n);
  }

  void emit(int64_t group, int64_t i, const Segment&, int64_t first, int64_t count, const int32_t* keys,
            Threshold& threshold, int64_t& taken) const {
    int32_t* to = row_of(group);
    const int64_t flat = i * a.seq_k + first;
    for (int64_t m = 0; m < count; m += kLanes) {
      const uint32_t chosen = pick(SUBQUAD_ISA::load(keys + m), first_lanes(count - m), threshold);
      taken += list_bits(chosen, int32_t(flat + m), to + taken);
    }
  }

  void finish(int64_t group, int64_t taken) const {
    int32_t* to = row_of(group);
    for (int64_t i = taken; i < a.k; ++i) to[i] = -1;
  }
};

const char* run(const Queue& queue, const Args& a, void* workspace) {
  const Source source = {a, shape_of(a)};
  // A group without entries selects nothing.
  if (group_size(source.shape) == 0)
    for (int64_t group = 0; group < group_count(source.shape); ++group) source.finish(group, 0);
  else
    select_groups(queue, source.shape, source, workspace);
  return nullptr;
}

const char* supports(const Args& a) { return unsupported_groups(shape_of(a)); }

int64_t workspace_bytes(const Queue& queue, const Args& a) {
  const GroupShape shape = shape_of(a);
  return group_size(shape) == 0 ? 0 : select_bytes(queue, shape);
}

}  // namespace

const Slot<TopkSelectArgs> topk_select_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
