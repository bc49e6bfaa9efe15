/// Weighted sum of arrays, rounded once.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// One array of the sum and its factor.
struct SumTerm {
  ConstTensor array;
  double factor = 1.0;
};

/// The sum of up to four arrays, added up over the leading axes that the result does not have.
///
///   out[b,h,n,:] = sum_i factor_i sum_{b',h'} term_i[b',h',n,:]
///
/// where b' runs over the items that fall on b (all of them if out has one item, else b' = b) and h' over the heads of
/// the group of h (H_i / H of them). Methods use it to join contributions to one gradient, to average samples and to
/// convert dtypes.
///
/// @param terms  [B_i, H_i, N, D]  f32 | f16 | bf16, 1 to 4 of them; B_i = B or B = 1; H_i a multiple of H
/// @param out    [B, H, N, D]      f32 | f16 | bf16; every element is written; may be a term of the same view, else
///               must not overlap one
/// @throws std::invalid_argument or TypeMismatch if a line above is violated.
///
/// Promises: no allocation; sums in f32 in the order of terms, items, heads; deterministic; asynchronous on a CUDA
/// queue.
SUBQUAD_API void sum_arrays(const Queue& queue, std::initializer_list<SumTerm> terms, Tensor out);

}  // namespace subquad
