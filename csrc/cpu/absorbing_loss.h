// Denoising score entropy of absorbing-state diffusion, and its gradient: absorbing_score_entropy of
// mmkern/reference/absorbing.py. Both read a masked row once; of other rows nothing is read.
#pragma once

#include "grid_rows.h"
#include "row_ops.h"
#include "score_tiles.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace absorbing {

// s - r log s + r (log r - 1) of the target's score, and its slope s - r along log s: near its zero without the
// difference of s and r, far from it without s / r.
struct Divergence {
  double value, slope;
};

// The true score of a target, r = 1 / (exp(sigma) - 1).
class Ratio {
 public:
  explicit Ratio(double sigma) : ratio_(1 / ::expm1(sigma)), log_(-sigma - ::log(-::expm1(-sigma))) {}

  Divergence from(double log_score) const {
    const double d = log_score - log_;
    if (__builtin_fabs(d) < 1) {
      const double more = ::expm1(d);
      return {ratio_ * (more - d), ratio_ * more};
    }
    const double score = ::exp(log_score);
    return {score - ratio_ * (1 + d), score - ratio_};
  }

 private:
  double ratio_, log_;
};

// That of each row: one a sample, or one for all. Walks on from row to row.
template <class T>
class Ratios {
 public:
  Ratios(const View& sigma, const View& x) : sigma_(row_scalars<const T>(sigma)) {
    const int64_t rows = count(x, x.rank - 1);
    of_sample_ = sigma.sizes[0] > 1 ? rows / x.sizes[0] : rows;
  }

  const Ratio& at(int64_t row) {
    if (row / of_sample_ != sample_) {
      sample_ = row / of_sample_;
      ratio_ = Ratio(double(sigma_.get(sample_, T(0))));
    }
    return ratio_;
  }

 private:
  RowScalars<const T> sigma_;
  int64_t of_sample_, sample_ = -1;
  Ratio ratio_{1};
};

// Scalar: for (i < n) total += exp(row[i]);
template <class T, class S>
T sum_of_scores(const S* row, int64_t n) {
  const auto sums = reduce_row<T, 1>(
      n, [=](auto at, Vec<T>* acc) __attribute__((always_inline)) { acc[0] += at.only(exp(at.load(row))); });
  return sums.total(0);
}

// Of n tokens, target among them; NaN where it is not.
template <class T, class S>
T entropy_of_row(const S* row, int64_t n, int64_t target, const Ratio& ratio) {
  if (target < 0 || target >= n) return T(__builtin_nan(""));
  const T others = sum_of_scores<T>(row, target) + sum_of_scores<T>(row + target + 1, n - target - 1);
  return T(double(others) + ratio.from(element(row, target)).value);
}

// Scalar: for (i < n) to[i] = value(i);  value(i, lanes) gives a vector of elements from i on. Where `stream`, lines
// that are the row's alone are stored past the caches, wherever they begin.
template <class T, class S, class F>
MMKERN_FN void write_row(S* to, int64_t n, bool stream, F value) {
  constexpr int64_t W = Vec<T>::size, kElements = kLine / int64_t(sizeof(S));
  int64_t i = 0;
  if (stream) {
    const int64_t before = int64_t(-reinterpret_cast<uintptr_t>(to) % kLine / sizeof(S));
    for (const int64_t end = smaller(before, n); i < end; i += W) {
      const int lanes = int(smaller(W, end - i));
      value(i, lanes).store(to + i, lanes);
    }
    i = smaller(before, n);
    for (; i + kElements <= n; i += kElements)
      for (int64_t k = 0; k < kElements; k += W) value(i + k, int(W)).template store<true>(to + i + k);
  }
  for (; i + W <= n; i += W) value(i, int(W)).store(to + i);
  if (i < n) value(i, int(n - i)).store(to + i, int(n - i));
}

// The gradient of a row of n tokens and MASK, of which the target's is `of_target`; returns the sum of the other
// scores.
template <class T, class S>
T write_gradient(const S* row, int64_t n, int64_t target, T grad, T of_target, S* to, bool stream) {
  constexpr int W = Vec<T>::size;
  Vec<T> others(T(0));
  write_row<T>(to, n + 1, stream, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    Vec<T> score = exp(lanes == W ? Vec<T>::load(row + i) : Vec<T>::load(row + i, lanes));
    const bool has_target = uint64_t(target - i) < uint64_t(lanes);
    if (has_target) score.set(int(target - i), T(0));
    for (int64_t lane = smaller(n - i, lanes); lane < W; ++lane) score.set(int(lane), T(0));
    others += score;
    Vec<T> gradient = score * Vec<T>(grad);
    if (has_target) gradient.set(int(target - i), of_target);
    return gradient;
  });
  return sum(others);
}

