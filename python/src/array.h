/// The array border: any framework's arrays as views of their own memory. Nothing is copied, converted or guessed; what
/// cannot be taken as it is raises, and the message says how to fix it.
#pragma once
#include <nanobind/nanobind.h>

#include "subquad/random.h"
#include "subquad/tensor.h"

namespace subquad::python {

namespace nb = nanobind;

struct Argument;
struct ArrayType;

/// Converts the arrays of one call and owns what keeps them alive. The first array decides framework and device; the
/// others must agree with it. Errors read `[op] argument: expected ..., got ...`.
///
/// Construct, use and destroy it with the GIL held; only the work between may let go of the GIL.
class Border {
 public:
  explicit Border(const char* op) : op_(op) {}
  ~Border();
  Border(const Border&) = delete;
  Border& operator=(const Border&) = delete;

  /// A read-only view of `array`; an undefined view for None.
  ConstTensor in(const char* name, nb::handle array);

  /// A writable view. Read-only arrays and jax arrays are refused; for jax inputs an output is a numpy array.
  Tensor out(const char* name, nb::handle array);

  /// The argument `seed`: an int in [-2^63, 2^64), taken mod 2^64, or a 0-d int64 array, which is read now on the CPU
  /// and by the kernel on a CUDA device.
  Seed seed(nb::handle value);

  /// The queue of the arrays' device: the CPU with default_num_threads(), or CUDA with the framework's current stream.
  Queue queue() const;

  /// Scratch memory that lives as long as the Border: from the arrays' framework on a CUDA device, else from the heap.
  Workspace workspace(int64_t bytes);

 private:
  struct Kept {
    void* object;
    void (*release)(void* object);
  };
  static constexpr int kMaxKept = 64;

  void keep(void* object, void (*release)(void*));
  void keep(nb::object object);
  ConstTensor convert(const Argument& argument, nb::handle array, bool writable);
  void join(const Argument& argument, const ArrayType& type, nb::handle array, Device device, bool writable);
  ConstTensor view(const Argument& argument, const ArrayType& type, nb::handle array, bool writable);
  ConstTensor view_protocol(const Argument& argument, const ArrayType& type, nb::handle array, bool writable);
  void* device_memory(int64_t bytes);

  const char* op_;
  const char* first_name_ = nullptr;
  const ArrayType* first_ = nullptr;
  nb::handle first_array_;
  Device device_ = {DeviceType::cpu, 0};
  int num_kept_ = 0;
  Kept kept_[kMaxKept];
};

}  // namespace subquad::python
