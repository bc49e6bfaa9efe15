/// Are codes buckets? This check reads the data of an array: on a device only with SUBQUAD_CHECK=1.
#pragma once
#include "core/registry.h"

namespace subquad::ops {

/// Throws for the first code of the row that is not in [0, num_buckets), if there is one. `place` are its indices b, h,
/// r.
template <class Code>
inline void check_code_row(const char* op, const char* argument, const Code* codes, int64_t seq, int64_t num_buckets,
                           const int64_t (&place)[3]) {
  // The union of the bits is at least every code; a negative code has the top bit. So a valid row rarely looks twice,
  // and never if num_buckets is a power of two.
  uint32_t bits = 0;
  for (int64_t n = 0; n < seq; ++n) bits |= uint32_t(codes[n]);
  if (int64_t(bits) < num_buckets) return;
  for (int64_t n = 0; n < seq; ++n) {
    if (codes[n] >= 0 && codes[n] < num_buckets) continue;
    std::string where;
    for (int64_t index : place) where += std::to_string(index) + ", ";
    core::invalid(op, argument, "values in [0, " + std::to_string(num_buckets) + ")",
                  std::to_string(codes[n]) + " at [" + where + std::to_string(n) + "]");
  }
}

/// Checks that every element of codes [B, H, R, N] (u16 or i32) lies in [0, num_buckets).
inline void check_codes(const char* op, const char* argument, const Queue& queue, const ConstTensor& array,
                        int64_t num_buckets) {
  const core::CheckedValues values(op, queue, array);
  const ConstTensor& codes = values.view;
  if (!codes.defined()) return;
  int64_t place[3];
  for (place[0] = 0; place[0] < codes.shape[0]; ++place[0])
    for (place[1] = 0; place[1] < codes.shape[1]; ++place[1])
      for (place[2] = 0; place[2] < codes.shape[2]; ++place[2]) {
        const int64_t at = place[0] * codes.stride[0] + place[1] * codes.stride[1] + place[2] * codes.stride[2];
        if (codes.dtype == DType::u16)
          check_code_row(op, argument, static_cast<const uint16_t*>(codes.data) + at, codes.shape[3], num_buckets,
                         place);
        else
          check_code_row(op, argument, static_cast<const int32_t*>(codes.data) + at, codes.shape[3], num_buckets,
                         place);
      }
}

}  // namespace subquad::ops
