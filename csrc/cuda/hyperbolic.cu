// The hyperbolic family compiled by nvcc.
#include "hyperbolic.cuh"

#include "kernel_table.h"

MMKERN_DEVICE_KERNEL_TABLE(hyperbolic_device_kernels, MMKERN_HYPERBOLIC_KERNELS)
