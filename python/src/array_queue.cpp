/// Where the work of a call goes: the queue of its arrays' device, and scratch memory there.
#include <string>
#include <utility>

#include "array.h"
#include "array_types.h"
#include "dlpack.h"
#include "scratch.h"
#include "values.h"

namespace subquad::python {
namespace {

/// While this lives, cupy allocates on one device and tells that device's stream; both are those of its current device.
class CupyDevice {
 public:
  explicit CupyDevice(int32_t index) : device_(imported("cupy").attr("cuda").attr("Device")(index)) {
    device_.attr("__enter__")();
  }
  ~CupyDevice() {
    try {
      device_.attr("__exit__")(nb::none(), nb::none(), nb::none());
    } catch (nb::python_error& error) {
      error.discard_as_unraisable("subquad: leaving a device of cupy");
    }
  }
  CupyDevice(const CupyDevice&) = delete;
  CupyDevice& operator=(const CupyDevice&) = delete;

 private:
  nb::object device_;
};

}  // namespace

Queue Border::queue() const {
  if (device_.type == DeviceType::cpu) return Queue::cpu();
  void* stream = nullptr;
  if (first_->exchange) {
    if (first_->exchange->current_stream(dlpack::kCuda, device_.index, &stream) != 0) nb::raise_python_error();
  } else if (first_->family == Family::torch) {
    const nb::object current = imported("torch").attr("cuda").attr("current_stream")(device_.index);
    stream = PyLong_AsVoidPtr(nb::object(current.attr("cuda_stream")).ptr());
  } else if (first_->family == Family::buffer) {
    stream = PyLong_AsVoidPtr(nb::object(first_array_.attr("queue").attr("stream")).ptr());
  } else {
    const CupyDevice scope(device_.index);
    const nb::object current = imported("cupy").attr("cuda").attr("get_current_stream")();
    stream = PyLong_AsVoidPtr(nb::object(current.attr("ptr")).ptr());
  }
  return Queue::cuda(device_.index, stream);
}

Workspace Border::workspace(int64_t bytes) {
  if (bytes <= 0) return {};
  if (device_.type == DeviceType::cuda) return {device_memory(bytes), bytes};
  Scratch* block = Scratch::acquire(bytes);
  keep(block, [](void* kept) { Scratch::release(static_cast<Scratch*>(kept)); });
  return {block->data(), bytes};
}

void* Border::device_memory(int64_t bytes) {
  if (first_->exchange) {
    dlpack::Tensor prototype = {nullptr, {dlpack::kCuda, device_.index}, 1, {dlpack::kUInt, 8, 1}, &bytes, nullptr, 0};
    dlpack::ManagedVersioned* managed = nullptr;
    std::string message;
    const auto set_error = [](void* error, const char*, const char* what) { *static_cast<std::string*>(error) = what; };
    if (first_->exchange->allocate(&prototype, &managed, &message, set_error) != 0)
      throw std::runtime_error(
          sentence(op_, "workspace", std::to_string(bytes) + " bytes on " + to_string(device_), message));
    keep(managed, [](void* kept) {
      auto* tensor = static_cast<dlpack::ManagedVersioned*>(kept);
      if (tensor->deleter) tensor->deleter(tensor);
    });
    return static_cast<char*>(managed->tensor.data) + managed->tensor.byte_offset;
  }
  // XLA's memory belongs to the call of its custom call, which frees it
  if (first_->family == Family::buffer)
    return PyLong_AsVoidPtr(nb::object(first_array_.attr("queue").attr("allocate")(bytes)).ptr());
  nb::object memory, address;
  if (first_->family == Family::torch) {
    const nb::object torch = imported("torch");
    memory = torch.attr("empty")(bytes, nb::arg("dtype") = torch.attr("uint8"), nb::arg("device") = to_string(device_));
    address = memory.attr("data_ptr")();
  } else {
    const CupyDevice scope(device_.index);
    memory = imported("cupy").attr("cuda").attr("alloc")(bytes);
    address = memory.attr("ptr");
  }
  keep(std::move(memory));
  return PyLong_AsVoidPtr(address.ptr());
}

}  // namespace subquad::python
