/// The errors a call can raise; all of them before any work has begun.
///
/// One grammar: `[lara_attention] key_mask: expected shape [B, M] = [2, 512], got [2, 511]`.
/// Wrong shapes and values are std::invalid_argument itself.
#pragma once
#include <stdexcept>

#include "subquad/queue.h"

namespace subquad {

/// The wrong kind of object: a dtype, a device, arrays that do not belong together.
class SUBQUAD_API TypeMismatch : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// Right arguments, but no kernel for this combination on this device.
class SUBQUAD_API Unsupported : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The device reported a failure while the operator was being launched.
class SUBQUAD_API DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace subquad
