#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "call.h"
#include "scratch.h"
#include "subquad/cpu.h"
#include "subquad/cuda.h"
#include "subquad/error.h"

namespace nb = nanobind;

namespace {

/// The most derived error first: nanobind asks its translators in reverse order of registration.
void bind_errors(nb::module_& m) {
  nb::exception<subquad::Unsupported>(m, "UnsupportedError", PyExc_NotImplementedError);
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const subquad::TypeMismatch& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    }
  });
}

void bind_cpu(nb::module_& m) {
  m.def("cpu_isa", &subquad::cpu::isa);
  m.def("cpu_set_isa", &subquad::cpu::set_isa, nb::arg("name"));
  m.def("cpu_available", &subquad::cpu::available);
  m.def("cpu_compiled", &subquad::cpu::compiled);
  m.def("num_threads", &subquad::default_num_threads);
  m.def("free_scratch", &subquad::python::Scratch::forget);
}

#if defined(SUBQUAD_HAS_CUDA)

nb::list cuda_devices() {
  nb::list all;
  for (const subquad::cuda::DeviceInfo& d : subquad::cuda::devices())
    all.append(nb::make_tuple(d.name, nb::make_tuple(d.major, d.minor), d.multiprocessors, d.memory_bytes));
  return all;
}

void bind_cuda(nb::module_& m) {
  subquad::register_cuda();
  m.def("cuda_build", [] { return nb::make_tuple(subquad::cuda::runtime_version(), subquad::cuda::architectures()); });
  m.def("cuda_devices", &cuda_devices);
  m.def("cuda_why_none", &subquad::cuda::why_none);
}

#else

void bind_cuda(nb::module_& m) {
  m.def("cuda_build", [] { return nb::none(); });
  m.def("cuda_devices", [] { return nb::list(); });
  m.def("cuda_why_none",
        [] { return std::string("this build has CPU kernels only: nvcc was not there, or not asked for"); });
}

#endif

}  // namespace

NB_MODULE(_ext, m) {
  bind_errors(m);
  bind_cpu(m);
  bind_cuda(m);
  subquad::python::bind_hashing(m);
  subquad::python::bind_softmax(m);
  subquad::python::bind_features(m);
  subquad::python::bind_methods(m);
  subquad::python::bind_randomized(m);
  subquad::python::bind_sparse(m);
  subquad::python::bind_distillation(m);
  subquad::python::bind_sea(m);
  subquad::python::bind_border_probe(m);
}
