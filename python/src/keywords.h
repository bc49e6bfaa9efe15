/// The keywords of one call as a dict: every getter names the argument in its error.
#pragma once
#include "array.h"
#include "subquad/options.h"
#include "values.h"

namespace subquad::python {

class Keywords {
 public:
  Keywords(const char* op, Border& border, const nb::dict& given) : op_(op), border_(border), given_(given) {}

  nb::handle at(const char* name) const { return nb::handle(given_[name]); }
  ConstTensor array(const char* name) const { return border_.in(name, at(name)); }
  int64_t integer(const char* name) const { return python::integer(op_, name, at(name)); }
  double number(const char* name) const { return python::number(op_, name, at(name)); }
  bool boolean(const char* name) const { return python::boolean(op_, name, at(name)); }
  Seed seed() const { return border_.seed(at("seed")); }

  template <class T>
  T choice(const char* name, std::initializer_list<std::pair<const char*, T>> choices) const {
    return python::choice<T>(op_, name, at(name), choices);
  }

  /// The softmax scale: None is 0, which the core takes for its default; a given one must be above 0.
  double scale(const char* name = "scale") const {
    if (at(name).is_none()) return 0;
    const double value = number(name);
    if (!(value > 0) || value > 1.79769e308)
      throw std::invalid_argument(sentence(op_, name, "a finite number above 0", nb::str(at(name)).c_str()));
    return value;
  }

 private:
  const char* op_;
  Border& border_;
  const nb::dict& given_;
};

inline Features features_of(const char* op, nb::handle value) {
  return choice<Features>(op, "features", value,
                          {{"positive", Features::positive},
                           {"trig", Features::trig},
                           {"hyperbolic", Features::hyperbolic},
                           {"relu", Features::relu},
                           {"elu", Features::elu}});
}

inline Mis mis_of(const char* op, nb::handle value) {
  return choice<Mis>(op, "mis", value, {{"opt", Mis::opt}, {"bh", Mis::bh}, {"biased", Mis::biased}});
}

inline std::string dtype_name(DType dtype) {
  static const char* const names[] = {"none",  "float32", "float16", "bfloat16", "int64",
                                      "int32", "uint16",  "uint8",   "bool"};
  return names[int(dtype)];
}

/// The core takes arrays of several dtypes; Python's contract is one dtype for all of a call. Missing ones are skipped.
inline void same_dtype(const char* op, std::initializer_list<std::pair<const char*, const ConstTensor*>> arrays) {
  const ConstTensor& first = *arrays.begin()->second;
  for (const auto& [name, array] : arrays)
    if (array->defined() && first.defined() && array->dtype != first.dtype)
      throw TypeMismatch(sentence(op, name, "dtype " + dtype_name(first.dtype), dtype_name(array->dtype)));
}

}  // namespace subquad::python
