#include "array_types.h"

#include <memory>
#include <vector>

#include "subquad/error.h"
#include "values.h"

namespace subquad::python {
namespace {

std::string text(nb::handle object) { return nb::str(object).c_str(); }

bool is_true(nb::handle object, const char* attribute) {
  return nb::getattr(object, attribute, nb::none()).is(Py_True);
}

/// The package that defines `type`, by the name its users know.
std::string package_of(nb::handle type) {
  const std::string module = text(nb::getattr(type, "__module__", nb::str("")));
  const std::string package = module.substr(0, module.find('.'));
  return package == "jaxlib" ? "jax" : package;
}

/// True when objects have the header that numpy_abi.h assumes and numpy's binary interface is one that it describes.
bool numpy_layout_is_known() {
  const nb::handle object_type(reinterpret_cast<PyObject*>(&PyBaseObject_Type));
  if (nb::cast<size_t>(object_type.attr("__basicsize__")) != sizeof(PyObject)) return false;
  nb::object core = imported("numpy._core._multiarray_umath");
  if (!core.is_valid()) core = imported("numpy.core._multiarray_umath");
  if (!core.is_valid()) return false;
  const nb::object capsule = nb::getattr(core, "_ARRAY_API", nb::none());
  if (!PyCapsule_IsValid(capsule.ptr(), nullptr)) return false;
  using VersionFunction = unsigned (*)();
  void** functions = static_cast<void**>(PyCapsule_GetPointer(capsule.ptr(), nullptr));
  const unsigned major = reinterpret_cast<VersionFunction>(functions[0])() >> 24;
  return major == 1 || major == 2;
}

/// Subclasses that only add a name or a file behind the memory are arrays; those that change what operations do are
/// not.
void check_plain_numpy(const Argument& argument, nb::handle type) {
  const std::string name = text(type.attr("__name__"));
  if (inherits(type, "numpy.ma", "MaskedArray"))
    argument.mismatch("an array without a mask of its own", name + ": pass its .data, and the mask as key_mask");
  const nb::object base = imported("numpy").attr("ndarray");
  for (const char* hook : {"__array_ufunc__", "__array_function__"})
    if (!nb::getattr(type, hook, nb::none()).is(nb::getattr(base, hook, nb::none())))
      argument.mismatch("a plain numpy array",
                        name + ", which changes what operations do: pass numpy.asarray(...) of it");
}

/// Subclasses of tensors carry meaning beside their memory, Parameter excepted.
void check_plain_torch(const Argument& argument, nb::handle type) {
  const nb::object torch = imported("torch");
  if (type.is(torch.attr("Tensor")) || type.is(torch.attr("nn").attr("Parameter"))) return;
  const std::string name = text(type.attr("__name__"));
  argument.mismatch("a torch.Tensor or torch.nn.Parameter",
                    name + (name == "FakeTensor" ? ", which has no data: use subquad.torch"
                                                 : ", a subclass: use subquad.torch, or pass the plain tensor in it"));
}

void check_no_tracer(const Argument& argument, nb::handle type) {
  for (nb::handle base : nb::cast<nb::tuple>(type.attr("__mro__")))
    if (text(base.attr("__name__")) == "Tracer" && package_of(base) == "jax")
      argument.mismatch("a jax array with values", "a tracer of jax.jit, grad or vmap: use subquad.jax there");
}

const dlpack::ExchangeApi* exchange_api(nb::handle type) {
  constexpr const char* kName = "dlpack_exchange_api";
  const nb::object capsule = nb::getattr(type, "__dlpack_c_exchange_api__", nb::none());
  if (!PyCapsule_IsValid(capsule.ptr(), kName)) return nullptr;
  auto api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), kName));
  while (api && api->version.major > dlpack::kMajorVersion) api = api->previous;
  return api && api->version.major == dlpack::kMajorVersion && api->view ? api : nullptr;
}

/// Null for what is no array.
std::unique_ptr<ArrayType> describe(const Argument& argument, nb::handle type) {
  auto made = std::make_unique<ArrayType>();
  ArrayType& t = *made;
  t.framework = package_of(type);
  if (inherits(type, "numpy", "ndarray")) {
    check_plain_numpy(argument, type);
    t.family = Family::numpy;
    t.framework = "numpy";
    t.has_numpy_layout = numpy_layout_is_known();
    return made;
  }
  if (inherits(type, "subquad.jax._cuda", "DeviceBuffer")) {
    t.family = Family::buffer;
    t.framework = "jax";
    return made;
  }
  if (inherits(type, "torch", "Tensor")) {
    check_plain_torch(argument, type);
    t.family = Family::torch;
    t.framework = "torch";
    t.forward_ad = imported("torch.autograd.forward_ad").release().ptr();
  } else {
    check_no_tracer(argument, type);
    if (!nb::hasattr(type, "__dlpack__")) return nullptr;
    if (t.framework == "jax") t.family = Family::jax;
    if (t.framework == "cupy") t.family = Family::cupy;
  }
  t.exchange = exchange_api(type);
  return made;
}

