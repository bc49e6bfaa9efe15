/// Atomic functions. They are real ones, because blocks may run on several OS threads.
#pragma once
#include <cstring>
#include <type_traits>

#include "emulator/language.h"

namespace emulator {

template <class T, class F>
T exchange_atomically(T* p, F next) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  Bits* bits = reinterpret_cast<Bits*>(p);
  Bits before = __atomic_load_n(bits, __ATOMIC_RELAXED), after;
  T value;
  do {
    std::memcpy(&value, &before, sizeof(T));
    const T changed = next(value);
    std::memcpy(&after, &changed, sizeof(T));
  } while (!__atomic_compare_exchange_n(bits, &before, after, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
  return value;
}

/// So that the type of *p alone decides the function.
template <class T>
using Plain = std::common_type_t<T>;

}  // namespace emulator

// Sums of signed integers wrap around.
template <class T>
T atomicAdd(T* p, emulator::Plain<T> x) {
  return emulator::exchange_atomically(p, [x](T old) {
    if constexpr (std::is_integral_v<T>)
      return T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(x));
    else
      return old + x;
  });
}

template <class T>
T atomicSub(T* p, emulator::Plain<T> x) {
  static_assert(std::is_integral_v<T>);
  return emulator::exchange_atomically(
      p, [x](T old) { return T(std::make_unsigned_t<T>(old) - std::make_unsigned_t<T>(x)); });
}

template <class T>
T atomicMin(T* p, emulator::Plain<T> x) {
  static_assert(std::is_integral_v<T>);
  return emulator::exchange_atomically(p, [x](T old) { return x < old ? x : old; });
}

template <class T>
T atomicMax(T* p, emulator::Plain<T> x) {
  static_assert(std::is_integral_v<T>);
  return emulator::exchange_atomically(p, [x](T old) { return old < x ? x : old; });
}

template <class T>
T atomicAnd(T* p, emulator::Plain<T> x) {
  return emulator::exchange_atomically(p, [x](T old) { return T(old & x); });
}

template <class T>
T atomicOr(T* p, emulator::Plain<T> x) {
  return emulator::exchange_atomically(p, [x](T old) { return T(old | x); });
}

template <class T>
T atomicXor(T* p, emulator::Plain<T> x) {
  return emulator::exchange_atomically(p, [x](T old) { return T(old ^ x); });
}

template <class T>
T atomicExch(T* p, emulator::Plain<T> x) {
  return emulator::exchange_atomically(p, [x](T) { return x; });
}

template <class T>
T atomicCAS(T* p, emulator::Plain<T> expected, emulator::Plain<T> x) {
  static_assert(std::is_integral_v<T>);
  return emulator::exchange_atomically(p, [expected, x](T old) { return old == expected ? x : old; });
}
