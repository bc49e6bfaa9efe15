/// What every binding does after its arrays are converted: find scratch memory, let go of the GIL, run.
#pragma once
#include <nanobind/nanobind.h>

#include <type_traits>

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

/// Binds a function all of whose arguments may be None: what is missing is the function's own error, in its own words.
template <class R, class... A>
void define(nb::module_& m, const char* name, R (*function)(A...)) {
  m.def(name, function, ((void)sizeof(std::decay_t<A>), nb::arg().none())...);
}

void bind_hashing(nb::module_& m);
void bind_softmax(nb::module_& m);
void bind_features(nb::module_& m);
void bind_methods(nb::module_& m);
void bind_randomized(nb::module_& m);
void bind_sparse(nb::module_& m);
void bind_distillation(nb::module_& m);
void bind_sea(nb::module_& m);
void bind_border_probe(nb::module_& m);

}  // namespace subquad::python
