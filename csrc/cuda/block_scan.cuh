// What the threads of one block add up, and the largest of their numbers. All of them call these.
#pragma once

#include "device.cuh"

namespace mmkern {
inline namespace device {

using u64 = unsigned long long;

constexpr int kScanThreads = 256, kScanWarps = kScanThreads / kWarp;  // of blocks that scan

// The sum of what the threads before this one have; `total` becomes that of all.
MMKERN_FN u64 scan_block(u64 x, u64& total) {
  __shared__ u64 of_warps[kScanWarps];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  u64 up_to_here = x;
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const u64 before = __shfl_up_sync(kAllLanes, up_to_here, lanes);
    if (lane >= lanes) up_to_here += before;
  }
  if (lane == kWarp - 1) of_warps[warp] = up_to_here;
  __syncthreads();
  u64 before = up_to_here - x;
  total = 0;
  for (int w = 0; w < kScanWarps; ++w) {
    if (w < warp) before += of_warps[w];
    total += of_warps[w];
  }
  __syncthreads();
  return before;
}

MMKERN_FN u64 sum_of_block(u64 x) {
  u64 total;
  scan_block(x, total);
  return total;
}

// The largest number, and of equal ones the first place.
struct Leader {
  float value;
  int place;

  MMKERN_FN void take(float other, int at) {
    if (other > value || (other == value && at < place)) value = other, place = at;
  }
};
MMKERN_FN Leader leader_of_warp(Leader mine) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const float value = __shfl_xor_sync(kAllLanes, mine.value, lanes);
    const int place = __shfl_xor_sync(kAllLanes, mine.place, lanes);
    mine.take(value, place);
  }
  return mine;
}
// Of kThreads threads.
template <int kThreads>
MMKERN_FN Leader leader_of_block(Leader mine) {
  __shared__ Leader of_warps[kThreads / kWarp];
  mine = leader_of_warp(mine);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  for (int w = 0; w < kThreads / kWarp; ++w) mine.take(of_warps[w].value, of_warps[w].place);
  __syncthreads();
  return mine;
}

}  // namespace device
}  // namespace mmkern
