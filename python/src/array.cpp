#include "array.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "array_types.h"
#include "dlpack.h"
#include "huge_pages.h"
#include "numpy_abi.h"
#include "subquad/error.h"
#include "values.h"

namespace subquad::python {
namespace {

[[noreturn]] void refuse_dtype(const Argument& argument, nb::handle array) {
  std::string dtype = nb::str(nb::getattr(array, "dtype", nb::str("an unknown dtype"))).c_str();
  if (dtype.find("float64") != std::string::npos) dtype += " (refused: cast to float32)";
  if (dtype.find("complex") != std::string::npos) dtype += " (refused: pass .real and .imag, after .resolve_conj())";
  argument.mismatch("dtype float32, float16, bfloat16, int64, int32, uint16, uint8 or bool", dtype);
}

[[noreturn]] void refuse_read_only(const Argument& argument) {
  argument.invalid("an array that may be written", "a read-only one: pass a copy");
}

/// The view of memory that a framework described, after the checks that all frameworks share. `unit` is the number of
/// stride steps to an element: its size for strides in bytes, 1 for strides in elements. Null strides are contiguous.
template <class Int>
ConstTensor make_view(const Argument& argument, DType dtype, Device device, const void* data, int rank,
                      const Int* shape, const Int* strides, int64_t unit) {
  if (rank > kMaxRank) argument.invalid("at most " + std::to_string(kMaxRank) + " axes", std::to_string(rank));
  ConstTensor t;
  t.dtype = dtype;
  t.device = device;
  t.rank = rank;
  for (int i = 0; i < rank; ++i) t.shape[i] = shape[i];
  if (t.numel() == 0) return t;  // frameworks disagree on the address and strides of nothing
  int64_t contiguous = 1;
  for (int i = rank - 1; i >= 0; contiguous *= shape[i--]) {
    const int64_t stride = strides ? strides[i] : contiguous * unit;
    if (stride % unit != 0 && shape[i] > 1)
      argument.invalid("strides of whole elements", std::to_string(stride) + " bytes: pass a copy");
    t.stride[i] = stride / unit;
  }
  if (reinterpret_cast<uintptr_t>(data) % uintptr_t(dtype_bytes(dtype)) != 0)
    argument.invalid("data aligned to its element size", "an unaligned address: pass a copy");
  t.data = data;
  return t;
}

DType numpy_dtype(numpy::Descr* descr) {
  static_assert(sizeof(int) == 4 && sizeof(long long) == 8);
  switch (descr->type_num) {
    case numpy::kBool:
      return DType::boolean;
    case numpy::kUByte:
      return DType::u8;
    case numpy::kUShort:
      return DType::u16;
    case numpy::kInt:
      return DType::i32;
    case numpy::kLong:
      return sizeof(long) == 8 ? DType::i64 : DType::i32;
    case numpy::kLongLong:
      return DType::i64;
    case numpy::kFloat:
      return DType::f32;
    case numpy::kHalf:
      return DType::f16;
  }
  // ml_dtypes registers its types when it is imported, so the number is found once.
  static int bfloat16_number = numpy::kUserTypes - 1;
  if (descr->type_num == bfloat16_number) return DType::bf16;
  if (descr->type_num < numpy::kUserTypes) return DType::none;
  const nb::handle object(reinterpret_cast<PyObject*>(descr));
  if (strcmp(nb::str(object.attr("name")).c_str(), "bfloat16") != 0) return DType::none;
  bfloat16_number = descr->type_num;
  return DType::bf16;
}

ConstTensor view_numpy(const Argument& argument, nb::handle object, bool writable) {
  const auto* array = reinterpret_cast<const numpy::Array*>(object.ptr());
  const DType dtype = numpy_dtype(array->descr);
  if (dtype == DType::none) refuse_dtype(argument, object);
  if (array->descr->byte_order == '>') argument.mismatch("little-endian data", "big-endian data: pass a native copy");
  if (writable && !(array->flags & numpy::kWriteable)) refuse_read_only(argument);
  return make_view(argument, dtype, {DeviceType::cpu, 0}, array->data, array->rank, array->shape, array->strides,
                   dtype_bytes(dtype));
}

/// The memory of a custom call's operand or result, which our own class describes in elements.
ConstTensor view_buffer(const Argument& argument, nb::handle buffer) {
  const nb::object element = buffer.attr("dtype");
  const DType dtype = numpy_dtype(reinterpret_cast<numpy::Descr*>(element.ptr()));
  if (dtype == DType::none) refuse_dtype(argument, buffer);
  const nb::tuple extents(buffer.attr("shape")), steps(buffer.attr("strides"));
  const int rank = int(std::min<size_t>(extents.size(), kMaxRank + 1));
  int64_t shape[kMaxRank + 1], strides[kMaxRank + 1];
  for (int i = 0; i < rank; ++i) shape[i] = nb::cast<int64_t>(extents[i]), strides[i] = nb::cast<int64_t>(steps[i]);
  const Device device = {DeviceType::cuda, nb::cast<int32_t>(buffer.attr("queue").attr("device"))};
  const void* data = PyLong_AsVoidPtr(nb::object(buffer.attr("address")).ptr());
  return make_view(argument, dtype, device, data, rank, shape, strides, 1);
}

DType dlpack_dtype(dlpack::DataType dtype) {
  if (dtype.lanes != 1) return DType::none;
  switch (dtype.code << 8 | dtype.bits) {
    case dlpack::kFloat << 8 | 32:
      return DType::f32;
    case dlpack::kFloat << 8 | 16:
      return DType::f16;
    case dlpack::kBfloat << 8 | 16:
      return DType::bf16;
    case dlpack::kInt << 8 | 64:
      return DType::i64;
    case dlpack::kInt << 8 | 32:
      return DType::i32;
    case dlpack::kUInt << 8 | 16:
      return DType::u16;
    case dlpack::kUInt << 8 | 8:
      return DType::u8;
    case dlpack::kBool << 8 | 8:
      return DType::boolean;
  }
  return DType::none;
}

Device dlpack_device(const Argument& argument, nb::handle array, dlpack::Device device) {
  if (device.type == dlpack::kCpu || device.type == dlpack::kCudaHost) return {DeviceType::cpu, 0};
  if (device.type == dlpack::kCuda || device.type == dlpack::kCudaManaged) return {DeviceType::cuda, device.index};
  const nb::object name = nb::getattr(array, "device", nb::int_(device.type));
  argument.mismatch("an array on the CPU or a CUDA device", std::string("one on device ") + nb::str(name).c_str());
}

/// Why a framework does not show an array's memory; `otherwise` where we know no better words.
std::string obstacle(const ArrayType& type, nb::handle array, const std::string& otherwise) {
  return type.family == Family::torch ? torch_obstacle(array, otherwise) : otherwise;
}

ConstTensor view_dlpack(const Argument& argument, const ArrayType& type, nb::handle array,
                        const dlpack::Tensor& tensor) {
  const DType dtype = dlpack_dtype(tensor.dtype);
  if (dtype == DType::none) refuse_dtype(argument, array);
  const Device device = dlpack_device(argument, array, tensor.device);
  const char* data = static_cast<const char*>(tensor.data);
  if (data)
    data += tensor.byte_offset;
  else if (std::find(tensor.shape, tensor.shape + tensor.rank, 0) == tensor.shape + tensor.rank)
    argument.mismatch("an array in memory", obstacle(type, array, "one without data"));
  return make_view(argument, dtype, device, data, tensor.rank, tensor.shape, tensor.strides, 1);
}

ConstTensor view_exchange(const Argument& argument, const ArrayType& type, nb::handle array) {
  dlpack::Tensor tensor = {};
  if (type.exchange->view(array.ptr(), &tensor) != 0) {
    nb::python_error error;
    argument.mismatch("an array in memory", obstacle(type, array, exception_line(error)));
  }
  return view_dlpack(argument, type, array, tensor);
}

/// Calls `__dlpack__`. Without a stream the producer waits for the data, which is right for the CPU. On a CUDA device
/// the stream is -1, "do not synchronise", since the work is put on the stream that the producer itself uses.
nb::object dlpack_capsule(const ArrayType& type, nb::handle array) {
  nb::dict keywords;
  // jax arrays are taken on the CPU only, and the question costs as much as the capsule
  if (type.family != Family::jax) {
    const int device_type = nb::cast<int>(nb::int_(nb::object(array.attr("__dlpack_device__")()[0])));
    if (device_type == dlpack::kCuda || device_type == dlpack::kCudaManaged) keywords["stream"] = -1;
  }
  keywords["max_version"] = nb::make_tuple(1, 3);
  const nb::object method = array.attr("__dlpack__");
  try {
    return method(**keywords);
  } catch (nb::python_error& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  nb::del(keywords["max_version"]);  // producers from before DLPack 1.0
  return method(**keywords);
}

/// Only a framework that tells its stream can be followed on a CUDA device.
void check_cuda_framework(const Argument& argument, const ArrayType& type) {
  const std::string expected = "a torch or cupy array on a CUDA device";
  if (type.family == Family::jax)
    throw Unsupported(sentence(argument.op, argument.name, expected, "a jax array: use subquad.jax"));
  if (!type.exchange && type.family != Family::torch && type.family != Family::cupy)
    argument.mismatch(expected, "a " + type.framework + " array");
}

/// The content of a DLPack capsule of either kind.
const dlpack::Tensor& capsule_content(const Argument& argument, nb::handle capsule, bool writable) {
  constexpr const char *kLegacy = "dltensor", *kVersioned = "dltensor_versioned";
  if (PyCapsule_IsValid(capsule.ptr(), kLegacy))
    return static_cast<const dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), kLegacy))->tensor;
  if (!PyCapsule_IsValid(capsule.ptr(), kVersioned))
    argument.mismatch("a DLPack capsule from __dlpack__", nb::inst_name(capsule).c_str());
  const auto* managed = static_cast<const dlpack::ManagedVersioned*>(PyCapsule_GetPointer(capsule.ptr(), kVersioned));
  if (managed->version.major != dlpack::kMajorVersion)
    argument.mismatch("DLPack version 1", "version " + std::to_string(managed->version.major));
  if (writable && (managed->flags & dlpack::kReadOnly)) refuse_read_only(argument);
  if (writable && (managed->flags & dlpack::kIsCopied)) argument.invalid("memory of its own", "an exported copy");
  return managed->tensor;
}

}  // namespace

