// Lanes that share a row: which columns each has in its registers, and their sums.
#pragma once

#include "device.cuh"

namespace mmkern {
inline namespace device {

constexpr int kColumns = 8;  // of a row, in a lane's registers
// That share a row. Bounds say one block a multiprocessor: left to itself ptxas rounds registers down and spills.
constexpr int kMaxLanes = 512;

// Which columns of a chunk a lane holds. Columns are counted in int, as addresses within a row then take few registers.
struct Columns {
  int first, cols;
  int lane, lanes, vectors;
  Dtype dtype;

  MMKERN_FN int chunk() const { return lanes * kColumns; }

  MMKERN_FN void load(float (&v)[kColumns], const void* base, i64 row_offset) const {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) v[k] = 0;
    const char* row = static_cast<const char*>(base) + row_offset * bytes_of(dtype);
    if (!vectors) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const int col = first + k * lanes + lane;
        if (col < cols) v[k] = load_one(row, col, dtype);
      }
    } else if (dtype == kFloat32) {
#pragma unroll
      for (int k = 0; k < kColumns; k += 4) {
        const int col = first + (k / 4 * lanes + lane) * 4;
        if (col < cols) load_four(v + k, row + col * 4);
      }
    } else {
      const int col = first + lane * 8;
      if (col < cols) load_eight(v, row + col * 2, dtype);
    }
  }

  MMKERN_FN void store(const float (&v)[kColumns], void* base, i64 row_offset) const {
    char* row = static_cast<char*>(base) + row_offset * bytes_of(dtype);
    if (!vectors) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const int col = first + k * lanes + lane;
        if (col < cols) store_one(row, col, v[k], dtype);
      }
    } else if (dtype == kFloat32) {
#pragma unroll
      for (int k = 0; k < kColumns; k += 4) {
        const int col = first + (k / 4 * lanes + lane) * 4;
        if (col < cols) *reinterpret_cast<float4*>(row + col * 4) = float4{v[k], v[k + 1], v[k + 2], v[k + 3]};
      }
    } else {
      const int col = first + lane * 8;
      if (col < cols)
        *reinterpret_cast<uint4*>(row + col * 2) = uint4{narrow(v[0], v[1], dtype), narrow(v[2], v[3], dtype),
                                                         narrow(v[4], v[5], dtype), narrow(v[6], v[7], dtype)};
    }
  }
};

// The sums over a group of lanes, the same bits in each of them. Every thread of the block must call it.
template <int N>
MMKERN_FN void sum_over_group(float (&s)[N], int lanes) {
  for (int step = (lanes < kWarp ? lanes : kWarp) / 2; step > 0; step /= 2) {
#pragma unroll
    for (int n = 0; n < N; ++n) s[n] += __shfl_xor_sync(kAllLanes, s[n], step);
  }
  if (lanes <= kWarp) return;
  __shared__ float warp_sums[N][kMaxLanes / kWarp];
  const int warp = int(threadIdx.x) / kWarp, warps = lanes / kWarp, first = warp / warps * warps;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) warp_sums[n][warp] = s[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    s[n] = 0;
    for (int w = first; w < first + warps; ++w) s[n] += warp_sums[n][w];
  }
  __syncthreads();
}

}  // namespace device
}  // namespace mmkern
