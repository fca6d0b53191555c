#include "../../csrc/cuda/diffusion.cuh"

#include "export.h"

using namespace mmkern;

EXPORT_KERNELS(MMKERN_DIFFUSION_KERNELS)
