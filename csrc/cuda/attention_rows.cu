// The row-wise companions of attention compiled by nvcc.
#include "attention_rows.cuh"

#include "kernel_table.h"

MMKERN_DEVICE_KERNEL_TABLE(attention_rows_device_kernels, MMKERN_ATTENTION_ROWS_KERNELS)
