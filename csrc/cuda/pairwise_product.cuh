// The gradients of points from the weights of their pairs: see hyperbolic_pairwise.cuh.
#pragma once

#include "score_tiles.cuh"

namespace mmkern {
inline namespace device {

// out[s] = sum_o w[s, o] (other[o] - self[s]) + (sum of self's partials) self[s]: x', and with w transposed y'.
struct ProductArgs {
  Matrix self, other;
  const float* weights;
  i64 self_stride, other_stride;  // of the weights
  const float* partials;          // [count, rows of self]
  i64 partial_count;
  void* out;  // contiguous
  Dtype out_dtype;
  int adds;  // to what out has
};

struct ProductStage {
  const ProductArgs& a;
  i64 self, col;
  float w[kSpan], others[kSpan];

  static MMKERN_FN int depth() { return int(threadIdx.x) / kTile * kSpan; }
  static MMKERN_FN int row_of_other() { return int(threadIdx.x) * kSpan / kTile; }
  static MMKERN_FN int col_of_other() { return int(threadIdx.x) * kSpan % kTile; }

  MMKERN_FN void load(i64 k) {
#pragma unroll
    for (int n = 0; n < kSpan; ++n) {
      const i64 other = k + depth() + n;
      const bool inside = self < a.self.rows && other < a.other.rows;
      w[n] = inside ? a.weights[self * a.self_stride + other * a.other_stride] : 0;
    }
    a.other.load(others, k + row_of_other(), col + col_of_other());
  }
  MMKERN_FN void put(Slice& to) const {
#pragma unroll
    for (int n = 0; n < kSpan; ++n) to.first[depth() + n][int(threadIdx.x) % kTile] = w[n];
#pragma unroll
    for (int n = 0; n < kSpan; n += 4) put_four(&to.second[row_of_other()][col_of_other() + n], others + n);
  }
};

__global__ void __launch_bounds__(kTileThreads) pairwise_product(const ProductArgs a) {
  __shared__ Slice slices[2];
  const Place at{int(threadIdx.x)};
  const i64 row = i64(blockIdx.y) * kTile, col = i64(blockIdx.x) * kTile;
  ProductStage stage{a, row + at.thread % kTile, col, {}, {}};
  float self[kThreadRows][kThreadCols], sums[kThreadRows][kThreadCols] = {};
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
    for (int j = 0; j < kThreadCols; ++j) self[i][j] = a.self.load_one_at(row + at.row() + i, col + at.col(j));
  for_each_slice(slices, a.other.rows, stage, [&](const Slice& slice) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      float w[kThreadRows], other[kThreadCols];
      slice.read(d, at, w, other);
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
        for (int j = 0; j < kThreadCols; ++j) sums[i][j] = fma(w[i], other[j] - self[i][j], sums[i][j]);
    }
  });
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    const i64 s = row + at.row() + i;
    if (s >= a.self.rows) continue;
    float by_self = 0;
    for (i64 n = 0; n < a.partial_count; ++n) by_self += a.partials[n * a.self.rows + s];
#pragma unroll
    for (int j = 0; j < kThreadCols; ++j) {
      const i64 to = col + at.col(j);
      if (to >= a.self.cols) continue;
      const float before = a.adds ? load_one(a.out, s * a.self.cols + to, a.out_dtype) : 0;
      store_one(a.out, s * a.self.cols + to, before + fma(by_self, self[i][j], sums[i][j]), a.out_dtype);
    }
  }
}

}  // namespace device
}  // namespace mmkern
