/// The binary interface of DLPack 1.x, as much of it as a consumer of arrays needs.
///
/// Source: the DLPack specification, version 1.3, and its C exchange interface, which a Python type offers as the
/// capsule "dlpack_exchange_api" under the attribute `__dlpack_c_exchange_api__`.
#pragma once
#include <cstdint>

namespace subquad::python::dlpack {

/// Layouts may change with the major version only.
struct Version {
  uint32_t major, minor;
};
inline constexpr uint32_t kMajorVersion = 1;

struct Device {
  int32_t type, index;
};
inline constexpr int32_t kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13;

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
inline constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6;

struct Tensor {
  void* data;
  Device device;
  int32_t rank;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  ///< in elements; before version 1.2 null meant contiguous
  uint64_t byte_offset;
};

/// The content of a capsule "dltensor".
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed* self);
};

/// The content of a capsule "dltensor_versioned".
struct ManagedVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned* self);
  uint64_t flags;
  Tensor tensor;
};
inline constexpr uint64_t kReadOnly = 1, kIsCopied = 2;

/// What a framework offers to C code. Functions return 0, or -1 with a Python exception set; `allocate` reports through
/// `set_error` instead.
struct ExchangeApi {
  Version version;
  const ExchangeApi* previous;  ///< an older major version, or null
  int (*allocate)(Tensor* prototype, ManagedVersioned** out, void* error,
                  void (*set_error)(void* error, const char* kind, const char* message));
  int (*export_managed)(void* object, ManagedVersioned** out);
  int (*import_managed)(ManagedVersioned* tensor, void** object);
  int (*view)(void* object, Tensor* out);  ///< borrows; may be null
  int (*current_stream)(int32_t device_type, int32_t device_index, void** stream);
};

}  // namespace subquad::python::dlpack
