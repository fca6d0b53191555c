#include "../../csrc/cuda/decoding.cuh"

#include "export.h"

using namespace mmkern;

EXPORT_KERNELS(MMKERN_DECODING_KERNELS)
