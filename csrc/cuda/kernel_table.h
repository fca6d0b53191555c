// What a family's .cu hands to the bindings: its kernels, by the names that mmkern/backends uses.
#pragma once

namespace mmkern {

struct DeviceKernel {
  const char* name;
  const void* function;
  int argument_bytes;  // of the one struct that it takes
};

struct DeviceKernelTable {
  const DeviceKernel* entries;
  int count;
};

DeviceKernelTable hyperbolic_device_kernels();

}  // namespace mmkern
