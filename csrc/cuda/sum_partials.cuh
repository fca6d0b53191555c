// The last step of every sum over all blocks.
#pragma once

#include "lanes.cuh"

namespace mmkern {
inline namespace device {

// The partial sums of the blocks, one block, in a fixed order.
struct SumArgs {
  const float* partials;
  float* total;
  i64 count;
};

__global__ void __launch_bounds__(kMaxLanes, 1) sum_partials(const SumArgs a) {
  float sum = 0;
  for (i64 i = threadIdx.x; i < a.count; i += blockDim.x) sum += a.partials[i];
  sum = sum_over_block(sum);
  if (threadIdx.x == 0) *a.total = sum;
}

}  // namespace device
}  // namespace mmkern
