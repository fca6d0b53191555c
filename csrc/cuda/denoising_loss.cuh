// The squared error of each sample on CUDA, and its gradient: masked_squared_error of mmkern/reference/diffusion.py.
// Blocks add up parts of samples; what the parts add up to: mmkern/backends/cuda_diffusion.py.
#pragma once

#include "samples.cuh"

namespace mmkern {
inline namespace device {

// Laid out alike in mmkern/backends/cuda_diffusion.py, as are the arguments of both kernels.
struct SquaredErrorProblem : SampleSizes {
  GridRows pred, target;
  Mask mask;
  Dtype target_dtype;
};

// A piece of pred and what belongs to it.
template <class Access>
struct ErrorPiece : Piece<Access> {
  using Piece<Access>::at;
  using Piece<Access>::columns;

  float difference[kColumns], mask[kColumns];  // both 0 outside the row

  MMKERN_FN ErrorPiece(const SquaredErrorProblem& p, i64 i) : Piece<Access>(p, i) {
    float target[kColumns];
    this->load(difference, p.pred);
    this->load(target, p.target, p.target_dtype);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) difference[k] -= target[k], mask[k] = 1;
    if (p.mask.rows.data) p.mask.load(mask, columns, at);
  }
};

struct SquaredErrorArgs {
  SquaredErrorProblem problem;
  float* sums;  // [samples, parts]
  SampleParts parts;
};

template <class Access>
__global__ void __launch_bounds__(kPieceThreads) masked_squared_error(const SquaredErrorArgs a) {
  float sums[kColumns] = {};
  a.parts.for_each_unit(a.problem.sizes.lanes, [&](i64 i) {
    const ErrorPiece<Access> piece(a.problem, i);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const float d = piece.difference[k];
      if (piece.columns.has(k)) sums[k] = fma(piece.mask[k], d * d, sums[k]);
    }
  });
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kColumns; ++k) sum += sums[k];
  sum = sum_over_block(sum);
  if (threadIdx.x == 0) a.sums[blockIdx.x] = sum;
}

struct SquaredErrorBackwardArgs {
  SquaredErrorProblem problem;
  OfSamples<float> grad;
  GridRows pred_to, target_to;  // null where not wanted
};

template <class Access>
__global__ void __launch_bounds__(kPieceThreads) masked_squared_error_backward(const SquaredErrorBackwardArgs a) {
  const SquaredErrorProblem& p = a.problem;
  const ErrorPiece<Access> piece(p, group_of_grid(p.sizes));
  if (!piece.at.active) return;
  const float slope = 2 * *a.grad.of(p.sample(piece.at));
  float gradient[kColumns];
#pragma unroll
  for (int k = 0; k < kColumns; ++k) gradient[k] = piece.mask[k] * (slope * piece.difference[k]);
  if (a.pred_to.data) piece.store(gradient, a.pred_to);
  if (!a.target_to.data) return;
#pragma unroll
  for (int k = 0; k < kColumns; ++k) gradient[k] = -gradient[k];
  piece.store(gradient, a.target_to, p.target_dtype);
}

}  // namespace device
}  // namespace mmkern
