// The row loop. A row-wise op is a few inner products of the row's vectors, scalar maths on them, and outputs that
// combine the vectors with the result. A flavour says what these are; the loop below is the same for all.
//
// A group of lanes shares a row: part of a warp, a warp, or a whole block. Each lane keeps kColumns columns of every
// vector in registers, so a row of up to 512 * kColumns columns is read once; of a longer one all but the last chunk
// is read again.
//
// A flavour has
//   inputs, outputs, sums             how many vectors come in and go out, how many inner products there are
//   products(v, s)                    adds one column of each vector to the sums
//   solve(s, scalars, coefficients)   the scalar maths of the row
//   combine(coefficients, v, out)     one column of each output
#pragma once

#include "device.cuh"

namespace mmkern {
inline namespace device {

constexpr int kColumns = 8;  // of a row, in a lane's registers
// That share a row. Bounds say one block a multiprocessor: left to itself ptxas rounds registers down and spills.
constexpr int kMaxLanes = 512;
constexpr int kMaxInputs = 4;
constexpr int kMaxOutputs = 3;

// The arguments of every row kernel; laid out alike in mmkern/backends/cuda.py.
struct RowArgs {
  const void* in[kMaxInputs];
  i64 in_stride[kMaxInputs];  // between rows, in elements
  void* out[kMaxOutputs];     // contiguous; null where not wanted
  const void* row_in;         // one number a row, or null
  i64 row_in_stride;
  void* row_out;              // one number a row, or null; contiguous
  float* curvature_partials;  // one number a block, or null
  i64 rows;
  Scalar curvature;
  float option;
  int cols;
  int lanes;  // that share a row: a power of two
  Dtype dtype, row_dtype;
  int vectors;  // rows begin and end at multiples of 16 bytes
};

// What the scalar maths of a row sees beside the inner products, and what it gives beside the coefficients.
struct RowScalars {
  float curvature, option, row;
};
struct RowResults {
  float row = 0, curvature = 0;
};

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

template <class Flavour>
struct Row {
  float v[Flavour::inputs][kColumns];

  MMKERN_FN void load(const RowArgs& a, i64 row, const Columns& columns) {
#pragma unroll
    for (int n = 0; n < Flavour::inputs; ++n) columns.load(v[n], a.in[n], row * a.in_stride[n]);
  }

  MMKERN_FN void column(int k, float (&one)[Flavour::inputs]) const {
#pragma unroll
    for (int n = 0; n < Flavour::inputs; ++n) one[n] = v[n][k];
  }

  // Two chains of additions: half the latency, and a little less rounding.
  MMKERN_FN void add_products(float (&sums)[Flavour::sums]) const {
    float second[Flavour::sums] = {};
#pragma unroll
    for (int k = 0; k < kColumns / 2; ++k) {
      float one[Flavour::inputs];
      column(k, one);
      Flavour::products(one, sums);
      column(k + kColumns / 2, one);
      Flavour::products(one, second);
    }
#pragma unroll
    for (int n = 0; n < Flavour::sums; ++n) sums[n] += second[n];
  }

  MMKERN_FN void store(const RowArgs& a, i64 row, const Columns& columns,
                       const typename Flavour::Coefficients& coefficients) const {
    float out[Flavour::outputs][kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      float one[Flavour::inputs], result[Flavour::outputs];
      column(k, one);
      Flavour::combine(coefficients, one, result);
#pragma unroll
      for (int n = 0; n < Flavour::outputs; ++n) out[n][k] = result[n];
    }
#pragma unroll
    for (int n = 0; n < Flavour::outputs; ++n)
      if (a.out[n]) columns.store(out[n], a.out[n], row * a.cols);
  }
};

template <class Flavour>
__global__ void __launch_bounds__(kMaxLanes, 1) rows(const RowArgs a) {
  const int group = int(threadIdx.x) / a.lanes, groups = int(blockDim.x) / a.lanes;
  Columns columns{0, 0, int(threadIdx.x) % a.lanes, a.lanes, a.vectors, a.dtype};
  const int chunk = columns.chunk(), last = (a.cols - 1) / chunk * chunk;
  const float c = a.curvature.get();
  float curvature = 0;
  // All threads of a block stay in the loop together: they meet in the sums.
  for (i64 base = i64(blockIdx.x) * groups; base < a.rows; base += i64(gridDim.x) * groups) {
    const bool active = base + group < a.rows;
    const i64 row = active ? base + group : 0;
    columns.cols = active ? a.cols : 0;
    Row<Flavour> vectors;
    float sums[Flavour::sums] = {};
    typename Flavour::Coefficients coefficients;
    RowResults results;
    // There and back over the chunks: sums on the way there, outputs on the way back, which begins with the chunk that
    // the registers still hold. One loop, so that the loads are one piece of code.
    const int chunks = last / chunk + 1, steps = Flavour::outputs > 0 ? 2 * chunks : chunks;
    for (int step = 0; step < steps; ++step) {
      columns.first = (step < chunks ? step : 2 * chunks - 1 - step) * chunk;
      if (step != chunks) vectors.load(a, row, columns);
      if (step < chunks) vectors.add_products(sums);
      if (step == chunks - 1) {
        sum_over_group(sums, a.lanes);
        const float given = a.row_in && active ? load_one(a.row_in, row * a.row_in_stride, a.row_dtype) : 0;
        results = Flavour::solve(sums, RowScalars{c, a.option, given}, coefficients);
      }
      if constexpr (Flavour::outputs > 0) {
        if (step >= chunks) vectors.store(a, row, columns, coefficients);
      }
    }
    if (active && columns.lane == 0) {
      if (a.row_out) store_one(a.row_out, row, results.row, a.row_dtype);
      curvature += results.curvature;
    }
  }
  if (a.curvature_partials) {
    curvature = sum_over_block(curvature);
    if (threadIdx.x == 0) a.curvature_partials[blockIdx.x] = curvature;
  }
}

// The last step of every curvature gradient: the partial sums of the blocks, one block, in a fixed order.
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
