// The diffusion family on CUDA: the list of its kernels; see hyperbolic.cuh. Who launches what:
// mmkern/backends/cuda_diffusion.py.
#pragma once

#include "denoise_step.cuh"
#include "denoising_loss.cuh"
#include "guidance_rescale.cuh"

#define MMKERN_DIFFUSION_KERNELS_OF(KERNEL, ACCESS)                                                                    \
  KERNEL(denoise_step<ACCESS>)                                                                                         \
  KERNEL(measure_outputs<ACCESS>)                                                                                      \
  KERNEL(masked_squared_error<ACCESS>)                                                                                 \
  KERNEL(masked_squared_error_backward<ACCESS>)

#define MMKERN_DIFFUSION_KERNELS(KERNEL)                                                                               \
  MMKERN_DIFFUSION_KERNELS_OF(KERNEL, Float32Vectors)                                                                  \
  MMKERN_DIFFUSION_KERNELS_OF(KERNEL, Bfloat16Vectors)                                                                 \
  MMKERN_DIFFUSION_KERNELS_OF(KERNEL, Float16Vectors)                                                                  \
  MMKERN_DIFFUSION_KERNELS_OF(KERNEL, EightNeighbours)                                                                 \
  MMKERN_DIFFUSION_KERNELS_OF(KERNEL, OneByOne)                                                                        \
  KERNEL(find_factors)
