// The decoding family compiled by nvcc.
#include "decoding.cuh"

#include "kernel_table.h"

MMKERN_DEVICE_KERNEL_TABLE(decoding_device_kernels, MMKERN_DECODING_KERNELS)
