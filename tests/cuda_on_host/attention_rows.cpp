#include "../../csrc/cuda/attention_rows.cuh"

#include "export.h"

using namespace mmkern;

EXPORT_KERNELS(MMKERN_ATTENTION_ROWS_KERNELS)