Border::~Border() {
  while (num_kept_ > 0) {
    const Kept& last = kept_[--num_kept_];
    last.release(last.object);
  }
}

void Border::keep(void* object, void (*release)(void*)) {
  if (num_kept_ == kMaxKept) {
    release(object);
    throw std::length_error("[" + std::string(op_) + "] too many arrays in one call");
  }
  kept_[num_kept_++] = {object, release};
}

void Border::keep(nb::object object) {
  keep(object.release().ptr(), [](void* kept) { Py_DECREF(static_cast<PyObject*>(kept)); });
}

ConstTensor Border::in(const char* name, nb::handle array) {
  return array.is_none() ? ConstTensor{} : convert({op_, name}, array, false);
}

Tensor Border::out(const char* name, nb::handle array) {
  Tensor t;
  static_cast<ConstTensor&>(t) = convert({op_, name}, array, true);
  const bool ascending = std::all_of(t.stride, t.stride + t.rank, [](int64_t stride) { return stride >= 0; });
  if (t.device.type == DeviceType::cpu && ascending) prefer_huge_pages(t.data, t.numel() * dtype_bytes(t.dtype));
  return t;
}

ConstTensor Border::convert(const Argument& argument, nb::handle array, bool writable) {
  const ArrayType* type = array_type(argument, array);
  if (!type) argument.mismatch("an array (numpy, torch, cupy or jax)", nb::inst_name(array).c_str());
  const ConstTensor t = view(argument, *type, array, writable);
  join(argument, *type, array, t.device, writable);
  keep(nb::borrow(array));
  return t;
}

