// Hyperbolic space of curvature -c: the scalar maths of one row, shared by the CPU and the CUDA kernels.
//
// A row-wise op takes a few inner products of the row's vectors, does scalar maths on them, and returns either that
// scalar or a combination of the vectors with it. This file is the middle step. F is a number: float, double, a vector
// of rows, or a Dual of one of these, which gives the backward. The includer supplies select, sqrt, sinh, cosh, tanh,
// asinh, atanh and atan2 for its numbers. What each op means: mmkern/reference/hyperbolic.py.
#pragma once

#include "dual.h"

namespace mmkern {
inline namespace MMKERN_ISA {

// sinh(r)/r and its relatives as smooth functions of z = r^2: below a cutoff the Taylor series, for value and slope.

struct SinhcSeries {
  static constexpr double at(int k) {
    constexpr double c[] = {1.0,          1.0 / 6,        1.0 / 120,        1.0 / 5040,
                            1.0 / 362880, 1.0 / 39916800, 1.0 / 6227020800, 1.0 / 1307674368000};
    return c[k];
  }
};
struct AsinhcSeries {
  static constexpr double at(int k) {
    constexpr double c[] = {1.0,          -1.0 / 6,     3.0 / 40,      -15.0 / 336,
                            105.0 / 3456, -63.0 / 2816, 231.0 / 13312, -143.0 / 10240};
    return c[k];
  }
};
struct TanhcSeries {
  static constexpr double at(int k) {
    constexpr double c[] = {1.0,         -1.0 / 3,         2.0 / 15,          -17.0 / 315,
                            62.0 / 2835, -1382.0 / 155925, 21844.0 / 6081075, -929569.0 / 638512875};
    return c[k];
  }
};
struct AtanhcSeries {
  static constexpr double at(int k) { return 1.0 / (2 * k + 1); }
};

template <class Series, int K = 0, class V>
MMKERN_FN V series(V z) {
  constexpr double c = Series::at(K);
  if constexpr (K == 7) {
    return V(scalar_t<V>(c));
  } else {
    return series<Series, K + 1>(z) * z + V(scalar_t<V>(c));
  }
}

template <class Series, int K = 1, class V>
MMKERN_FN V series_slope(V z) {
  constexpr double c = K * Series::at(K);
  if constexpr (K == 7) {
    return V(scalar_t<V>(c));
  } else {
    return series_slope<Series, K + 1>(z) * z + V(scalar_t<V>(c));
  }
}

struct Sinhc {
  using Series = SinhcSeries;
  template <class V>
  static MMKERN_FN V value(V z) {
    const V r = sqrt(z);
    return sinh(r) / r;
  }
  template <class V>
  static MMKERN_FN V slope(V z, V value) {
    return (cosh(sqrt(z)) - value) / (z + z);
  }
};

struct Asinhc {
  using Series = AsinhcSeries;
  template <class V>
  static MMKERN_FN V value(V z) {
    const V r = sqrt(z);
    return asinh(r) / r;
  }
  template <class V>
  static MMKERN_FN V slope(V z, V value) {
    return (V(1) / sqrt(V(1) + z) - value) / (z + z);
  }
};

struct Tanhc {
  using Series = TanhcSeries;
  template <class V>
  static MMKERN_FN V value(V z) {
    const V r = sqrt(z);
    return tanh(r) / r;
  }
  template <class V>
  static MMKERN_FN V slope(V z, V value) {
    return (V(1) - z * value * value - value) / (z + z);
  }
};

struct Atanhc {
  using Series = AtanhcSeries;
  template <class V>
  static MMKERN_FN V value(V z) {
    const V r = sqrt(z);
    return atanh(r) / r;
  }
  template <class V>
  static MMKERN_FN V slope(V z, V value) {
    return (V(1) / (V(1) - z) - value) / (z + z);
  }
};

// Of the series' eight terms, the first left out is below 4e-11 (float32) or 2e-17 (float64) at the cutoff.
template <class Function, class S>
struct SeriesCutoff {
  static constexpr S value = S(0.05);
};
template <class Function>
struct SeriesCutoff<Function, double> {
  static constexpr double value = 0.008;
};
// 4^8/17! = 2e-10: the exponential map of points whose distance is up to 2 needs no exponential.
template <>
struct SeriesCutoff<Sinhc, float> {
  static constexpr float value = 4;
};

template <class Function, class V>
MMKERN_FN auto has_series(V z) {
  return z < V(SeriesCutoff<Function, scalar_t<V>>::value);
}

template <class Function, class V>
struct Smooth {
  static MMKERN_FN V of(V z) {
    const auto small = has_series<Function>(z);
    const V near = series<typename Function::Series>(z);
    if (all(small)) return near;
    return select(small, near, Function::value(select(small, V(1), z)));
  }
};

template <class Function, class V, int N>
struct Smooth<Function, Dual<V, N>> {
  static MMKERN_FN Dual<V, N> of(const Dual<V, N>& z) {
    const auto small = has_series<Function>(z.value);
    const V value = Smooth<Function, V>::of(z.value), near = series_slope<typename Function::Series>(z.value);
    if (all(small)) return z.chain(value, near);
    const V slope = Function::slope(select(small, V(1), z.value), value);
    return z.chain(value, select(small, near, slope));
  }
};

template <class F>
MMKERN_FN F sinhc(F z) {
  return Smooth<Sinhc, F>::of(z);
}
template <class F>
MMKERN_FN F asinhc(F z) {
  return Smooth<Asinhc, F>::of(z);
}
template <class F>
MMKERN_FN F tanhc(F z) {
  return Smooth<Tanhc, F>::of(z);
}

template <class S>
struct Ulp {
  static constexpr S half = S(5.9604644775390625e-8);  // 2^-24
};
template <>
struct Ulp<double> {
  static constexpr double half = 1.1102230246251565e-16;  // 2^-53
};

// max(x, low), with derivative 0 where the bound holds. NaN stays.
template <class F>
MMKERN_FN F clamp_min(F x, scalar_t<F> low) {
  return select(primal(x) < primal(F(low)), F(low), x);
}

template <class F>
MMKERN_FN F atanhc(F z) {
  const scalar_t<F> below_one = 1 - Ulp<scalar_t<F>>::half;
  return Smooth<Atanhc, F>::of(select(primal(F(below_one)) < primal(z), F(below_one), z));
}

// sqrt with value and derivative 0 where x <= 0.
template <class F>
MMKERN_FN F safe_sqrt(F x) {
  const auto zero = primal(x) <= primal(F(scalar_t<F>(0)));
  return select(zero, F(scalar_t<F>(0)), sqrt(select(zero, F(scalar_t<F>(1)), x)));
}

template <class F>
MMKERN_FN F square(F x) {
  return x * x;
}

template <class F>
MMKERN_FN F constant(double value) {
  return F(scalar_t<F>(value));
}

// Radial maps: out = scale(z) x with z = c|x|^2. `factor` is mobius_scalar_mul's r; the others ignore it.

struct LorentzExpMap0 {
  template <class F>
  static MMKERN_FN F scale(F z, F) {
    return sinhc(z);
  }
};

struct LorentzLogMap0 {
  template <class F>
  static MMKERN_FN F scale(F z, F) {
    return asinhc(z);
  }
};

struct PoincareExpMap0 {
  template <class F>
  static MMKERN_FN F scale(F z, F) {
    return tanhc(z);
  }
};

struct PoincareLogMap0 {
  template <class F>
  static MMKERN_FN F scale(F z, F) {
    return atanhc(z);
  }
};

struct LorentzToPoincare {
  template <class F>
  static MMKERN_FN F scale(F z, F) {
    const F one = constant<F>(1);
    return one / (one + sqrt(one + z));
  }
};

// 1 - c|x|^2, held above zero: a rounded point may lie on the rim.
template <class F>
MMKERN_FN F ball_gap(F z) {
  return clamp_min(constant<F>(1) - z, Ulp<scalar_t<F>>::half);
}

struct PoincareToLorentz {
  template <class F>
  static MMKERN_FN F scale(F z, F) {
    return constant<F>(2) / ball_gap(z);
  }
};

struct MobiusScalarMul {
  template <class F>
  static MMKERN_FN F scale(F z, F factor) {
    const F scaled = factor * atanhc(z);
    return scaled * tanhc(square(scaled) * z);
  }
};

// Two points, seen through their inner products. With d = y - x near points keep their digits.

template <class F>
struct DifferenceSums {
  F xx, yy, xd, dd;
};

template <class F>
struct PlainSums {
  F xx, yy, xy;
};

// out = a x + b e, where e is y (PlainSums) or y - x (DifferenceSums).
template <class F>
struct PairCoefficients {
  F a, b;
};

// Time part times sqrt(c).
template <class F>
MMKERN_FN F lorentz_time(F xx, F c) {
  return sqrt(constant<F>(1) + c * xx);
}

// (y_t - x_t) sqrt(c)
template <class F>
MMKERN_FN F time_gap(const DifferenceSums<F>& p, F c) {
  return c * (p.xd + p.xd + p.dd) / (lorentz_time(p.xx, c) + lorentz_time(p.yy, c));
}

// sinh^2(theta/2), theta = sqrt(c) distance
template <class F>
MMKERN_FN F lorentz_half_sinh_squared(const DifferenceSums<F>& p, F c) {
  return constant<F>(0.25) * clamp_min(c * p.dd - square(time_gap(p, c)), 0);
}

template <class F>
MMKERN_FN F distance_of(F half_sinh_squared, F c) {
  return constant<F>(2) * safe_sqrt(half_sinh_squared / c) * asinhc(half_sinh_squared);
}

struct LorentzExpMap {
  template <class F>
  static MMKERN_FN PairCoefficients<F> coefficients(const PlainSums<F>& p, F c) {
    const F one = constant<F>(1);
    const F z = clamp_min(c * (p.yy - c * square(p.xy) / (one + c * p.xx)), 0);
    const F half = sinhc(constant<F>(0.25) * z);
    return {one + constant<F>(0.5) * z * square(half), sinhc(z)};
  }
};

struct LorentzLogMap {
  template <class F>
  static MMKERN_FN PairCoefficients<F> coefficients(const DifferenceSums<F>& p, F c) {
    const F s = lorentz_half_sinh_squared(p, c);
    const F scale = asinhc(s) / sqrt(constant<F>(1) + s);
    return {constant<F>(-2) * s * scale, scale};
  }
};

template <class F>
MMKERN_FN PairCoefficients<F> mobius_coefficients(F xx, F yy, F xy) {
  const F one = constant<F>(1), xy2 = xy + xy;
  const F denominator = one + xy2 + xx * yy;
  return {(one + xy2 + yy) / denominator, (one - xx) / denominator};
}

struct MobiusAdd {
  template <class F>
  static MMKERN_FN PairCoefficients<F> coefficients(const PlainSums<F>& p, F c) {
    return mobius_coefficients(c * p.xx, c * p.yy, c * p.xy);
  }
};

struct PoincareExpMap {
  template <class F>
  static MMKERN_FN PairCoefficients<F> coefficients(const PlainSums<F>& p, F c) {
    const F half_factor = constant<F>(1) / ball_gap(c * p.xx);
    const F step = half_factor * tanhc(c * square(half_factor) * p.yy);
    PairCoefficients<F> k = mobius_coefficients(c * p.xx, c * square(step) * p.yy, c * step * p.xy);
    return {k.a, k.b * step};
  }
};

template <class F>
MMKERN_FN F poincare_half_sinh_squared(const DifferenceSums<F>& p, F c) {
  return c * p.dd / (ball_gap(c * p.xx) * ball_gap(c * p.yy));
}

struct PoincareLogMap {
  template <class F>
  static MMKERN_FN PairCoefficients<F> coefficients(const DifferenceSums<F>& p, F c) {
    const F s = poincare_half_sinh_squared(p, c);
    const F scale = asinhc(s) / (sqrt(constant<F>(1) + s) * ball_gap(c * p.yy));
    return {constant<F>(0) - c * p.dd * scale, ball_gap(c * p.xx) * scale};
  }
};

struct LorentzDistance {
  template <class F>
  static MMKERN_FN F value(const DifferenceSums<F>& p, F c, scalar_t<F>) {
    return distance_of(lorentz_half_sinh_squared(p, c), c);
  }
};

struct PoincareDistance {
  template <class F>
  static MMKERN_FN F value(const DifferenceSums<F>& p, F c, scalar_t<F>) {
    return distance_of(poincare_half_sinh_squared(p, c), c);
  }
};

template <class F>
MMKERN_FN F half_aperture(F z, scalar_t<F> min_radius) {
  const F opposite(2 * min_radius), one = constant<F>(1);
  const F adjacent_squared = z - square(opposite);
  const auto inside = primal(adjacent_squared) <= primal(constant<F>(0));
  const F angle = atan2(opposite, sqrt(select(inside, one, adjacent_squared)));
  return select(inside, constant<F>(1.5707963267948966), angle);
}

struct LorentzHalfAperture {
  template <class F>
  static MMKERN_FN F value(F z, scalar_t<F> min_radius) {
    return half_aperture(z, min_radius);
  }
};

template <class F>
MMKERN_FN F exterior_angle(const DifferenceSums<F>& p, F c) {
  const F zero = constant<F>(0);
  const F xx = c * p.xx, xd = c * p.xd, dd = c * p.dd;
  const F x_t = lorentz_time(p.xx, c);
  const F along = x_t * xd - xx * time_gap(p, c);
  const F across = clamp_min(xx * dd - square(xd), 0);
  const auto none = (primal(along) == primal(zero)) & (primal(across) == primal(zero));
  const auto at_root = (primal(xx) == primal(zero)) & (primal(dd) > primal(zero));
  const F angle = atan2(safe_sqrt(across), select(none, constant<F>(1), along));
  return select(at_root, constant<F>(1.5707963267948966), angle);
}

struct LorentzExteriorAngle {
  template <class F>
  static MMKERN_FN F value(const DifferenceSums<F>& p, F c, scalar_t<F>) {
    return exterior_angle(p, c);
  }
};

struct LorentzEntailmentLoss {
  template <class F>
  static MMKERN_FN F value(const DifferenceSums<F>& p, F c, scalar_t<F> min_radius) {
    return clamp_min(exterior_angle(p, c) - half_aperture(c * p.xx, min_radius), 0);
  }
};

// Parallel transport of u from x to y: out = u + scale (x + y).

template <class F>
struct TransportSums {
  DifferenceSums<F> pair;
  F xu, du;
};

struct LorentzParallelTransport {
  template <class F>
  static MMKERN_FN F scale(const TransportSums<F>& p, F c) {
    const F inner = p.du - p.xu * time_gap(p.pair, c) / lorentz_time(p.pair.xx, c);
    const F s = lorentz_half_sinh_squared(p.pair, c);
    return c * inner / (constant<F>(2) + s + s);
  }
};

}  // namespace MMKERN_ISA
}  // namespace mmkern
