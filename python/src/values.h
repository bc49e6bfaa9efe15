/// Plain arguments from Python: numbers, switches and choices, with the library's own error sentences.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <initializer_list>
#include <string>
#include <utility>

#include "subquad/error.h"

namespace subquad::python {

namespace nb = nanobind;

/// "[op] name: expected EXPECTED, got GOT", as the core words it.
inline std::string sentence(const char* op, const char* name, const std::string& expected, const std::string& got) {
  return "[" + std::string(op) + "] " + name + ": expected " + expected + ", got " + got;
}

inline std::string kind_of(nb::handle value) { return nb::cast<std::string>(nb::str(value.type().attr("__name__"))); }

/// An int, or anything with __index__ such as a numpy integer; bool is refused.
inline int64_t integer(const char* op, const char* name, nb::handle value) {
  if (PyBool_Check(value.ptr()) || !PyIndex_Check(value.ptr()))
    throw TypeMismatch(sentence(op, name, "an integer", kind_of(value)));
  const nb::object exact = nb::steal(PyNumber_Index(value.ptr()));
  if (!exact.is_valid()) {
    PyErr_Clear();
    throw TypeMismatch(sentence(op, name, "an integer", kind_of(value)));
  }
  int overflow = 0;
  const long long result = PyLong_AsLongLongAndOverflow(exact.ptr(), &overflow);
  if (overflow) throw std::invalid_argument(sentence(op, name, "an integer of 64 bits", nb::str(value).c_str()));
  return result;
}

inline double number(const char* op, const char* name, nb::handle value) {
  if (PyBool_Check(value.ptr()) || !PyNumber_Check(value.ptr()))
    throw TypeMismatch(sentence(op, name, "a number", kind_of(value)));
  const double result = PyFloat_AsDouble(value.ptr());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    throw TypeMismatch(sentence(op, name, "a number", kind_of(value)));
  }
  return result;
}

/// True or False (numpy's too); numbers are refused, they are mistakes more often than not.
inline bool boolean(const char* op, const char* name, nb::handle value) {
  if (PyBool_Check(value.ptr())) return value.is(Py_True);
  const std::string type = kind_of(value);
  if (type == "bool" || type == "bool_") return PyObject_IsTrue(value.ptr()) == 1;
  throw TypeMismatch(sentence(op, name, "True or False", type));
}

template <class T>
T choice(const char* op, const char* name, nb::handle value, std::initializer_list<std::pair<const char*, T>> choices) {
  std::string allowed;
  const bool is_text = PyUnicode_Check(value.ptr());
  const std::string text = is_text ? nb::cast<std::string>(value) : "";
  for (const auto& [word, result] : choices) {
    if (is_text && text == word) return result;
    allowed += (allowed.empty() ? "\"" : " or \"") + std::string(word) + "\"";
  }
  if (!is_text) throw TypeMismatch(sentence(op, name, allowed, kind_of(value)));
  throw std::invalid_argument(sentence(op, name, allowed, "\"" + text + "\""));
}

}  // namespace subquad::python
