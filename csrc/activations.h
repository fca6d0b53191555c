// Activations and their slopes: Activation of mmkern/reference/activations.py. The includer supplies MMKERN_FN,
// MMKERN_ISA and the functions of V, a vector on a CPU and float on CUDA.
#pragma once

namespace mmkern {
inline namespace MMKERN_ISA {
namespace activation {

template <class V>
struct Point {
  V value, slope;
};

struct None {
  template <class V>
  static MMKERN_FN Point<V> at(V u) {
    return {u, V(1.0f)};
  }
};

struct Silu {
  template <class V>
  static MMKERN_FN Point<V> at(V u) {
    const V share = sigmoid(u);
    return {u * share, share * fma(u, V(1.0f) - share, V(1.0f))};
  }
};

struct Gelu {
  template <class V>
  static MMKERN_FN Point<V> at(V u) {
    const V below = normal_cdf(u);
    return {u * below, fma(u * V(0.39894228040143268), exp_flushed(u * u * V(-0.5f)), below)};
  }
};

struct GeluTanh {
  // (1 + tanh z) / 2 = sigmoid(2 z)
  template <class V>
  static MMKERN_FN Point<V> at(V u) {
    constexpr double kScale = 2 * 0.79788456080286536, kCube = kScale * 0.044715;
    const V square = u * u, share = sigmoid(u * fma(square, V(kCube), V(kScale)));
    const V inner = fma(square, V(3 * kCube), V(kScale));
    return {u * share, fma(u * share * (V(1.0f) - share), inner, share)};
  }
};

struct Relu {
  template <class V>
  static MMKERN_FN Point<V> at(V u) {
    const V zero(0.0f);
    return {select(u < zero, zero, u), select(u <= zero, zero, V(1.0f))};  // NaN stays NaN
  }
};

// f(A{}) for the activation of this code.
template <class F>
MMKERN_FN void with(int code, F f) {
  switch (code) {
    case 1: return f(Silu{});
    case 2: return f(Gelu{});
    case 3: return f(GeluTanh{});
    case 4: return f(Relu{});
    default: return f(None{});
  }
}

}  // namespace activation
}  // namespace MMKERN_ISA
}  // namespace mmkern
