/// Arguments of the transpose_pattern kernels.
#pragma once
#include "ops/sparse_pattern_args.h"

namespace subquad {

struct TransposePatternArgs {
  int64_t batch, heads, seq_q, seq_k;
  PatternArgs pattern;  // CSR
  Operand key_indptr;   // [B H M + 1] i64
  Operand rows;         // [nnz] i32
  Operand order;        // [nnz] i64
};

}  // namespace subquad
