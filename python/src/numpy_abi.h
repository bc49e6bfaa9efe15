/// The memory layout of numpy's arrays, as every extension that is compiled against numpy reads it.
///
/// Reading the fields costs 1 ns an array, the buffer protocol 30 to 150 ns, and the buffer protocol does not export
/// bfloat16. Major versions 1 and 2 of numpy's binary interface agree on every field named here; array_types.cpp asks
/// for the version before it trusts them.
#pragma once
#include <nanobind/nanobind.h>

namespace subquad::python::numpy {

struct Descr {
  PyObject head;
  PyTypeObject* scalar_type;
  char kind, type, byte_order, former_flags;
  int type_num;
};

struct Array {
  PyObject head;
  char* data;
  int rank;
  Py_ssize_t* shape;
  Py_ssize_t* strides;  ///< in bytes
  PyObject* base;
  Descr* descr;
  int flags;
};

inline constexpr int kWriteable = 0x0400;

/// Built-in type numbers; those of other packages' dtypes (ml_dtypes) start at kUserTypes.
enum TypeNumber {
  kBool = 0,
  kUByte = 2,
  kUShort = 4,
  kInt = 5,
  kLong = 7,
  kLongLong = 9,
  kFloat = 11,
  kHalf = 23,
  kUserTypes = 256
};

}  // namespace subquad::python::numpy
