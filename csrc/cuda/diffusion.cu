// The diffusion family compiled by nvcc.
#include "diffusion.cuh"

#include "kernel_table.h"

MMKERN_DEVICE_KERNEL_TABLE(diffusion_device_kernels, MMKERN_DIFFUSION_KERNELS)