// Tensors: log_scores, targets, masked, sigma, the entropy of each row.
template <class S>
void entropy(const Call& call) {
  using T = accumulate_t<S>;
  const View& x = call[0];
  const int leading = x.rank - 1;
  const int64_t rows = count(x, leading), n = x.sizes[leading] - 1;
  const RowScalars<const int64_t> targets = row_scalars<const int64_t>(call[1]);
  const RowScalars<const bool> masked = row_scalars<const bool>(call[2]);
  const RowScalars<T> out = row_scalars<T>(call[4]);
  parallel_rows(rows, 16 * n, call.threads, [&](int64_t first, int64_t last) {
    GridRows<const S> row(x, leading, first);
    Ratios<T> ratios(call[3], x);
    for (int64_t r = first; r < last; ++r, ++row)
      out.set(r, masked.get(r, false) ? entropy_of_row<T>(*row, n, targets.get(r, 0), ratios.at(r)) : T(0));
  });
}

// The gradients of rows, where tensors `first` and on are log_scores, targets, masked and sigma. f(row) is what a row's
// entropy is multiplied by; seen(row, entropy) is told of each that is masked.
template <class S, class F, class G>
void gradients(const Call& call, int first, const View& to, F f, G seen) {
  using T = accumulate_t<S>;
  const View &x = call[first], &sigma = call[first + 3];
  const int leading = x.rank - 1;
  const int64_t n = x.sizes[leading] - 1;
  const RowScalars<const int64_t> targets = row_scalars<const int64_t>(call[first + 1]);
  const RowScalars<const bool> masked = row_scalars<const bool>(call[first + 2]);
  const bool stream = bytes_of(call) >= last_cache_bytes();
  parallel_rows(count(x, leading), 16 * n, call.threads, [&](int64_t begin, int64_t end) {
    GridRows<const S> row(x, leading, begin);
    GridRows<S> gradient(to, leading, begin);
    Ratios<T> ratios(sigma, x);
    for (int64_t r = begin; r < end; ++r, ++row, ++gradient) {
      if (!masked.get(r, false)) {
        write_row<T>(*gradient, n + 1, stream, [](int64_t, int) { return Vec<T>(T(0)); });
        continue;
      }
      const int64_t target = targets.get(r, 0);
      const T factor = f(r);
      Divergence own{__builtin_nan(""), 0};
      if (target >= 0 && target < n) own = ratios.at(r).from(element(*row, target));
      const T others = write_gradient(*row, n, target, factor, T(double(factor) * own.slope), *gradient, stream);
      seen(r, double(others) + own.value);
    }
    store_fence();
  });
}

// Tensors: the gradient of each row's entropy, log_scores, targets, masked, sigma, the gradient of log_scores.
template <class S>
void entropy_backward(const Call& call) {
  using T = accumulate_t<S>;
  const RowScalars<const T> grads = row_scalars<const T>(call[0]);
  if (call[5]) gradients<S>(call, 1, call[5], [&](int64_t r) { return grads.get(r, T(0)); }, [](int64_t, double) {});
}

// Tensors: log_scores, targets, masked, sigma, weights of the samples, the loss, its gradient.
template <class S>
void loss_with_gradient(const Call& call) {
  using T = accumulate_t<S>;
  const View& x = call[0];
  const RowScalars<const T> weights = row_scalars<const T>(call[4]);
  const int64_t rows = count(x, x.rank - 1), of_sample = call[4].sizes[0] > 1 ? rows / x.sizes[0] : rows;
  const auto weight = [&](int64_t r) { return weights.get(r / of_sample, T(0)); };
  const Scratch<double> losses(rows);
  for (int64_t r = 0; r < rows; ++r) losses.data[r] = 0;
  gradients<S>(call, 0, call[6], weight,
               [&](int64_t r, double entropy) { losses.data[r] = double(weight(r)) * entropy; });
  double total = 0;
  for (int64_t r = 0; r < rows; ++r) total += losses.data[r];
  *static_cast<T*>(call[5].data) = T(total);
}

}  // namespace absorbing
}  // namespace MMKERN_ISA
}  // namespace mmkern
