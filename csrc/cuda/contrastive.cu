// The contrastive family compiled by nvcc.
#include "contrastive.cuh"

#include "kernel_table.h"

MMKERN_DEVICE_KERNEL_TABLE(contrastive_device_kernels, MMKERN_CONTRASTIVE_KERNELS)
