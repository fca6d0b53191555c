// What a score s = x.y becomes in each geometry, and its derivatives. V is a vector over columns.
//
// c is the curvature's magnitude. A row's facts are |x|^2 and its factor: sqrt(c) x_t - 1 (Lorentz; without the 1,
// small points keep their digits) or the inverse of the gap 1 - c|x|^2 to the rim (Poincare).
#pragma once

#include "../hyperbolic.h"
#include "row_ops.h"
#include "simd.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace pairwise {

template <class V>
struct Facts {
  V square, factor;
};

// One pair's share of the gradients: x' = alpha x - kappa y, y' = beta y - kappa x.
template <class V>
struct PairGradient {
  V kappa, alpha, beta, curvature;
};

// Below this share of its terms a difference is redone from the coordinates. Of thousands of rows in few dimensions,
// some have one close pair that outweighs the rest: with 1/64 such a row has four times the error of the plain formula.
constexpr double kNearShare = 1.0 / 8;

// The gradients of a value computed from differences, alpha and beta less kappa:
// x' = (2xx' - xd') x + (xd' - 2dd') d, y' = (2yy' + xd') y + (2dd' - xd') d, so kappa = 2dd' - xd'.
template <class V, class Value>
PairGradient<V> gradient_by_differences(const DifferenceSums<V>& p, V c, V g, Value value_of) {
  using D = Dual<V, 5>;
  const D value = value_of(
      DifferenceSums<D>{D::variable(p.xx, 0), D::variable(p.yy, 1), D::variable(p.xd, 2), D::variable(p.dd, 3)},
      D::variable(c, 4));
  const V *by = value.slope, two(2);
  return {g * (two * by[3] - by[2]), g * (two * by[0] - by[2]), g * (two * by[1] + by[2]), g * by[4]};
}

template <class T>
MMKERN_FN Vec<T> lorentz_lift(Vec<T> xx, Vec<T> c) {
  return c * xx / (Vec<T>(T(1)) + lorentz_time(xx, c));
}

// sqrt(c) x_t * sqrt(c) y_t - 1
template <class T>
MMKERN_FN Vec<T> lifted_product(Facts<Vec<T>> x, Facts<Vec<T>> y) {
  return fma(x.factor, y.factor, x.factor + y.factor);
}

// The change of c|x||y|-free terms with c: d(sqrt(c) x_t sqrt(c) y_t)/dc, and the ratios of the time parts.
template <class T>
struct TimeRatios {
  Vec<T> x_by_y, y_by_x, product_by_c;

  MMKERN_FN TimeRatios(Facts<Vec<T>> x, Facts<Vec<T>> y) {
    const Vec<T> one(T(1)), x_t = one + x.factor, y_t = one + y.factor;
    x_by_y = x_t / y_t;
    y_by_x = y_t / x_t;
    product_by_c = Vec<T>(T(0.5)) * (x.square * y_by_x + y.square * x_by_y);
  }
};

template <class T>
struct LorentzInner {
  using V = Vec<T>;
  const V c;

  explicit LorentzInner(T curvature) : c(curvature) {}

  V factor(V xx) const { return lorentz_lift<T>(xx, c); }
  Mask<T, 1> is_near(V, Facts<V>, Facts<V>) const { return V(T(1)) < V(T(0)); }
  V value(V s, Facts<V> x, Facts<V> y) const { return s - (lifted_product<T>(x, y) + V(T(1))) / c; }
  V near_value(const DifferenceSums<V>& p) const { return p.xx; }  // no pair is near
  PairGradient<V> gradient(V, V g, Facts<V> x, Facts<V> y) const {
    const TimeRatios<T> time(x, y);
    const V by_c = ((lifted_product<T>(x, y) + V(T(1))) / c - time.product_by_c) / c;
    return {-g, -g * time.y_by_x, -g * time.x_by_y, g * by_c};
  }
  PairGradient<V> near_gradient(const DifferenceSums<V>& p, V) const { return {p.xx, p.xx, p.xx, p.xx}; }
};

