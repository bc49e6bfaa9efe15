/// A sparse pattern as kernels see it; its forms are described in subquad/sparse_pattern.h.
#pragma once
#include "core/operand.h"

namespace subquad {

enum class PatternForm : int32_t { indices, csr, blocks };

struct PatternArgs {
  PatternForm form;
  int64_t heads;                   // indices: 1, Hkv or H;  else H
  int64_t slots;                   // indices: S
  int64_t entries;                 // csr: nnz
  int64_t num_columns, block_cap;  // blocks
  Operand indices;                 // [B, heads, N, S] or [nnz] i32
  Operand log_weights;             // like indices f32, optional
  Operand indptr;                  // [B H N + 1] i32 | i64
  Operand bits;                    // [B, H, N, ceil(K / 8)] u8
  Operand visible;                 // [B, N] i32
  Operand positions;               // [B, M] i32, optional
};

}  // namespace subquad
