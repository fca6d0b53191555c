// The attention family compiled by nvcc.
#include "attention.cuh"

#include "kernel_table.h"

MMKERN_DEVICE_KERNEL_TABLE(attention_device_kernels, MMKERN_ATTENTION_KERNELS)