template <class T>
struct LorentzDistance {
  using V = Vec<T>;
  const V c, inverse_root;

  explicit LorentzDistance(T curvature) : c(curvature), inverse_root(V(T(1)) / sqrt(c)) {}

  V factor(V xx) const { return lorentz_lift<T>(xx, c); }
  Mask<T, 1> is_near(V s, Facts<V> x, Facts<V> y) const {
    const V terms = lifted_product<T>(x, y);
    return terms - c * s <= V(T(kNearShare)) * terms;
  }
  V value(V s, Facts<V> x, Facts<V> y) const { return acosh1p(excess(s, x, y)) * inverse_root; }
  V near_value(const DifferenceSums<V>& p) const { return distance_of(lorentz_half_sinh_squared(p, c), c); }

  PairGradient<V> gradient(V s, V g, Facts<V> x, Facts<V> y) const {
    const TimeRatios<T> time(x, y);
    const V t = excess(s, x, y);
    const V by_excess = g * inverse_root / sqrt(t * (t + V(T(2))));
    const V kappa = by_excess * c;
    const V by_c = by_excess * (time.product_by_c - s) - g * V(T(0.5)) * acosh1p(t) * inverse_root / c;
    return {kappa, kappa * time.y_by_x, kappa * time.x_by_y, by_c};
  }
  PairGradient<V> near_gradient(const DifferenceSums<V>& p, V g) const {
    return gradient_by_differences(
        p, c, g, [](const auto& sums, const auto& k) { return distance_of(lorentz_half_sinh_squared(sums, k), k); });
  }

 private:
  // cosh(theta) - 1; NaN stays
  V excess(V s, Facts<V> x, Facts<V> y) const { return max(V(T(0)), lifted_product<T>(x, y) - c * s); }
};

template <class T>
struct PoincareDistance {
  using V = Vec<T>;
  const V c, inverse_root;

  explicit PoincareDistance(T curvature) : c(curvature), inverse_root(V(T(1)) / sqrt(c)) {}

  V factor(V xx) const { return V(T(1)) / ball_gap(c * xx); }
  Mask<T, 1> is_near(V s, Facts<V> x, Facts<V> y) const {
    const V terms = x.square + y.square;
    return terms - (s + s) <= V(T(kNearShare)) * terms;
  }
  V value(V s, Facts<V> x, Facts<V> y) const {
    return acosh1p((c + c) * x.factor * y.factor * gap(s, x, y)) * inverse_root;
  }
  V near_value(const DifferenceSums<V>& p) const { return distance_of(poincare_half_sinh_squared(p, c), c); }

  // q = c|x - y|^2 / (gap_x gap_y), value = 2/sqrt(c) asinh(sqrt(q)) = acosh(1 + 2q)/sqrt(c)
  PairGradient<V> gradient(V s, V g, Facts<V> x, Facts<V> y) const {
    const V one(T(1)), c2 = c + c, weight = c * x.factor * y.factor, q = weight * gap(s, x, y);
    const V by_q = g * inverse_root / sqrt(q * (one + q)), q_by_q = by_q * q;
    const V kappa = (by_q + by_q) * weight;
    const V by_c = q_by_q * (one / c + x.square * x.factor + y.square * y.factor) - g * value(s, x, y) / c2;
    return {kappa, kappa + q_by_q * c2 * x.factor, kappa + q_by_q * c2 * y.factor, by_c};
  }
  PairGradient<V> near_gradient(const DifferenceSums<V>& p, V g) const {
    return gradient_by_differences(
        p, c, g, [](const auto& sums, const auto& k) { return distance_of(poincare_half_sinh_squared(sums, k), k); });
  }

 private:
  V gap(V s, Facts<V> x, Facts<V> y) const { return max(V(T(0)), x.square + y.square - (s + s)); }
};

}  // namespace pairwise
}  // namespace MMKERN_ISA
}  // namespace mmkern
