#include "../../csrc/cuda/contrastive.cuh"

#include "export.h"

using namespace mmkern;

EXPORT_KERNELS(MMKERN_CONTRASTIVE_KERNELS)
