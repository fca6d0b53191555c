// What contrastive losses of all pairs share: geometries, which pairs are positive or left out, and the gradients of
// both sides, a block of pairs at a time.
#pragma once

#include "pairwise.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace contrastive {

using pairwise::Facts;
using pairwise::InputRows;
using pairwise::PairGradient;
using pairwise::RowFacts;
using pairwise::Weights;

// A geometry whose value is the score itself.
template <class T>
struct Dot {
  using V = Vec<T>;
  static constexpr T kSign = 1;

  explicit Dot(T) {}
  V factor(V xx) const { return xx; }
  Mask<T, 1> is_near(V, Facts<V>, Facts<V>) const { return V(T(1)) < V(T(0)); }
  V value(V s, Facts<V>, Facts<V>) const { return s; }
  V near_value(const DifferenceSums<V>& p) const { return p.xx; }  // no pair is near
  PairGradient<V> gradient(V, V g, Facts<V>, Facts<V>) const { return {-g, V(T(0)), V(T(0)), V(T(0))}; }
  PairGradient<V> near_gradient(const DifferenceSums<V>& p, V) const { return {p.xx, p.xx, p.xx, p.xx}; }
};

}  // namespace contrastive
namespace pairwise {

template <class T>
inline constexpr bool is_product<contrastive::Dot<T>> = true;

}  // namespace pairwise
namespace contrastive {

// Pairs score high where they are close.
template <class T>
struct Lorentz : pairwise::LorentzDistance<T> {
  static constexpr T kSign = -1;
  using pairwise::LorentzDistance<T>::LorentzDistance;
};

// Which pairs are positive: those of a mask, which may be null, and those of the diagonal if it is.
struct Positives {
  const View& mask;
  const bool diagonal;

  // Whether some of row i and columns j, ... may be.
  bool meet(int64_t i, int64_t j, int lanes) const { return mask || (diagonal && i >= j && i < j + lanes); }
  // f(lane) for those that are.
  template <class F>
  void for_each(int64_t i, int64_t j, int lanes, F f) const {
    const auto* const row = static_cast<const uint8_t*>(mask.data) + (mask ? i * mask.strides[0] : 0);
    for (int lane = 0; lane < lanes; ++lane)
      if ((diagonal && i == j + lane) || (mask && row[j + lane])) f(lane);
  }
};

// Sums over blocks, of rows of a result: where it is stored as T, in place.
template <class T>
class SumsOfRows {
 public:
  explicit SumsOfRows(const View& to)
      : to_(to),
        n_(to ? to.sizes[0] : 0),
        cols_(to ? to.sizes[1] : 0),
        in_place_(Stored<T>(to).as_they_are()),
        own_(in_place_ ? 0 : n_ * cols_),
        stride_(in_place_ ? collapsed_stride(to, 1, cols_) : cols_) {}

  explicit operator bool() const { return bool(to_); }
  void clear() const {
    for (int64_t i = 0; i < n_; ++i) for_each_vec<T>(cols_, [&](auto at) { at.store(row(i), Vec<T>(T(0))); });
  }
  // For combine: rows from `first` on. `adds`: to what is there.
  auto from(int64_t first, bool adds) const {
    return [=](int64_t i, int64_t d0, int n, const T* sums) {
      T* const to = row(first + i) + d0;
      for_each_vec<T>(n, [&](auto at) { at.store(to, adds ? at.load(to) + at.load(sums) : at.load(sums)); });
    };
  }
  void finish() const {
    if (in_place_ || !to_) return;
    const pairwise::StoredRows<T> to(to_);
    for (int64_t i = 0; i < n_; ++i) to.write(i, 0, cols_, row(i));
  }

 private:
  T* row(int64_t i) const { return (in_place_ ? in_place_ : own_.data) + i * stride_; }

  const View& to_;
  const int64_t n_, cols_;
  T* const in_place_;
  const Scratch<T> own_;
  const int64_t stride_;
};

// Gradients of x and y from those of pairs' values, of which `upstream(first, from)` knows those of a block whose first
// pair is (first, from): see find_weights. `kept`: the products of all pairs, or null. Returns that of the curvature.
template <class T, class Geometry, class F>
double differentiate(const Geometry& geometry, const Rows<const T>& x, const Rows<const T>& y,
                     const Rows<const T>& kept, const View& x_view, const View& y_view, int threads, F upstream) {
  constexpr int64_t kRows = 512, kCols = 1024;  // the kappas of a block: 2 MB of floats
  const bool is_product = pairwise::is_product<Geometry>;
  const SumsOfRows<T> to_x(x_view), to_y(y_view);
  if (x.rows == 0) to_y.clear();
  if (y.rows == 0) to_x.clear();
  const int64_t most_cols = smaller(kCols, y.rows);
  Weights<T> weights(smaller(kRows, x.rows), most_cols);
  const Scratch<T> beta(most_cols);
  const T *const by_x = is_product ? nullptr : weights.alpha.data, *const by_y = is_product ? nullptr : beta.data;
  double of_curvature = 0;
  for (int64_t first = 0; first < x.rows; first += kRows) {
    const auto some_x = x.part(first, smaller(kRows, x.rows - first));
    for (int64_t from = 0; from < y.rows; from += kCols) {
      const auto some_y = y.part(from, smaller(kCols, y.rows - from));
      const Rows<const T> part{kept.data ? kept[first] + from : nullptr, some_x.rows, some_y.rows, kept.stride};
      pairwise::find_weights<T>(geometry, some_x, some_y, part, upstream(first, from), threads, weights);
      for (int64_t i = 0; i < some_x.rows; ++i) of_curvature += double(weights.curvature.data[i]);
      if (to_x)
        pairwise::combine<T>(weights.kappas(), some_x, some_y, by_x, {weights, false}, threads,
                             to_x.from(first, from > 0));
      if (!to_y) continue;
      if (!is_product) weights.add_up_beta(beta.data);
      pairwise::combine<T>(Columns<const T>(weights.kappas()), some_y, some_x, by_y, {weights, true}, threads,
                           to_y.from(from, first > 0));
    }
  }
  to_x.finish();
  to_y.finish();
  return of_curvature;
}

}  // namespace contrastive
}  // namespace MMKERN_ISA
}  // namespace mmkern
