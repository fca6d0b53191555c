// The modulation family on CUDA: the list of its kernels; see hyperbolic.cuh. Who launches what:
// mmkern/backends/cuda_modulation.py.
#pragma once

#include "adaptive_norm.cuh"
#include "adaptive_norm_backward.cuh"

#define MMKERN_ADAPTIVE_NORM_KERNELS(KERNEL, ...)                                                                      \
  KERNEL(adaptive_norm<__VA_ARGS__>)                                                                                   \
  KERNEL(adaptive_norm_backward<__VA_ARGS__>)
#define MMKERN_ADAPTIVE_NORM_IN_VECTORS(KERNEL, ACCESS)                                                                \
  MMKERN_ADAPTIVE_NORM_KERNELS(KERNEL, ACCESS, 1)                                                                      \
  MMKERN_ADAPTIVE_NORM_KERNELS(KERNEL, ACCESS, 2)                                                                      \
  MMKERN_ADAPTIVE_NORM_KERNELS(KERNEL, ACCESS, 0)

#define MMKERN_MODULATION_KERNELS(KERNEL)                                                                              \
  MMKERN_ADAPTIVE_NORM_IN_VECTORS(KERNEL, Float32Vectors)                                                              \
  MMKERN_ADAPTIVE_NORM_IN_VECTORS(KERNEL, Bfloat16Vectors)                                                             \
  MMKERN_ADAPTIVE_NORM_IN_VECTORS(KERNEL, Float16Vectors)                                                              \
  MMKERN_ADAPTIVE_NORM_KERNELS(KERNEL, OneByOne, 1)                                                                    \
  MMKERN_ADAPTIVE_NORM_KERNELS(KERNEL, OneByOne, 0)
