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

  // The column of register k.
  MMKERN_FN int column(int k) const {
    if (!vectors) return first + k * lanes + lane;
    return first + (dtype == kFloat32 ? (k / 4 * lanes + lane) * 4 + k % 4 : lane * 8 + k);
  }

  // Whether the row has it: of an access of 16 bytes, all or none.
  MMKERN_FN bool has(int k) const { return column(!vectors ? k : dtype == kFloat32 ? k / 4 * 4 : 0) < cols; }

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

  // Float32 numbers for the same columns, beside rows of any type.
  MMKERN_FN void load_floats(float (&v)[kColumns], const float* base, i64 row_offset) const {
    if (!are_eight_neighbours()) return of(kFloat32).load(v, base, row_offset);
    const int col = first + lane * 8;
    const bool inside = col < cols;
#pragma unroll
    for (int k = 0; k < kColumns; k += 4) {
      v[k] = v[k + 1] = v[k + 2] = v[k + 3] = 0;
      if (inside) load_four(v + k, base + row_offset + col + k);
    }
  }
  MMKERN_FN void store_floats(const float (&v)[kColumns], float* base, i64 row_offset) const {
    if (!are_eight_neighbours()) return of(kFloat32).store(v, base, row_offset);
    const int col = first + lane * 8;
    if (col >= cols) return;
    float4* const to = reinterpret_cast<float4*>(base + row_offset + col);
    to[0] = float4{v[0], v[1], v[2], v[3]};
    to[1] = float4{v[4], v[5], v[6], v[7]};
  }

  // Elements of type `given` for the same columns; those of 16 bits want eight neighbours, or one by one.
  MMKERN_FN void load_as(Dtype given, float (&v)[kColumns], const void* base, i64 row_offset) const {
    if (given == kFloat32) return load_floats(v, static_cast<const float*>(base), row_offset);
    of(given).load(v, base, row_offset);
  }
  MMKERN_FN void store_as(Dtype given, const float (&v)[kColumns], void* base, i64 row_offset) const {
    if (given == kFloat32) return store_floats(v, static_cast<float*>(base), row_offset);
    of(given).store(v, base, row_offset);
  }

 private:
  MMKERN_FN bool are_eight_neighbours() const { return vectors && dtype != kFloat32; }
  MMKERN_FN Columns of(Dtype given) const { return {first, cols, lane, lanes, vectors, given}; }
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

// The sums of the groups of a warp, column by column: lanes a group apart hold the same columns.
template <int N>
MMKERN_FN void add_groups_of_warp(float (&s)[N], int lanes) {
  for (int step = lanes; step < kWarp; step *= 2) {
#pragma unroll
    for (int n = 0; n < N; ++n) s[n] += __shfl_xor_sync(kAllLanes, s[n], step);
  }
}

// Where sums of columns over many rows go: to a row of partial sums for each warp, or for each group that is wider.
struct WarpSums {
  bool writes;  // this lane
  i64 row;

  MMKERN_FN explicit WarpSums(int lanes) : WarpSums(lanes, blockIdx.x) {}
  // Of blocks that have the same columns: the one of that number.
  MMKERN_FN WarpSums(int lanes, i64 block) {
    const int width = lanes < kWarp ? kWarp : lanes, thread = int(threadIdx.x);
    writes = thread % width < lanes;
    row = block * (int(blockDim.x) / width) + thread / width;
  }
};

}  // namespace device
}  // namespace mmkern
