// The hyperbolic family compiled by nvcc.
#include "hyperbolic.cuh"

#include "kernel_table.h"

namespace mmkern {
namespace {

template <class Args>
DeviceKernel kernel(const char* name, void (*function)(Args)) {
  return {name, reinterpret_cast<const void*>(function), int(sizeof(Args))};
}

}  // namespace

DeviceKernelTable hyperbolic_device_kernels() {
#define MMKERN_ENTRY(...) kernel(#__VA_ARGS__, __VA_ARGS__),
  static const DeviceKernel entries[] = {MMKERN_HYPERBOLIC_KERNELS(MMKERN_ENTRY)};
#undef MMKERN_ENTRY
  return {entries, int(sizeof entries / sizeof entries[0])};
}

}  // namespace mmkern
