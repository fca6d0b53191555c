#include "../../csrc/cuda/attention.cuh"

#include "export.h"

using namespace mmkern;

EXPORT_KERNELS(MMKERN_ATTENTION_KERNELS)
