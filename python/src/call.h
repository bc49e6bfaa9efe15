/// What every binding does after its arrays are converted: find scratch memory, let go of the GIL, run.
#pragma once
#include <nanobind/nanobind.h>

#include "array.h"

namespace subquad::python {

namespace nb = nanobind;

template <class Bytes, class Run>
void run_with_workspace(Border& border, Bytes&& bytes, Run&& run) {
  const Workspace workspace = border.workspace(bytes());
  nb::gil_scoped_release unlocked;
  run(workspace);
}

/// An output that the caller may leave out: None is an undefined tensor.
inline Tensor optional_out(Border& border, const char* name, nb::handle array) {
  return array.is_none() ? Tensor{} : border.out(name, array);
}

void bind_hashing(nb::module_& m);
void bind_methods(nb::module_& m);
void bind_border_probe(nb::module_& m);

}  // namespace subquad::python
