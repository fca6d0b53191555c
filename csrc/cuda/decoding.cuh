// The decoding family on CUDA: the list of its kernels; see hyperbolic.cuh. Who launches what:
// mmkern/backends/cuda_decoding.py.
#pragma once

#include "sample_tokens.cuh"

#define MMKERN_DECODING_KERNELS(KERNEL) KERNEL(sample_tokens)
