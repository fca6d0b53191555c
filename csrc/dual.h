// Forward-mode dual numbers: a value with its derivatives along N directions.
//
// A row's scalar maths is written once, over a number type F. Run with F = Dual<V, N> the same text yields the
// derivatives that the backward kernel needs. V is float or double (CUDA) or a vector of rows (CPU).
#pragma once

#ifndef MMKERN_FN
#define MMKERN_FN inline __attribute__((always_inline))
#endif
#ifndef MMKERN_ISA
#define MMKERN_ISA device
#endif

namespace mmkern {
inline namespace MMKERN_ISA {

template <class F>
struct ScalarOf;
template <>
struct ScalarOf<float> {
  using type = float;
};
template <>
struct ScalarOf<double> {
  using type = double;
};
template <class F>
using scalar_t = typename ScalarOf<F>::type;

template <class V, int N>
struct Dual {
  V value;
  V slope[N];

  MMKERN_FN Dual() {}
  MMKERN_FN Dual(V constant) : value(constant) {
    for (int k = 0; k < N; ++k) slope[k] = V(0);
  }

  // The k-th independent variable.
  static MMKERN_FN Dual variable(V value, int k) {
    Dual x(value);
    x.slope[k] = V(1);
    return x;
  }

  // f(x) with derivative `derivative` at x.
  MMKERN_FN Dual chain(V f, V derivative) const {
    Dual y;
    y.value = f;
    for (int k = 0; k < N; ++k) y.slope[k] = derivative * slope[k];
    return y;
  }
};

template <class V, int N>
struct ScalarOf<Dual<V, N>> {
  using type = scalar_t<V>;
};

// The value of a number without its derivatives.
template <class F>
MMKERN_FN F primal(F x) {
  return x;
}
template <class V, int N>
MMKERN_FN V primal(const Dual<V, N>& x) {
  return x.value;
}

template <class V, int N>
MMKERN_FN Dual<V, N> operator+(const Dual<V, N>& a, const Dual<V, N>& b) {
  Dual<V, N> y;
  y.value = a.value + b.value;
  for (int k = 0; k < N; ++k) y.slope[k] = a.slope[k] + b.slope[k];
  return y;
}

template <class V, int N>
MMKERN_FN Dual<V, N> operator-(const Dual<V, N>& a, const Dual<V, N>& b) {
  Dual<V, N> y;
  y.value = a.value - b.value;
  for (int k = 0; k < N; ++k) y.slope[k] = a.slope[k] - b.slope[k];
  return y;
}

template <class V, int N>
MMKERN_FN Dual<V, N> operator*(const Dual<V, N>& a, const Dual<V, N>& b) {
  Dual<V, N> y;
  y.value = a.value * b.value;
  for (int k = 0; k < N; ++k) y.slope[k] = a.slope[k] * b.value + a.value * b.slope[k];
  return y;
}

template <class V, int N>
MMKERN_FN Dual<V, N> operator/(const Dual<V, N>& a, const Dual<V, N>& b) {
  Dual<V, N> y;
  const V inverse = V(1) / b.value;
  y.value = a.value * inverse;
  for (int k = 0; k < N; ++k) y.slope[k] = (a.slope[k] - y.value * b.slope[k]) * inverse;
  return y;
}

template <class M, class V, int N>
MMKERN_FN Dual<V, N> select(M mask, const Dual<V, N>& a, const Dual<V, N>& b) {
  Dual<V, N> y;
  y.value = select(mask, a.value, b.value);
  for (int k = 0; k < N; ++k) y.slope[k] = select(mask, a.slope[k], b.slope[k]);
  return y;
}

template <class V, int N>
MMKERN_FN Dual<V, N> sqrt(const Dual<V, N>& x) {
  const V root = sqrt(x.value);
  return x.chain(root, V(scalar_t<V>(0.5)) / root);
}

template <class V, int N>
MMKERN_FN Dual<V, N> atan2(const Dual<V, N>& y, const Dual<V, N>& x) {
  const V squares = x.value * x.value + y.value * y.value;
  const V inverse = select(squares > V(0), V(1) / squares, V(0));
  Dual<V, N> angle;
  angle.value = atan2(y.value, x.value);
  for (int k = 0; k < N; ++k) angle.slope[k] = (x.value * y.slope[k] - y.value * x.slope[k]) * inverse;
  return angle;
}

}  // namespace MMKERN_ISA
}  // namespace mmkern
