// Tensors whose memory is a block of the pool.
#pragma once

#include "tensor.h"

namespace mmkern {

// A contiguous tensor with the sizes and the dtype of `view`, of any content; null where torch should allocate: below
// the pool's threshold, or where its limit or the system refuses.
py::object pool_tensor(const View& view);

}  // namespace mmkern
