// The diffusion family on CUDA: the list of its kernels; see hyperbolic.cuh. Who launches what:
// mmkern/backends/cuda_diffusion.py.
#pragma once

#include "denoise_step.cuh"
#include "guidance_rescale.cuh"

#define MMKERN_DENOISE_STEP_KERNELS(KERNEL, ACCESS)                                                                    \
  KERNEL(denoise_step<ACCESS>)                                                                                         \
  KERNEL(measure_outputs<ACCESS>)

#define MMKERN_DIFFUSION_KERNELS(KERNEL)                                                                               \
  MMKERN_DENOISE_STEP_KERNELS(KERNEL, Float32Vectors)                                                                  \
  MMKERN_DENOISE_STEP_KERNELS(KERNEL, Bfloat16Vectors)                                                                 \
  MMKERN_DENOISE_STEP_KERNELS(KERNEL, Float16Vectors)                                                                  \
  MMKERN_DENOISE_STEP_KERNELS(KERNEL, EightNeighbours)                                                                 \
  MMKERN_DENOISE_STEP_KERNELS(KERNEL, OneByOne)                                                                        \
  KERNEL(find_factors)
