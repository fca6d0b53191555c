// y = act((offset + scale) x + shift) on CUDA, and its gradient: affine_activation of mmkern/reference/gated.py.
//
// Rows that share a row of scale or shift are a run of neighbours. A block takes a piece of several of them, so that a
// lane reads the numbers of its columns once, and has a sum of each column for the gradient. Where rows have a number
// each, every piece has its sum. What the sums add up to: mmkern/backends/cuda_gated.py.
#pragma once

#include "pieces.cuh"

#include "../activations.h"

namespace mmkern {
inline namespace device {

// ---- Problem; laid out alike in mmkern/backends/cuda_gated.py ----

// What has a number of its own: an element, a row, or a column of a run.
enum Shared : int { kByNone = 0, kByRow = 1, kByRun = 2 };

// Scale or shift, expanded to the shape of x; null where it is not there.
struct Modulator {
  GridRows rows;
  Dtype dtype;
  Shared shared;

  template <class Access>
  MMKERN_FN void load(float (&v)[kColumns], const Piece<Access>& piece) const {
    if (rows.data && shared == kByNone) return piece.load(v, rows, dtype);
    if (rows.data && shared == kByRun) return piece.columns.load_as(dtype, v, rows.data, piece.at.in(rows));
    const float all = rows.data ? load_one(rows.data, piece.at.in(rows), dtype) : 0;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) v[k] = all;
  }
};

struct AffineActivationProblem {
  PieceSizes n;
  Runs runs;  // of all rows, where none share a row of numbers
  GridRows x;
  Modulator scale, shift;
  float offset;
  int activation;
};

// ---- Rows ----

// The numbers of a lane's columns.
struct Affine {
  float factor[kColumns] = {}, shift[kColumns] = {};
  bool formed = false;

  template <class Access>
  MMKERN_FN void form(const AffineActivationProblem& p, const Piece<Access>& piece) {
    if (!formed || p.shift.shared != kByRun) p.shift.load(shift, piece);
    if (!formed || p.scale.shared != kByRun) {
      p.scale.load(factor, piece);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) factor[k] += p.offset;
    }
    formed = true;
  }
};

// f(piece), by all threads together, for every row of this block that this thread's group takes a piece of.
template <class Access, class F>
MMKERN_FN void for_each_piece_of_runs(const AffineActivationProblem& p, F f) {
  const i64 block = i64(blockIdx.x) / p.n.pieces, which = i64(blockIdx.x) - block * p.n.pieces;
  p.runs.for_each_row(p.n.sizes, block, [&](GridPlace at) { f(Piece<Access>(p.n, at, which), which); });
}

// ---- Forward ----

struct AffineActivationArgs {
  AffineActivationProblem problem;
  GridRows out;
};

template <class Access>
__global__ void __launch_bounds__(kPieceThreads) affine_activation(const AffineActivationArgs a) {
  Affine affine;
  for_each_piece_of_runs<Access>(a.problem, [&](const Piece<Access>& piece, i64) {
    if (!piece.at.active) return;
    float x[kColumns];
    piece.load(x, a.problem.x);
    affine.form(a.problem, piece);
    activation::with(a.problem.activation, [&](auto act) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) x[k] = act.at(fma(affine.factor[k], x[k], affine.shift[k])).value;
    });
    piece.store(x, a.out);
  });
}

// ---- Backward ----

// Where gradients go; null where they are not wanted.
struct AffineActivationBackwardArgs {
  AffineActivationProblem problem;
  GridRows grad, x_to;
  GridRows scale_to, shift_to;  // float32, of elements that have one each
  float* column_sums;           // [parts, 2, cols]: of rows of a run, for scale and for shift
  float* piece_sums;            // [rows, pieces, 2]
};

template <class Access>
__global__ void __launch_bounds__(kPieceThreads) affine_activation_backward(const AffineActivationBackwardArgs a) {
  const AffineActivationProblem& p = a.problem;
  const int lanes = p.n.sizes.lanes;
  Affine affine;
  float sums[2][kColumns] = {};
  for_each_piece_of_runs<Access>(p, [&](const Piece<Access>& piece, i64 which) {
    float terms[2][kColumns], slope[kColumns];
    piece.load(terms[0], p.x);
    piece.load(slope, a.grad);
    if (piece.at.active) affine.form(p, piece);
    activation::with(p.activation, [&](auto act) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) slope[k] *= act.at(fma(affine.factor[k], terms[0][k], affine.shift[k])).slope;
    });
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      terms[0][k] *= slope[k];
      terms[1][k] = slope[k];
      slope[k] *= affine.factor[k];
    }
    if (a.x_to.data) piece.store(slope, a.x_to);
    // Outside the row x and grad are 0, and so are these, unless some act' of the row itself is not finite.
    const GridRows* const to[2] = {&a.scale_to, &a.shift_to};
    float totals[2] = {};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if (to[n]->data) piece.columns.store_floats(terms[n], static_cast<float*>(to[n]->data), piece.at.in(*to[n]));
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        sums[n][k] += terms[n][k];
        totals[n] += terms[n][k];
      }
    }
    if (!a.piece_sums) return;
    sum_over_group(totals, lanes);
    if (!piece.at.active || piece.columns.lane > 0) return;
#pragma unroll
    for (int n = 0; n < 2; ++n) a.piece_sums[(piece.at.row * p.n.pieces + which) * 2 + n] = totals[n];
  });
  if (!a.column_sums) return;
  const WarpSums part(lanes, i64(blockIdx.x) / p.n.pieces);
  Columns columns = Access::columns(p.n.sizes);
  columns.first = int(i64(blockIdx.x) % p.n.pieces) * columns.chunk();
  columns.cols = p.n.sizes.cols;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    add_groups_of_warp(sums[n], lanes);
    if (part.writes) columns.store_floats(sums[n], a.column_sums, (part.row * 2 + n) * columns.cols);
  }
}

}  // namespace device
}  // namespace mmkern
