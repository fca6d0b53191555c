// All pairs of rows of X [N, D] and Y [M, D] in hyperbolic space: [N, M], on the tile loop of score_tiles.cuh.
//
// |x|^2, |y|^2 and x.y come first, as in a matrix product. Where a distance would cancel (near points), the block runs
// the tile once more over differences and redoes these pairs alone.
//
// Backward, with d = y - x and one weight w a pair:
//   x_i' = sum_j w_ij d_ij + a_i x_i        y_j' = sum_i -w_ij d_ij + b_j y_j
// One kernel writes w, the sums a and b by tiles, and c' by blocks; a second forms the two products.
#pragma once

#include "hyperbolic_rows.cuh"
#include "score_tiles.cuh"

namespace mmkern {
inline namespace device {

// ---- The ops: a value from PlainSums, and from DifferenceSums where the plain ones cancel --------------------------

constexpr float kCancelled = 1.0f / 64;  // of its terms: six bits lost

struct LorentzPairwiseInner {
  static constexpr bool may_cancel = false;
  template <class F>
  static MMKERN_FN F value(const PlainSums<F>& p, F c) {
    return p.xy - lorentz_time(p.xx, c) * lorentz_time(p.yy, c) / c;
  }
};

struct LorentzPairwiseDistance {
  static constexpr bool may_cancel = true;

  // sqrt(c) x_t - 1: small points keep their digits
  template <class F>
  static MMKERN_FN F lift(F xx, F c) {
    return c * xx / (constant<F>(1) + lorentz_time(xx, c));
  }
  // c x_t y_t - 1; less c x.y it is cosh(theta) - 1 = 2 sinh^2(theta/2)
  template <class F>
  static MMKERN_FN F lifted_product(const PlainSums<F>& p, F c) {
    const F x = lift(p.xx, c), y = lift(p.yy, c);
    return x + y + x * y;
  }
  static MMKERN_FN bool cancels(const PlainSums<float>& p, float c) {
    const float terms = lifted_product(p, c);
    return terms - c * p.xy <= kCancelled * terms;
  }
  template <class F>
  static MMKERN_FN F value(const PlainSums<F>& p, F c) {
    return distance_of(constant<F>(0.5) * (lifted_product(p, c) - c * p.xy), c);
  }
  template <class F>
  static MMKERN_FN F value(const DifferenceSums<F>& p, F c) {
    return LorentzDistance::value(p, c, 0);
  }
};

struct PoincarePairwiseDistance {
  static constexpr bool may_cancel = true;
  static MMKERN_FN bool cancels(const PlainSums<float>& p, float) {
    return p.xx + p.yy - 2 * p.xy <= kCancelled * (p.xx + p.yy);
  }
  template <class F>
  static MMKERN_FN F value(const PlainSums<F>& p, F c) {
    return value(DifferenceSums<F>{p.xx, p.yy, p.xy - p.xx, p.xx + p.yy - p.xy - p.xy}, c);
  }
  template <class F>
  static MMKERN_FN F value(const DifferenceSums<F>& p, F c) {
    return PoincareDistance::value(p, c, 0);
  }
};

// ---- The visit ----------------------------------------------------------------------------------------------------

// The arguments of the pairwise kernels; laid out alike in mmkern/backends/cuda.py.
struct PairwiseArgs {
  Matrix x, y;
  void* out;         // [N, M] contiguous: the values in X's dtype, or the weights w in float32
  const void* grad;  // [N, M] in X's dtype
  i64 grad_row_stride, grad_col_stride;
  float* row_partials;        // [2 tiles of Y, N]: a
  float* col_partials;        // [tiles of X, M]: b
  float* curvature_partials;  // one number a block
  Scalar curvature;
};

// visit(at, counted, points, sums): every thread visits the same number of pairs, twice in a tile where some cancel;
// a pair is counted in one of its visits, or in none if it lies outside.
template <class Op, class Visit>
MMKERN_FN void visit_pairs(const ScoreTile& tile, float c, Visit visit) {
  const auto inside = [&](Visited at) {
    return tile.row + at.row() < tile.x.rows && tile.col + at.col() < tile.y.rows;
  };
  tile.accumulate<Dots>();
  unsigned cancelled = 0;
  for (int n = 0; n < kVisits; ++n) {
    const Visited at{n};
    const float sums[] = {tile.xx(at.row()), tile.yy(at.col()), tile.shared.sums[0][at.row()][at.col()]};
    bool counted = inside(at);
    if constexpr (Op::may_cancel) {
      if (counted && Op::cancels(Combined::of(sums), c)) {
        cancelled |= 1u << n;
        counted = false;
      }
    }
    visit(at, counted, Combined{}, sums);
  }
  if constexpr (Op::may_cancel) {
    if (!__syncthreads_or(cancelled != 0)) return;
    tile.accumulate<Differences>();
    for (int n = 0; n < kVisits; ++n) {
      const Visited at{n};
      const float (*differences)[kTile][kTile] = tile.shared.sums;
      const float sums[] = {tile.xx(at.row()), tile.yy(at.col()), differences[0][at.row()][at.col()],
                            differences[1][at.row()][at.col()]};
      visit(at, (cancelled >> n & 1) != 0, Compared{}, sums);
    }
  }
}

template <class Op>
__global__ void __launch_bounds__(kTileThreads) pairwise(const PairwiseArgs a) {
  __shared__ ScoreShared shared;
  const ScoreTile tile{a.x, a.y, i64(blockIdx.y) * kTile, i64(blockIdx.x) * kTile, shared};
  const float c = a.curvature.get();
  visit_pairs<Op>(tile, c, [&](Visited at, bool counted, auto points, const float* sums) {
    if (!counted) return;
    const i64 to = (tile.row + at.row()) * a.y.rows + tile.col + at.col();
    store_one(a.out, to, Op::value(points.of(sums), c), a.x.dtype);
  });
}

// ---- Backward -----------------------------------------------------------------------------------------------------

// What a pair adds to the gradients, in terms of x, y and d whatever its inner products were.
struct PairWeights {
  float x_by_x = 0, y_by_y = 0, x_by_d = 0, curvature = 0;

  template <class Op, class Points>
  static MMKERN_FN PairWeights of(Points, const float* sums, float c, float grad) {
    const PairVariables<Points> variables(sums, c);
    const auto value = Op::value(Points::of(variables.s), variables.curvature);
    float adjoint[variables.count];
#pragma unroll
    for (int n = 0; n < variables.count; ++n) adjoint[n] = grad * value.slope[n];
    const PairGradient k = Points::gradient(0, 0, adjoint);
    const float curvature = adjoint[Points::sums];
    if constexpr (Points::sums == Compared::sums) return {k.x_by_x, k.y_by_y, k.cross, curvature};
    return {k.x_by_x + k.cross, k.y_by_y + k.cross, k.cross, curvature};
  }
};

template <class Op>
__global__ void __launch_bounds__(kTileThreads) pairwise_weights(const PairwiseArgs a) {
  __shared__ ScoreShared shared;
  __shared__ float row_sums[2][kTile], col_sums[2][kTile];
  const ScoreTile tile{a.x, a.y, i64(blockIdx.y) * kTile, i64(blockIdx.x) * kTile, shared};
  const int thread = int(threadIdx.x), half_row = thread / kWarp % 2, half = thread / kTile;
  const float c = a.curvature.get();
  float col_sum = 0, curvature = 0;
  if (thread < kTile) row_sums[0][thread] = row_sums[1][thread] = 0;
  visit_pairs<Op>(tile, c, [&](Visited at, bool counted, auto points, const float* sums) {
    PairWeights w;
    if (counted) {
      const i64 row = tile.row + at.row(), col = tile.col + at.col();
      const float grad = load_one(a.grad, row * a.grad_row_stride + col * a.grad_col_stride, a.x.dtype);
      w = PairWeights::of<Op>(points, sums, c, grad);
      static_cast<float*>(a.out)[row * a.y.rows + col] = w.x_by_d;
    }
    float row_sum = w.x_by_x;
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) row_sum += __shfl_xor_sync(kAllLanes, row_sum, lanes);
    if (thread % kWarp == 0) row_sums[half_row][at.row()] += row_sum;
    col_sum += w.y_by_y;
    curvature += w.curvature;
  });
  col_sums[half][thread % kTile] = col_sum;
  __syncthreads();
  const i64 row = tile.row + thread % kTile, col = tile.col + thread % kTile;
  if (row < a.x.rows) a.row_partials[(2 * i64(blockIdx.x) + half) * a.x.rows + row] = row_sums[half][thread % kTile];
  if (half == 0 && col < a.y.rows)
    a.col_partials[i64(blockIdx.y) * a.y.rows + col] = col_sums[0][thread] + col_sums[1][thread];
  curvature = sum_over_block(curvature);
  if (thread == 0 && a.curvature_partials) a.curvature_partials[i64(blockIdx.y) * gridDim.x + blockIdx.x] = curvature;
}

// out[s] = sum_o w[s, o] (other[o] - self[s]) + (sum of self's partials) self[s]: x', and with w transposed y'.
struct ProductArgs {
  Matrix self, other;
  const float* weights;
  i64 self_stride, other_stride;  // of the weights
  const float* partials;          // [count, rows of self]
  i64 partial_count;
  void* out;  // contiguous
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
      if (to < a.self.cols) store_one(a.out, s * a.self.cols + to, fma(by_self, self[i][j], sums[i][j]), a.self.dtype);
    }
  }
}

}  // namespace device
}  // namespace mmkern
