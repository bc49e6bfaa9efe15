/// The kinds of Python objects that are arrays to us, and the reasons why others are not.
#pragma once
#include <nanobind/nanobind.h>

#include <string>

#include "dlpack.h"
#include "subquad/queue.h"

namespace subquad::python {

namespace nb = nanobind;

/// The argument that an error is about: `[op] name: expected ..., got ...`.
struct Argument {
  const char* op;
  const char* name;

  /// A wrong shape or value.
  [[noreturn]] void invalid(const std::string& expected, const std::string& got) const;
  /// The wrong kind of object.
  [[noreturn]] void mismatch(const std::string& expected, const std::string& got) const;
};

/// `buffer` is our own class for the device memory of a custom call: it knows its stream and where to allocate.
enum class Family : uint8_t { numpy, torch, jax, cupy, buffer, other };

/// What is known about one Python type of arrays.
struct ArrayType {
  PyTypeObject* type = nullptr;
  Family family = Family::other;
  std::string framework;                          ///< the name in messages; the arrays of a call share it
  bool has_numpy_layout = false;                  ///< numpy::Array describes its instances
  const dlpack::ExchangeApi* exchange = nullptr;  ///< null where the type does not offer it
  PyObject* forward_ad = nullptr;                 ///< torch.autograd.forward_ad
};

/// "cpu" or "cuda:1".
std::string to_string(Device device);

/// The entry of `array`'s exact type, valid as long as the process; null for what is no array. Throws for arrays that
/// mean more than their memory, such as masked ones, tracers and fake tensors.
const ArrayType* array_type(const Argument& argument, nb::handle array);

/// Throws if the memory of a torch tensor does not tell the whole story: gradients, tangents, negated views.
void check_torch_tensor(const Argument& argument, const ArrayType& type, nb::handle tensor);

/// Why torch does not show the memory of `tensor`, and what to do about it; `otherwise` where no reason is found.
std::string torch_obstacle(nb::handle tensor, const std::string& otherwise);

/// An imported module, or an invalid object: a module that nobody imported has made no arrays.
nb::object imported(const char* module);

/// True when `type` is the class `name` of an imported module, or inherits from it.
bool inherits(nb::handle type, const char* module, const char* name);

/// The pending or caught exception of a framework in one line; an interrupt or exit is passed on instead.
std::string exception_line(nb::python_error& error);

}  // namespace subquad::python
