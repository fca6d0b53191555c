// The contrastive family on CUDA, and the list of its kernels: log-sum-exps of the scores of all pairs of points in
// hyperbolic space, on the visits of hyperbolic_pairwise.cuh. What they mean: mmkern/reference/contrastive.py.
//
// Forward, a tile leaves the log-sum-exps of its rows and of its columns, which a second kernel merges in the order of
// the tiles. Backward, a block of pairs at a time has its weights in memory, for pairwise_product.
#pragma once

#include "hyperbolic_pairwise.cuh"

namespace mmkern {
inline namespace device {

// Numbers of rows of X and of rows of Y, or parts of them by tiles.
struct Sides {
  float *rows, *cols;
};

// What a pair is to its row and to its column: one of the others there, the positive one, or one of a plain sum.
struct PairKind {
  bool in_row, in_col, positive, plain;
};

// Which pairs are positive: those on a diagonal, and those of a mask. Forgotten rows of Y count for no row of X, and
// the other way round.
struct PairChoice {
  const unsigned char* mask;  // [N, M], or null
  i64 mask_stride;
  const unsigned char *x_forgotten, *y_forgotten;  // [N] and [M], or null
  i64 diagonal;                                    // j - i of its pairs

  MMKERN_FN PairKind of(i64 i, i64 j) const {
    const bool positive = j == i + diagonal || (mask && mask[i * mask_stride + j]);
    const bool x = x_forgotten && x_forgotten[i], y = y_forgotten && y_forgotten[j];
    return {!positive && !y, !positive && !x, positive, !positive && x && y};
  }
};

// Laid out alike in mmkern/backends/cuda_contrastive.py, as are the arguments of the kernels.
struct ScoreProblem {
  Matrix x, y;
  Scalar curvature, logit_scale;
  PairChoice choice;

  MMKERN_FN ScoreTile tile(ScoreShared& shared) const {
    return {x, y, i64(blockIdx.y) * kTile, i64(blockIdx.x) * kTile, shared};
  }
};

struct LogSumArgs {
  ScoreProblem problem;
  Sides others;     // parts
  Sides positives;  // parts where there is a mask; else a row has one at most, whose score is the result
  Sides plain;      // parts, or null
  float* products;  // [N, M], or null
};

__global__ void __launch_bounds__(kTileThreads) log_sums(const LogSumArgs a) {
  using Op = LorentzPairwiseDistance;
  __shared__ ScoreShared shared;
  __shared__ SumsShared<LogSum> others_shared, positives_shared;
  __shared__ SumsShared<PlainSum> plain_shared;
  const ScoreTile tile = a.problem.tile(shared);
  const float c = a.problem.curvature.get(), scale = a.problem.logit_scale.get();
  TileSums<LogSum> others(others_shared), positives(positives_shared);
  TileSums<PlainSum> plain(plain_shared);
  visit_pairs<Op>(tile, c, [&](Visited at, bool counted, auto points, const float* sums) {
    const i64 i = tile.row + at.row(), j = tile.col + at.col();
    if (points.sums == Combined::sums && a.products && tile.has(at.row(), at.col()))
      a.products[i * tile.y.rows + j] = sums[2];
    PairKind kind{};
    float score = 0;
    if (counted) {
      kind = a.problem.choice.of(i, j);
      score = -scale * Op::value(points.of(sums), c);
    }
    const auto only = [&](bool chosen) { return chosen ? score : -infinity(); };
    others.add(at, only(kind.in_row), only(kind.in_col));
    if (a.problem.choice.mask) {
      positives.add(at, only(kind.positive), only(kind.positive));
    } else if (kind.positive) {
      a.positives.rows[i] = a.positives.cols[j] = score;
    }
    const float apart = kind.plain ? score : 0;
    if (a.plain.rows) plain.add(at, apart, apart);
  });
  others.store(tile, a.others.rows, a.others.cols);
  if (a.problem.choice.mask) positives.store(tile, a.positives.rows, a.positives.cols);
  if (a.plain.rows) plain.store(tile, a.plain.rows, a.plain.cols);
}

struct Parts {
  const float* parts;  // [count, size]
  float* all;          // [size]
  i64 count, size;
};
struct MergeSumsArgs {
  Parts rows, cols;
};

template <class Sum>
__global__ void __launch_bounds__(kTileThreads) merge_sums(const MergeSumsArgs a) {
  const Parts side = blockIdx.y == 0 ? a.rows : a.cols;
  const i64 k = i64(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= side.size) return;
  Sum all = Sum::none();
  for (i64 n = 0; n < side.count; ++n) all.add(side.parts[n * side.size + k]);
  side.all[k] = all.get();
}

// ---- Backward. Of a score: g_i exp(s - rows_i) + h_j exp(s - cols_j); of a plain sum, g_i + h_j --------------------

struct LogSumGradientArgs {
  ScoreProblem problem;
  Sides others, positives;  // the log-sum-exps
  Sides others_grad, positives_grad, plain_grad;
  WeightsTo to;
  float* scale_partials;  // one number a block, or null
};

// What does not count may outweigh what does past all bounds, so it is not multiplied by 0.
MMKERN_FN float softmax_gradient(const Sides& sums, const Sides& grad, i64 i, i64 j, float score, bool in_row,
                                 bool in_col) {
  const float of_row = in_row ? grad.rows[i] * expf(score - sums.rows[i]) : 0;
  return of_row + (in_col ? grad.cols[j] * expf(score - sums.cols[j]) : 0);
}

MMKERN_FN float score_gradient(const LogSumGradientArgs& a, i64 i, i64 j, float score) {
  const PairKind kind = a.problem.choice.of(i, j);
  if (kind.plain) return a.plain_grad.rows[i] + a.plain_grad.cols[j];
  if (!kind.positive) return softmax_gradient(a.others, a.others_grad, i, j, score, kind.in_row, kind.in_col);
  if (a.problem.choice.mask) return softmax_gradient(a.positives, a.positives_grad, i, j, score, true, true);
  return a.positives_grad.rows[i] + a.positives_grad.cols[j];
}

__global__ void __launch_bounds__(kTileThreads) log_sum_weights(const LogSumGradientArgs a) {
  __shared__ ScoreShared shared;
  const float scale = a.problem.logit_scale.get();
  float of_scale = 0;
  find_weights<LorentzPairwiseDistance>(a.problem.tile(shared), a.problem.curvature.get(), a.to,
                                        [&](i64 i, i64 j, float distance) {
                                          const float grad = score_gradient(a, i, j, -scale * distance);
                                          of_scale = fma(-grad, distance, of_scale);
                                          return -scale * grad;
                                        });
  store_part(a.scale_partials, of_scale);
}

}  // namespace device
}  // namespace mmkern

#define MMKERN_CONTRASTIVE_KERNELS(KERNEL)                                                                             \
  KERNEL(log_sums)                                                                                                     \
  KERNEL(log_sum_weights)                                                                                              \
  KERNEL(merge_sums<LogSum>)                                                                                           \
  KERNEL(merge_sums<PlainSum>)
