// The attention family on CUDA, and the list of its kernels; see hyperbolic.cuh.
#pragma once

#include "attention_forward.cuh"

#define MMKERN_ATTENTION_OF_TYPE(KERNEL, T) KERNEL(attention<T, 64>) KERNEL(attention<T, 128>) KERNEL(attention<T, 256>)

#define MMKERN_ATTENTION_KERNELS(KERNEL)                                                                               \
  MMKERN_ATTENTION_OF_TYPE(KERNEL, Float32)                                                                            \
  MMKERN_ATTENTION_OF_TYPE(KERNEL, Bfloat16)                                                                           \
  MMKERN_ATTENTION_OF_TYPE(KERNEL, Float16)                                                                            \
  KERNEL(merge_attention)
