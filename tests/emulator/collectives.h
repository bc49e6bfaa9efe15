/// Barriers and the functions that the lanes of a warp call together.
#pragma once
#include <cstring>
#include <type_traits>

#include "emulator/block.h"

namespace emulator {

/// The place of a call: as a default argument it is the caller's.
struct Caller {
  const char* file;
  int line;
  Site in(const char* what) const { return {what, file, line}; }
};

template <class T>
uint64_t to_word(T x) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  std::memcpy(&word, &x, sizeof(T));
  return word;
}

template <class T>
T from_word(uint64_t word) {
  T x;
  std::memcpy(&x, &word, sizeof(T));
  return x;
}

/// The first lane of the caller's group of `width` lanes.
inline int group_of_lane(int width) {
  if (width < 1 || width > 32 || (width & (width - 1))) die("a shuffle's width is not a power of two up to 32");
  return int(running->self->lane) & ~(width - 1);
}

template <class T>
T shuffle(unsigned mask, T x, int source, Site site) {
  const uint64_t word = to_word(x);
  const auto& words = wait_for_warp(mask, &word, 1, site);
  if (!(lanes_of(mask) >> source & 1)) die("a shuffle reads a lane outside its mask");
  return from_word<T>(words[source][0]);
}

/// Every lane gets f over the lanes' values.
template <class T, T (*f)(T, T)>
T reduce(unsigned mask, T x, Site site) {
  static_assert(sizeof(T) == 4 && std::is_integral_v<T>, "only integers of 32 bits are reduced");
  const uint64_t word = to_word(x);
  return from_word<T>(wait_for_warp(mask, &word, 1, site, [](WarpMeeting::Words& words, unsigned lanes) {
    uint64_t result = words[__builtin_ctz(lanes)][0];
    for (unsigned m = lanes & (lanes - 1); m; m &= m - 1)
      result = to_word(f(from_word<T>(result), from_word<T>(words[__builtin_ctz(m)][0])));
    for (unsigned m = lanes; m; m &= m - 1) words[__builtin_ctz(m)][0] = result;
  })[running->self->lane][0]);
}

inline unsigned ballot(unsigned mask, bool vote, Site site) {
  const uint64_t word = vote;
  return unsigned(wait_for_warp(mask, &word, 1, site, [](WarpMeeting::Words& words, unsigned lanes) {
    uint64_t votes = 0;
    for (unsigned lane = 0; lane < kLanes; ++lane)
      if (lanes >> lane & 1) votes |= words[lane][0] << lane;
    for (unsigned lane = 0; lane < kLanes; ++lane) words[lane][0] = votes;
  })[running->self->lane][0]);
}

template <class T>
unsigned match(unsigned mask, T x, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  const uint64_t word = to_word(x);
  const auto& words = wait_for_warp(mask, &word, 1, site);
  unsigned equal = 0;
  for (unsigned m = lanes_of(mask); m; m &= m - 1)
    if (words[__builtin_ctz(m)][0] == word) equal |= m & -m;
  return equal;
}

}  // namespace emulator

#define EMULATOR_CALLER ::emulator::Caller caller = {__builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(EMULATOR_CALLER) { emulator::wait_for_block(false, caller.in("__syncthreads")); }

inline int __syncthreads_count(int vote, EMULATOR_CALLER) {
  return int(emulator::wait_for_block(vote != 0, caller.in("__syncthreads_count")).yes);
}

inline int __syncthreads_and(int vote, EMULATOR_CALLER) {
  const emulator::Votes votes = emulator::wait_for_block(vote != 0, caller.in("__syncthreads_and"));
  return votes.yes == votes.all;
}

inline int __syncthreads_or(int vote, EMULATOR_CALLER) {
  return emulator::wait_for_block(vote != 0, caller.in("__syncthreads_or")).yes != 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_CALLER) {
  emulator::wait_for_warp(mask, nullptr, 0, caller.in("__syncwarp"));
}

// Blocks on several OS threads see each other's writes in the order that a fence demands.
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32, EMULATOR_CALLER) {
  const int first = emulator::group_of_lane(width);
  return emulator::shuffle(mask, x, first + (source & (width - 1)), caller.in("__shfl_sync"));
}

// Lanes whose source would lie outside their group get their own value.
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned step, int width = 32, EMULATOR_CALLER) {
  const int first = emulator::group_of_lane(width), lane = int(emulator::running->self->lane);
  const int source = lane - int(step & 31);
  return emulator::shuffle(mask, x, source < first ? lane : source, caller.in("__shfl_up_sync"));
}

template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned step, int width = 32, EMULATOR_CALLER) {
  const int first = emulator::group_of_lane(width), lane = int(emulator::running->self->lane);
  const int source = lane + int(step & 31);
  return emulator::shuffle(mask, x, source >= first + width ? lane : source, caller.in("__shfl_down_sync"));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32, EMULATOR_CALLER) {
  const int first = emulator::group_of_lane(width), lane = int(emulator::running->self->lane);
  const int source = lane ^ (bits & 31);
  return emulator::shuffle(mask, x, source >= first + width ? lane : source, caller.in("__shfl_xor_sync"));
}

inline unsigned __ballot_sync(unsigned mask, int vote, EMULATOR_CALLER) {
  return emulator::ballot(mask, vote != 0, caller.in("__ballot_sync"));
}

inline int __any_sync(unsigned mask, int vote, EMULATOR_CALLER) {
  return emulator::ballot(mask, vote != 0, caller.in("__any_sync")) != 0;
}

inline int __all_sync(unsigned mask, int vote, EMULATOR_CALLER) {
  return emulator::ballot(mask, vote != 0, caller.in("__all_sync")) == emulator::lanes_of(mask);
}

/// The lanes that hold the same bits.
template <class T>
unsigned __match_any_sync(unsigned mask, T x, EMULATOR_CALLER) {
  return emulator::match(mask, x, caller.in("__match_any_sync"));
}

namespace emulator {

template <class T>
T sum_of(T a, T b) {
  return T(unsigned(a) + unsigned(b));
}
template <class T>
T least_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T greatest_of(T a, T b) {
  return a < b ? b : a;
}
inline unsigned bits_in_both(unsigned a, unsigned b) { return a & b; }
inline unsigned bits_in_either(unsigned a, unsigned b) { return a | b; }

}  // namespace emulator

template <class T>
T __reduce_add_sync(unsigned mask, T x, EMULATOR_CALLER) {
  return emulator::reduce<T, emulator::sum_of<T>>(mask, x, caller.in("__reduce_add_sync"));
}

template <class T>
T __reduce_min_sync(unsigned mask, T x, EMULATOR_CALLER) {
  return emulator::reduce<T, emulator::least_of<T>>(mask, x, caller.in("__reduce_min_sync"));
}

template <class T>
T __reduce_max_sync(unsigned mask, T x, EMULATOR_CALLER) {
  return emulator::reduce<T, emulator::greatest_of<T>>(mask, x, caller.in("__reduce_max_sync"));
}

inline unsigned __reduce_and_sync(unsigned mask, unsigned x, EMULATOR_CALLER) {
  return emulator::reduce<unsigned, emulator::bits_in_both>(mask, x, caller.in("__reduce_and_sync"));
}

inline unsigned __reduce_or_sync(unsigned mask, unsigned x, EMULATOR_CALLER) {
  return emulator::reduce<unsigned, emulator::bits_in_either>(mask, x, caller.in("__reduce_or_sync"));
}
