/// Arguments of the bucket_sort kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

struct BucketSortArgs {
  int64_t batch, heads, num_hashes, seq;
  int64_t num_buckets;
  Operand codes;    // [B, H, R, N]                u16 | i32, values in [0, num_buckets)
  Operand mask;     // [B, N]                      bool, optional
  Operand order;    // [B, H, R, N]                i32
  Operand offsets;  // [B, H, R, num_buckets + 1]  i32
};

}  // namespace subquad
