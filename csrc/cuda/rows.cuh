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

#include "lanes.cuh"

namespace mmkern {
inline namespace device {

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

}  // namespace device
}  // namespace mmkern
