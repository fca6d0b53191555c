// SigLIP's loss of all pairs and its gradients, from one pass over the scores: sigmoid_loss of
// mmkern/reference/contrastive.py. A pair's slope asks for no other's score.
#pragma once

#include "contrastive_pairs.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace contrastive {

// l = scale x.y + bias; softplus(l) of a pair, or softplus(-l) of a positive one, and the slope of that.
template <class T>
struct SigmoidLoss {
  using V = Vec<T>;
  const V scale, bias;
  const Positives positives;

  struct Term {
    V loss, slope;
  };
  MMKERN_FN Term at(int64_t i, int64_t j, int lanes, V product) const {
    V sign(T(1));
    if (positives.meet(i, j, lanes)) positives.for_each(i, j, lanes, [&](int lane) { sign.set(lane, T(-1)); });
    const V zero(T(0)), one(T(1)), l = sign * fma(scale, product, bias);
    const V less = exp_flushed(select(l < zero, l, -l)), share = one / (one + less);
    Term term{max(l, zero) + log1p(less), sign * select(l < zero, less * share, share)};
    for (int lane = lanes; lane < V::size; ++lane) {
      term.loss.set(lane, T(0));
      term.slope.set(lane, T(0));
    }
    return term;
  }
};

// Of each row: the loss, and what the gradients of scale and of bias add up.
template <class T>
struct SigmoidSums {
  const int64_t rows;
  const Scratch<T> loss, of_scale, of_bias;

  explicit SigmoidSums(int64_t n) : rows(n), loss(n), of_scale(n), of_bias(n) {
    for (int64_t i = 0; i < n; ++i) loss.data[i] = of_scale.data[i] = of_bias.data[i] = 0;
  }
  void write(const Scratch<T>& sums, double factor, const View& to) const {
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) total += double(sums.data[i]);
    *static_cast<T*>(to.data) = T(factor * total);
  }
};

// For find_weights; it takes the losses as it goes.
template <class T>
struct SigmoidGradients {
  static constexpr bool kReadsValues = true;
  const SigmoidLoss<T>& loss;
  const SigmoidSums<T>& sums;
  const Vec<T> by;
  const int64_t first, from;

  struct Row {
    const SigmoidGradients& all;
    const int64_t i, j;
    Vec<T> loss{T(0)}, of_scale{T(0)}, of_bias{T(0)};

    MMKERN_FN Vec<T> operator()(int c, int lanes, Vec<T> product) {
      const auto term = all.loss.at(i, j + c, lanes, product);
      loss += term.loss;
      of_scale = fma(term.slope, product, of_scale);
      of_bias += term.slope;
      return term.slope * all.by;
    }
  };
  Row of_row(int64_t i, int64_t j0, int, T*) const { return {*this, first + i, from + j0}; }
  void end(int64_t i, const Row& row) const {
    sums.loss.data[first + i] += sum(row.loss);
    sums.of_scale.data[first + i] += sum(row.of_scale);
    sums.of_bias.data[first + i] += sum(row.of_bias);
  }
};

// Tensors: x, y, the loss, x', y', scale', bias'; the first two of these are without rows where only the loss is
// wanted. Scalars: scale, bias, what all is multiplied by, whether the diagonal is positive, whether gradients are
// made.
template <class T>
void sigmoid_loss(const Call& call) {
  const InputRows<T> x(call[0]), y(call[1]);
  const View none{}, &to_x = call[3], &to_y = call[4];
  const SigmoidLoss<T> loss{Vec<T>(T(call.scalars[0])), Vec<T>(T(call.scalars[1])), {none, call.scalars[3] != 0}};
  const double factor = call.scalars[2];
  const Vec<T> by(T(call.scalars[0] * factor));
  const SigmoidSums<T> sums(x.rows.rows);
  const auto take = [&](int64_t i0, int64_t j0, int rows, int cols, const T* tile, int64_t ld) {
    for (int r = 0; r < rows; ++r) {
      Vec<T> of_row(T(0));
      pairwise::for_each_column<T>(cols, [&](int c, int lanes) {
        of_row += loss.at(i0 + r, j0 + c, lanes, Vec<T>::load(tile + r * ld + c)).loss;
      });
      sums.loss.data[i0 + r] += sum(of_row);
    }
  };
  if (call.scalars[4] != 0 && to_x.sizes[0] == x.rows.rows && to_y.sizes[0] == y.rows.rows)
    differentiate<T>(Dot<T>(T(0)), x.rows, y.rows, {}, to_x, to_y, call.threads,
                     [&](int64_t first, int64_t from) { return SigmoidGradients<T>{loss, sums, by, first, from}; });
  else
    score_tiles<T>(x.rows, y.rows, call.threads, take);
  sums.write(sums.loss, factor, call[2]);
  sums.write(sums.of_scale, factor, call[5]);
  sums.write(sums.of_bias, factor, call[6]);
}

inline void run_sigmoid_loss(const Call& call) {
  call[0].dtype == Dtype::float64 ? sigmoid_loss<double>(call) : sigmoid_loss<float>(call);
}

}  // namespace contrastive
}  // namespace MMKERN_ISA
}  // namespace mmkern