ConstTensor Border::view(const Argument& argument, const ArrayType& type, nb::handle array, bool writable) {
  if (type.has_numpy_layout) return view_numpy(argument, array, writable);
  if (type.family == Family::buffer) return view_buffer(argument, array);
  if (type.family == Family::torch) check_torch_tensor(argument, type, array);
  if (type.family == Family::jax && writable)
    argument.mismatch("an array that may be written", "a jax array, which is immutable: pass a numpy array");
  const ConstTensor t =
      type.exchange ? view_exchange(argument, type, array) : view_protocol(argument, type, array, writable);
  if (t.device.type == DeviceType::cuda) check_cuda_framework(argument, type);
  return t;
}

/// The capsule owns the tensor until a consumer renames it. The call only borrows, so it keeps the capsule as it is.
ConstTensor Border::view_protocol(const Argument& argument, const ArrayType& type, nb::handle array, bool writable) {
  nb::object capsule;
  try {
    // Older torch refuses to export what requires grad even in no_grad mode, where check_torch_tensor lets it pass.
    const bool detach = type.family == Family::torch && nb::cast<bool>(array.attr("requires_grad"));
    capsule = dlpack_capsule(type, detach ? array.attr("detach")() : nb::borrow(array));
  } catch (nb::python_error& error) {
    argument.mismatch("an array in memory", obstacle(type, array, exception_line(error)));
  }
  const ConstTensor t = view_dlpack(argument, type, array, capsule_content(argument, capsule, writable));
  keep(std::move(capsule));
  return t;
}

