#include "cpu/divergence_rows.h"
#include "cpu/table.h"

// Two passes over the keys: the first finds what normalises both rows, the second sums terms that are differences
// themselves. Sums of the parts of those differences would cancel where the student is close to its teacher.

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = AttentionDivergenceArgs;

struct Scratch {
  DivergenceScratch pairs;
  RowNorms* norms;  // [block]
  float* sums;      // [block, 2, kLanes]: of kl and sse
};

Scratch lay_out(Arena& arena, const DivergenceSides& sides, int64_t block) {
  Scratch s;
  s.pairs = take_divergence_scratch(arena, sides, block);
  s.norms = take<RowNorms>(arena, block);
  s.sums = take<float>(arena, block * 2 * kLanes);
  return s;
}

/// Adds the terms of the first `count` logits of a row.
void add_terms(float* const (&logits)[kSides], int64_t count, const RowNorms& norms, float* sums) {
  for (float* side : logits) hide_unseen(side, count);
  const F32 student_inverse = set(norms.inverse[kStudent]), teacher_inverse = set(norms.inverse[kTeacher]);
  F32 kl = load(sums), sse = load(sums + kLanes);
  for (int64_t j = 0; j < count; j += kPanel) {
    F32 below[kBoth], weight[kBoth];
    weigh_panel({logits[kStudent] + j, logits[kTeacher] + j}, norms.top, below, weight);
    for (int v = 0; v < kPanelVectors; ++v) {
      const F32 student = weight[v] * student_inverse, teacher = weight[v + kPanelVectors] * teacher_inverse;
      const F32 term = teacher * (below[v + kPanelVectors] - below[v] + set(norms.log_ratio));
      // A weight of 0 may come with an infinite logit.
      kl += select(teacher == F32{}, F32{}, term);
      sse = fma(student - teacher, student - teacher, sse);
    }
  }
  store(sums, kl), store(sums + kLanes, sse);
}

void run_block(const Args& a, const DivergenceSides& sides, const VisibleBlock& block, const Scratch& s) {
  const int64_t most = open_block(a, sides, block, s.pairs);
  find_norms(sides, block, most, s.pairs, s.norms);
  memset(s.sums, 0, size_t(block.rows * 2 * kLanes) * sizeof(float));
  for_each_group(sides, block, most, s.pairs, [&](const GroupTile& group) {
    for_each_row_of(group, s.pairs, [&](int64_t r, int64_t count, float* const(&logits)[kSides]) {
      add_terms(logits, count, s.norms[r], s.sums + r * 2 * kLanes);
    });
  });
  for (int64_t r = 0; r < block.rows; ++r) {
    const float* sums = s.sums + r * 2 * kLanes;
    *element<float>(a.kl, block.batch, block.head, block.first + r) = reduce_add(load(sums));
    *element<float>(a.sse, block.batch, block.head, block.first + r) = reduce_add(load(sums + kLanes));
  }
}

auto layout_of(const Args& a) {
  return [sides = sides_of(a)](Arena& arena, int64_t block) { return lay_out(arena, sides, block); };
}

VisiblePlan plan(const Queue& queue, const Args& a) {
  return plan_rows(queue, a.batch, a.heads_q, a.seq_q, layout_of(a));
}

int64_t workspace_bytes(const Queue& queue, const Args& a) { return bytes_of(plan(queue, a)); }

const char* run(const Queue& queue, const Args& a, void* workspace) {
  const DivergenceSides sides = sides_of(a);
  for_each_block(plan(queue, a), a.positions, arena_at(workspace).base, layout_of(a),
                 [&](const VisibleBlock& block, const Scratch& s) { run_block(a, sides, block, s); });
  return nullptr;
}

}  // namespace

const Slot<AttentionDivergenceArgs> attention_divergence_slot = {divergence_supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
