#include "../../csrc/cuda/modulation.cuh"

#include "export.h"

using namespace mmkern;

EXPORT_KERNELS(MMKERN_MODULATION_KERNELS)
