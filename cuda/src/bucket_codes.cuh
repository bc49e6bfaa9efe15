/// Codes, masks and places of the tokens of one side of bucket_attention.
#pragma once
#include "bucket_problem.cuh"
#include "operand_rows.cuh"

namespace subquad::cuda {

/// The place of row x[b, head, token]; of codes: of token 0 of the hash `token`.
__device__ inline int64_t row_offset(const Operand& x, int64_t b, int64_t head, int64_t token) {
  return b * x.stride[0] + head * x.stride[1] + token * x.stride[2];
}

/// Code and mask of a token as they were read. They are looked at later, so that the loads may be under way meanwhile.
struct RawCode {
  int32_t code;
  bool keep;
};

__device__ inline int32_t load_code(const Operand& codes, int64_t offset) {
  return codes.dtype == DType::u16 ? static_cast<const uint16_t*>(codes.data)[offset]
                                   : static_cast<const int32_t*>(codes.data)[offset];
}

__device__ inline RawCode load_raw(const BucketSide& side, int64_t b, int64_t head, int64_t hash, int64_t token) {
  return {load_code(side.codes, row_offset(side.codes, b, head, hash) + token), is_kept(side.mask, b, token)};
}

/// The code, or `none` for a masked token and a code outside [0, num_buckets).
__device__ inline int32_t code_or(RawCode raw, int64_t num_buckets, int32_t none) {
  return raw.keep && uint32_t(raw.code) < uint32_t(num_buckets) ? raw.code : none;
}

}  // namespace subquad::cuda
