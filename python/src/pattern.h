/// A sparse pattern from the dict that Python makes of any of its forms.
#pragma once
#include "keywords.h"
#include "subquad/select_blocks.h"
#include "subquad/sparse_pattern.h"

namespace subquad::python {

inline SparsePattern pattern_of(const char* op, Border& border, const nb::dict& given) {
  const Keywords parts(op, border, given);
  SparsePattern p;
  p.indices = parts.array("indices"), p.log_weights = parts.array("log_weights");
  p.indptr = parts.array("indptr");
  p.bits = parts.array("bits"), p.visible = parts.array("visible"), p.positions = parts.array("positions");
  p.num_columns = parts.integer("K"), p.block_cap = parts.integer("block_cap");
  return p;
}

inline Group group_of(const char* op, nb::handle value) {
  return choice<Group>(
      op, "group", value,
      {{"query", Group::query}, {"head", Group::head}, {"batch", Group::batch}, {"row_heads", Group::row_heads}});
}

inline SelectBlocksOptions select_options(const char* op, const Keywords& keywords) {
  SelectBlocksOptions o;
  o.top_k = keywords.number("top_k");
  o.group = group_of(op, keywords.at("group"));
  o.budget = choice<BudgetRule>(op, "budget", keywords.at("budget"),
                                {{"code", BudgetRule::code}, {"paper", BudgetRule::paper}});
  o.skip_dead = keywords.boolean("skip_dead");
  return o;
}

}  // namespace subquad::python
