// The decoding family on CUDA: the list of its kernels; see hyperbolic.cuh. Who launches what:
// mmkern/backends/cuda_decoding.py, cuda_masked_decode.py, cuda_absorbing.py and cuda_ctc.py.
#pragma once

#include "absorbing_step.cuh"
#include "ctc_beam.cuh"
#include "ctc_greedy.cuh"
#include "masked_decode.cuh"
#include "sample_tokens.cuh"

#define MMKERN_DECODING_KERNELS(KERNEL)                                                                                \
  KERNEL(sample_tokens)                                                                                                \
  KERNEL(draw_masked)                                                                                                  \
  KERNEL(mask_again) KERNEL(absorbing_step) KERNEL(best_labels) KERNEL(collapse_repeats) KERNEL(ctc_beam_decode)
