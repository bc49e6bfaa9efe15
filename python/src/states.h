/// States of causal calls as lists of three arrays, each of which may be None.
#pragma once
#include "call.h"
#include "subquad/eva_attention.h"
#include "subquad/linear_attention.h"

namespace subquad::python {

/// Views of inputs are kept as Tensor, for states are both read and written; the core writes to none of these.
inline Tensor read_only(Border& border, const char* name, nb::handle array) {
  Tensor t;
  static_cast<ConstTensor&>(t) = border.in(name, array);
  return t;
}

inline LinearAttentionState state_in(Border& border, const nb::list& parts) {
  return {read_only(border, "state S", parts[0]), read_only(border, "state z", parts[1]),
          read_only(border, "state shift", parts[2])};
}

inline LinearAttentionState state_out(Border& border, const nb::list& parts) {
  return {optional_out(border, "new S", parts[0]), optional_out(border, "new z", parts[1]),
          optional_out(border, "new shift", parts[2])};
}

inline EvaChunks chunks_in(Border& border, const nb::list& parts) {
  return {read_only(border, "state k_bar", parts[0]), read_only(border, "state beta", parts[1]),
          read_only(border, "state log_mass", parts[2])};
}

inline EvaChunks chunks_out(Border& border, const nb::list& parts) {
  return {optional_out(border, "new k_bar", parts[0]), optional_out(border, "new beta", parts[1]),
          optional_out(border, "new log_mass", parts[2])};
}

}  // namespace subquad::python
