/// Asynchronous copies: they land when issued or when their thread waits for them, never by themselves.
#pragma once
#include <cstring>

#include "emulator/cuda.h"

namespace emulator {

inline void land(const PendingCopy& copy) {
  std::memcpy(copy.to, copy.from, size_t(copy.bytes));
  std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, size_t(16 - copy.bytes));
}

inline void copy_async16(void* to, const void* from, int bytes) {
  const bool aligned = !(reinterpret_cast<uintptr_t>(to) & 15) && !(bytes && reinterpret_cast<uintptr_t>(from) & 15);
  if (!aligned) die("an asynchronous copy is not aligned to 16 bytes");
  if (bytes < 0 || bytes > 16) die("an asynchronous copy of fewer than 0 or more than 16 bytes");
  const PendingCopy copy = {to, bytes ? from : to, bytes, running->self->copy_group};
  const bool now =
      running->landing == Landing::random ? running->random() >> 16 & 1 : running->landing == Landing::early;
  if (now)
    land(copy);
  else
    running->self->copies.push_back(copy);
}

inline void copy_async_commit() { ++running->self->copy_group; }

/// Lands all but the `newest` groups, and what no commit has closed.
inline void copy_async_wait(int newest) {
  Thread& self = *running->self;
  size_t kept = 0;
  for (const PendingCopy& copy : self.copies) {
    if (copy.group < self.copy_group - newest)
      land(copy);
    else
      self.copies[kept++] = copy;
  }
  self.copies.resize(kept);
}

}  // namespace emulator