void Border::join(const Argument& argument, const ArrayType& type, nb::handle array, Device device, bool writable) {
  if (!first_) {
    first_ = &type;
    first_array_ = array;
    first_name_ = argument.name;
    device_ = device;
    return;
  }
  const bool same_framework = &type == first_ || type.framework == first_->framework ||
                              (writable && first_->family == Family::jax && type.family == Family::numpy);
  if (!same_framework)
    argument.mismatch("a " + first_->framework + " array, as " + first_name_ + " is", "a " + type.framework + " array");
  if (device.type != device_.type || device.index != device_.index)
    argument.mismatch("an array on " + to_string(device_) + ", where " + first_name_ + " is",
                      "one on " + to_string(device));
}

Seed Border::seed(nb::handle value) {
  const Argument argument = {op_, "seed"};
  nb::object integer = nb::borrow(value);
  if (!PyLong_Check(value.ptr()) && inherits(value.type(), "numpy", "integer")) integer = nb::int_(value);
  if (PyLong_Check(integer.ptr()) && !PyBool_Check(integer.ptr())) {
    int overflow = 0;
    const long long small = PyLong_AsLongLongAndOverflow(integer.ptr(), &overflow);
    if (overflow == 0) return Seed(uint64_t(small));
    const unsigned long long large = PyLong_AsUnsignedLongLong(integer.ptr());
    if (!PyErr_Occurred()) return Seed(uint64_t(large));
    PyErr_Clear();
    argument.invalid("an integer in [-2^63, 2^64)", nb::str(integer).c_str());
  }
  const ArrayType* type = array_type(argument, value);
  if (!type) argument.mismatch("an integer or a 0-d int64 array", nb::inst_name(value).c_str());
  const ConstTensor t = view(argument, *type, value, false);
  if (t.dtype != DType::i64) argument.mismatch("an integer or a 0-d int64 array", "an array of another dtype");
  if (t.rank != 0) argument.invalid("an integer or a 0-d int64 array", "an array of rank " + std::to_string(t.rank));
  Seed seed;
  if (t.device.type == DeviceType::cpu) {
    seed.value = uint64_t(*static_cast<const int64_t*>(t.data));
  } else {
    join(argument, *type, value, t.device, false);
    keep(nb::borrow(value));
    seed.pointer = static_cast<const int64_t*>(t.data);
  }
  return seed;
}

}  // namespace subquad::python
