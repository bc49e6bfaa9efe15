/// Arguments of the expand_blocks kernels.
#pragma once
#include "ops/sparse_pattern_args.h"

namespace subquad {

struct ExpandBlocksArgs {
  int64_t batch, heads, seq_q, seq_k;
  PatternArgs pattern;  // of blocks
  Operand indptr;       // [B H N + 1] i64: written by the first pass, read by the second
  Operand indices;      // second pass: [nnz] i32
};

}  // namespace subquad
