// How a kernel is called: the tensors as address, sizes, strides and dtype, the scalars by value.
//
// Every CPU kernel has the type Kernel, so a family adds a table of KernelEntry and nothing else to the bindings.
#pragma once

#include <stdint.h>

namespace mmkern {

enum class Dtype : int { float32, float64, bfloat16, float16, int64, boolean, none };

constexpr int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::none                               ? 0
         : dtype == Dtype::boolean                          ? 1
         : dtype == Dtype::float32                          ? 4
         : dtype == Dtype::float64 || dtype == Dtype::int64 ? 8
                                                            : 2;
}

constexpr bool is_floating(Dtype dtype) { return dtype < Dtype::int64; }

constexpr int kMaxRank = 12;
constexpr int kMaxTensors = 24;
constexpr int kMaxScalars = 8;

struct View {
  void* data = nullptr;  // null where the argument was None
  Dtype dtype = Dtype::none;
  int rank = 0;
  int64_t sizes[kMaxRank];
  int64_t strides[kMaxRank];  // in elements

  explicit operator bool() const { return data != nullptr; }
};

struct Call {
  View tensors[kMaxTensors];
  double scalars[kMaxScalars];
  int threads = 1;

  const View& operator[](int i) const { return tensors[i]; }
};

using Kernel = void (*)(const Call&);

struct KernelEntry {
  const char* name;
  const char* parameters;  // "x: *D, positive curvature, out: *D"; bindings/signature.h has the grammar
  Kernel kernel;
};

// What a family hands to the bindings at one ISA level.
struct KernelTable {
  const KernelEntry* entries;
  int count;
};

}  // namespace mmkern
