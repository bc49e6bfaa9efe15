/// The array border by itself, for its tests and its bench.
#include "call.h"

namespace subquad::python {
namespace {

const char* dtype_name(DType dtype) {
  static const char* const names[] = {"none",  "float32", "float16", "bfloat16", "int64",
                                      "int32", "uint16",  "uint8",   "bool"};
  return names[int(dtype)];
}

nb::object device_name(Device device) {
  if (device.type == DeviceType::cpu) return nb::str("cpu");
  return nb::str("cuda:{}").format(device.index);
}

/// (dtype, shape, strides, device, address) as a call would see `array`.
nb::tuple describe(nb::handle array, bool writable) {
  Border border("describe");
  ConstTensor t;
  if (writable)
    t = border.out("array", array);
  else
    t = border.in("array", array);
  nb::list shape, strides;
  for (int i = 0; i < t.rank; ++i) shape.append(t.shape[i]), strides.append(t.stride[i]);
  return nb::make_tuple(dtype_name(t.dtype), nb::tuple(shape), nb::tuple(strides), device_name(t.device),
                        reinterpret_cast<uintptr_t>(t.data));
}

/// Converts three arrays that a call would read; None stands for an argument that was not given.
void convert(nb::handle a, nb::handle b, nb::handle c) {
  Border border("convert");
  border.in("a", a), border.in("b", b), border.in("c", c);
}

/// Converts an input and an output, as a call with `out=` does.
void convert_out(nb::handle a, nb::handle out) {
  Border border("convert");
  border.in("a", a), border.out("out", out);
}

/// (device, stream, threads, address of `bytes` of scratch memory) for a call with `array`.
nb::tuple resources(nb::handle array, int64_t bytes) {
  Border border("resources");
  border.in("array", array);
  const Queue queue = border.queue();
  const Workspace workspace = border.workspace(bytes);
  return nb::make_tuple(device_name(queue.device), reinterpret_cast<uintptr_t>(queue.stream), queue.num_threads,
                        reinterpret_cast<uintptr_t>(workspace.data));
}

/// (value, whether a kernel will read it from the device) of a seed in a call with `array`.
nb::tuple seed_of(nb::handle seed, nb::handle array) {
  Border border("seed_of");
  border.in("array", array);
  const Seed s = border.seed(seed);
  return nb::make_tuple(s.value, s.pointer != nullptr);
}

}  // namespace

void bind_border_probe(nb::module_& m) {
  m.def("_describe", &describe, nb::arg("array").none(), nb::arg("writable") = false);
  define(m, "_convert", &convert);
  define(m, "_convert_out", &convert_out);
  m.def("_resources", &resources, nb::arg("array").none(), nb::arg("bytes") = 0);
  m.def("_seed", &seed_of, nb::arg("seed").none(), nb::arg("array").none() = nb::none());
}

}  // namespace subquad::python
