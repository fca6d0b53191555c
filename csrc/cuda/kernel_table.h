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

DeviceKernelTable attention_device_kernels();
DeviceKernelTable attention_rows_device_kernels();
DeviceKernelTable contrastive_device_kernels();
DeviceKernelTable decoding_device_kernels();
DeviceKernelTable diffusion_device_kernels();
DeviceKernelTable hyperbolic_device_kernels();
DeviceKernelTable modulation_device_kernels();

template <class Args>
DeviceKernel device_kernel(const char* name, void (*function)(Args)) {
  return {name, reinterpret_cast<const void*>(function), int(sizeof(Args))};
}

}  // namespace mmkern

#define MMKERN_DEVICE_KERNEL(...) mmkern::device_kernel(#__VA_ARGS__, __VA_ARGS__),
#define MMKERN_DEVICE_KERNEL_TABLE(function, LIST)                                                                     \
  mmkern::DeviceKernelTable mmkern::function() {                                                                       \
    static const DeviceKernel entries[] = {LIST(MMKERN_DEVICE_KERNEL)};                                                \
    return {entries, int(sizeof entries / sizeof entries[0])};                                                         \
  }