/// Consumes a reference to True or False.
bool take_bool(PyObject* result) {
  if (!result) nb::raise_python_error();
  const bool value = result == Py_True;
  Py_DECREF(result);
  return value;
}

bool has_tangent(const ArrayType& type, nb::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("_current_level");
  if (!type.forward_ad) return false;
  // straight from the module's dict: an attribute of a module takes five times as long
  PyObject* const level = PyDict_GetItemWithError(PyModule_GetDict(type.forward_ad), name);
  if (!level || PyLong_AsLong(level) < 0) return false;
  return !nb::handle(type.forward_ad).attr("unpack_dual")(tensor).attr("tangent").is_none();
}

}  // namespace

void Argument::invalid(const std::string& expected, const std::string& got) const {
  throw std::invalid_argument(sentence(op, name, expected, got));
}

void Argument::mismatch(const std::string& expected, const std::string& got) const {
  throw TypeMismatch(sentence(op, name, expected, got));
}

nb::object imported(const char* module) { return nb::borrow(PyDict_GetItemString(PyImport_GetModuleDict(), module)); }

bool inherits(nb::handle type, const char* module, const char* name) {
  const nb::object owner = imported(module);
  if (!owner.is_valid()) return false;
  const nb::object base = nb::getattr(owner, name, nb::none());
  const auto as_type = [](nb::handle object) { return reinterpret_cast<PyTypeObject*>(object.ptr()); };
  return PyType_Check(base.ptr()) && PyType_IsSubtype(as_type(type), as_type(base));
}

std::string exception_line(nb::python_error& error) {
  if (!error.matches(PyExc_Exception)) throw error;
  const std::string message = text(error.value());
  return text(error.type().attr("__name__")) + ": " + message.substr(0, message.find('\n'));
}

std::string to_string(Device device) {
  return device.type == DeviceType::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

const ArrayType* array_type(const Argument& argument, nb::handle array) {
  // The GIL guards the list, since nothing in the loop runs Python code. Entries stay, because a Border of another
  // thread may point to one, and hold their type, so that no other type takes its address.
  static std::vector<std::unique_ptr<const ArrayType>> known;
  PyTypeObject* const type = Py_TYPE(array.ptr());
  for (const auto& entry : known)
    if (entry->type == type) return entry.get();
  std::unique_ptr<ArrayType> made = describe(argument, array.type());
  if (!made) return nullptr;
  made->type = type;
  Py_INCREF(reinterpret_cast<PyObject*>(type));
  known.push_back(std::move(made));
  return known.back().get();
}

void check_torch_tensor(const Argument& argument, const ArrayType& type, nb::handle tensor) {
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  if (take_bool(PyObject_GetAttr(tensor.ptr(), requires_grad)) &&
      nb::cast<bool>(imported("torch").attr("is_grad_enabled")()))
    throw std::runtime_error(sentence(argument.op, argument.name, "a tensor without gradient",
                                      "requires_grad=True in grad mode: use subquad.torch if it has this function, "
                                      "else torch.no_grad() or .detach()"));
  if (has_tangent(type, tensor))
    throw std::runtime_error(sentence(argument.op, argument.name, "a tensor without gradient",
                                      "a dual tensor: forward-mode differentiation is not supported"));
  PyObject* arguments[] = {tensor.ptr()};
  if (take_bool(PyObject_VectorcallMethod(is_neg, arguments, 1, nullptr)))
    argument.invalid("a tensor that holds its values", "a view to be negated on reading: call .resolve_neg()");
}

std::string torch_obstacle(nb::handle tensor, const std::string& otherwise) {
  const nb::object functorch = imported("torch._C._functorch");
  if (functorch.is_valid() && functorch.attr("is_functorch_wrapped_tensor")(tensor).is(Py_True))
    return "a tensor of a torch.func transform: use subquad.torch";
  if (tensor.attr("is_complex")().is(Py_True)) return "a complex tensor: pass .real and .imag, after .resolve_conj()";
  if (is_true(tensor, "is_nested")) return "a nested tensor: pad it and pass key_mask";
  if (is_true(tensor, "is_quantized")) return "a quantized tensor: call .dequantize()";
  if (is_true(tensor, "is_meta")) return "a meta tensor, which has no data: use subquad.torch";
  const std::string layout = text(nb::getattr(tensor, "layout", nb::str("torch.strided")));
  if (layout != "torch.strided") return "one of layout " + layout + ": call .to_dense()";
  return otherwise + " (inside torch.compile and torch.func use subquad.torch)";
}

}  // namespace subquad::python
