#include "../../csrc/cuda/hyperbolic.cuh"

#include "export.h"

using namespace mmkern;

EXPORT_KERNELS(MMKERN_HYPERBOLIC_KERNELS)
