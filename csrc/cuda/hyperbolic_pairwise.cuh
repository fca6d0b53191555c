// All pairs of rows of X [N, D] and Y [M, D] in hyperbolic space: [N, M], on the tile loop of score_tiles.cuh.
//
// |x|^2, |y|^2 and x.y come first, as in a matrix product. Where a distance would cancel (near points), the block runs
// the tile once more over differences and redoes these pairs alone.
//
// Backward, with d = y - x and one weight w a pair:
//   x_i' = sum_j w_ij d_ij + a_i x_i        y_j' = sum_i -w_ij d_ij + b_j y_j
// One kernel writes w, the sums a and b by tiles, and c' by blocks; pairwise_product.cuh forms the two products.
#pragma once

#include "hyperbolic_rows.cuh"
#include "score_tiles.cuh"

namespace mmkern {
inline namespace device {

// ---- The ops: a value from PlainSums, and from DifferenceSums where the plain ones cancel --------------------------

// Of its terms. With 1/64, of thousands of rows in few dimensions some that one close pair outweighs miss the contract.
constexpr float kCancelled = 1.0f / 8;

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

// Where a tile's weights and their sums go. Laid out alike in mmkern/backends/cuda_pairs.py.
struct WeightsTo {
  float* weights;             // [N, M]: w
  float* row_partials;        // [tiles of Y, N]: a
  float* col_partials;        // [tiles of X, M]: b
  float* curvature_partials;  // one number a block, or null
};

// The arguments of the pairwise kernels, forward and backward; laid out alike in mmkern/backends/cuda_pairs.py.
struct PairwiseArgs {
  Matrix x, y;
  Scalar curvature;
  void* out;         // [N, M] contiguous, X's dtype
  const void* grad;  // [N, M] in X's dtype
  i64 grad_row_stride, grad_col_stride;
  WeightsTo to;
};

// visit(at, counted, points, sums): every thread visits the same number of pairs, twice in a tile where some cancel;
// a pair is counted in one of its visits, or in none if it lies outside.
template <class Op, class Visit>
MMKERN_FN void visit_pairs(const ScoreTile& tile, float c, Visit visit) {
  tile.accumulate<Dots>();
  unsigned cancelled = 0;
  for (int n = 0; n < kVisits; ++n) {
    const Visited at{n};
    const float sums[] = {tile.xx(at.row()), tile.yy(at.col()), tile.shared.sums[0][at.row()][at.col()]};
    bool counted = tile.has(at.row(), at.col());
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

  // `upstream(value)` is the gradient of the pair's value; the value has the bits of the forward, whose error then
  // cancels in exp(score - log-sum-exp).
  template <class Op, class Points, class Upstream>
  static MMKERN_FN PairWeights of(Points, const float* sums, float c, Upstream upstream) {
    const PairVariables<Points> variables(sums, c);
    const auto value = Op::value(Points::of(variables.s), variables.curvature);
    const float grad = upstream(Op::value(Points::of(sums), c));
    float adjoint[variables.count];
#pragma unroll
    for (int n = 0; n < variables.count; ++n) adjoint[n] = grad * value.slope[n];
    const PairGradient k = Points::gradient(0, 0, adjoint);
    const float curvature = adjoint[Points::sums];
    if constexpr (Points::sums == Compared::sums) return {k.x_by_x, k.y_by_y, k.cross, curvature};
    return {k.x_by_x + k.cross, k.y_by_y + k.cross, k.cross, curvature};
  }
};

MMKERN_FN void store_part(float* partials, float of_thread) {
  const float sum = sum_over_block(of_thread);
  if (threadIdx.x == 0 && partials) partials[i64(blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

// `upstream(i, j, value)`: the gradient of the value of row i of X and row j of Y.
template <class Op, class Upstream>
MMKERN_FN void find_weights(const ScoreTile& tile, float c, const WeightsTo& to, Upstream upstream) {
  __shared__ SumsShared<PlainSum> sums_shared;
  TileSums<PlainSum> by_self(sums_shared);
  float curvature = 0;
  visit_pairs<Op>(tile, c, [&](Visited at, bool counted, auto points, const float* sums) {
    PairWeights w;
    if (counted) {
      const i64 row = tile.row + at.row(), col = tile.col + at.col();
      w = PairWeights::of<Op>(points, sums, c, [&](float value) { return upstream(row, col, value); });
      to.weights[row * tile.y.rows + col] = w.x_by_d;
    }
    by_self.add(at, w.x_by_x, w.y_by_y);
    curvature += w.curvature;
  });
  by_self.store(tile, to.row_partials, to.col_partials);
  store_part(to.curvature_partials, curvature);
}

template <class Op>
__global__ void __launch_bounds__(kTileThreads) pairwise_weights(const PairwiseArgs a) {
  __shared__ ScoreShared shared;
  const ScoreTile tile{a.x, a.y, i64(blockIdx.y) * kTile, i64(blockIdx.x) * kTile, shared};
  find_weights<Op>(tile, a.curvature.get(), a.to, [&](i64 row, i64 col, float) {
    return load_one(a.grad, row * a.grad_row_stride + col * a.grad_col_stride, a.x.dtype);
  });
}

}  // namespace device
}  // namespace mmkern
