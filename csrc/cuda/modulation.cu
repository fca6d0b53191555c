// The modulation family compiled by nvcc.
#include "modulation.cuh"

#include "kernel_table.h"

MMKERN_DEVICE_KERNEL_TABLE(modulation_device_kernels, MMKERN_MODULATION_KERNELS)
