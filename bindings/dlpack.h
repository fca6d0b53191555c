// DLPack's C interface (https://dmlc.github.io/dlpack/latest/c_api.html), the parts that CPU tensors need.
#pragma once

#include <cstdint>

namespace mmkern::dlpack {

struct Device {
  int32_t type;
  int32_t id;
};
constexpr Device kCpu = {1, 0};

enum Code : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6 };

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t rank;
  DataType dtype;
  int64_t* sizes;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  Tensor tensor;
};
constexpr Version kVersion = {1, 0};  // the first with this ManagedTensor

constexpr const char* kCapsule = "dltensor_versioned";  // the consumer renames it once the tensor is its own

// What a library offers to C, as the capsule `__dlpack_c_exchange_api__` of its tensor type, since version 1.3.
struct Exchange {
  Version version;
  Exchange* older;
  void* unused[2];
  int (*to_python)(ManagedTensor* from, void** python_tensor);  // takes `from` over
  int (*borrow)(void* python_tensor, Tensor* to);  // valid while the Python tensor lives and is not resized
};

constexpr const char* kExchangeAttribute = "__dlpack_c_exchange_api__";
constexpr const char* kExchangeCapsule = "dlpack_exchange_api";

}  // namespace mmkern::dlpack
