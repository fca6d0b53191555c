// The modulation family on CUDA: the list of its kernels; see hyperbolic.cuh. Who launches what:
// mmkern/backends/cuda_modulation.py, cuda_gated.py and cuda_group_norm.py.
#pragma once

#include "adaptive_norm.cuh"
#include "adaptive_norm_backward.cuh"
#include "affine_activation.cuh"
#include "gated_activation.cuh"
#include "group_norm.cuh"

#define MMKERN_ADAPTIVE_NORM_KERNELS(KERNEL, ...)                                                                      \
  KERNEL(adaptive_norm<__VA_ARGS__>)                                                                                   \
  KERNEL(adaptive_norm_backward<__VA_ARGS__>)
#define MMKERN_ADAPTIVE_NORM_IN_VECTORS(KERNEL, ACCESS)                                                                \
  MMKERN_ADAPTIVE_NORM_KERNELS(KERNEL, ACCESS, 1)                                                                      \
  MMKERN_ADAPTIVE_NORM_KERNELS(KERNEL, ACCESS, 2)                                                                      \
  MMKERN_ADAPTIVE_NORM_KERNELS(KERNEL, ACCESS, 0)

#define MMKERN_AFFINE_ACTIVATION_KERNELS(KERNEL, ACCESS)                                                               \
  KERNEL(affine_activation<ACCESS>)                                                                                    \
  KERNEL(affine_activation_backward<ACCESS>)
#define MMKERN_GATED_ACTIVATION_KERNELS(KERNEL, ACCESS)                                                                \
  KERNEL(gated_activation<ACCESS>)                                                                                     \
  KERNEL(gated_activation_backward<ACCESS>)

#define MMKERN_GROUP_NORM_KERNELS(KERNEL, ACCESS)                                                                      \
  KERNEL(group_norm_act<ACCESS, 5>)                                                                                    \
  KERNEL(group_norm_act<ACCESS, 10>)                                                                                   \
  KERNEL(group_norm_act<ACCESS, 0>)                                                                                    \
  KERNEL(group_norm_act_backward<ACCESS, 5>)                                                                           \
  KERNEL(group_norm_act_backward<ACCESS, 0>)

#define MMKERN_MODULATION_KERNELS(KERNEL)                                                                              \
  MMKERN_ADAPTIVE_NORM_IN_VECTORS(KERNEL, Float32Vectors)                                                              \
  MMKERN_ADAPTIVE_NORM_IN_VECTORS(KERNEL, Bfloat16Vectors)                                                             \
  MMKERN_ADAPTIVE_NORM_IN_VECTORS(KERNEL, Float16Vectors)                                                              \
  MMKERN_ADAPTIVE_NORM_KERNELS(KERNEL, OneByOne, 1)                                                                    \
  MMKERN_ADAPTIVE_NORM_KERNELS(KERNEL, OneByOne, 0)                                                                    \
  MMKERN_AFFINE_ACTIVATION_KERNELS(KERNEL, Float32Vectors)                                                             \
  MMKERN_AFFINE_ACTIVATION_KERNELS(KERNEL, Bfloat16Vectors)                                                            \
  MMKERN_AFFINE_ACTIVATION_KERNELS(KERNEL, Float16Vectors)                                                             \
  MMKERN_AFFINE_ACTIVATION_KERNELS(KERNEL, EightNeighbours)                                                            \
  MMKERN_AFFINE_ACTIVATION_KERNELS(KERNEL, OneByOne)                                                                   \
  MMKERN_GATED_ACTIVATION_KERNELS(KERNEL, Float32Vectors)                                                              \
  MMKERN_GATED_ACTIVATION_KERNELS(KERNEL, Bfloat16Vectors)                                                             \
  MMKERN_GATED_ACTIVATION_KERNELS(KERNEL, Float16Vectors)                                                              \
  MMKERN_GATED_ACTIVATION_KERNELS(KERNEL, OneByOne)                                                                    \
  MMKERN_GROUP_NORM_KERNELS(KERNEL, Float32Vectors)                                                                    \
  MMKERN_GROUP_NORM_KERNELS(KERNEL, Bfloat16Vectors)                                                                   \
  MMKERN_GROUP_NORM_KERNELS(KERNEL, Float16Vectors)                                                                    \
  MMKERN_GROUP_NORM_KERNELS(KERNEL, OneByOne)
