// Elementary functions of vectors. Part of simd.h.
//
// Each holds over the whole range: subnormals, overflow to inf, both zeros, inf and NaN. The bound beside each is the
// largest error in units of the last place of the true result, measured in tests/test_simd.py. Polynomials are minimax
// fits for the relative error of the function over the interval named. In double every function is libm's, a lane at a
// time.
#pragma once

namespace mmkern {
inline namespace MMKERN_ISA {

// The bit patterns of Vec<float, R>.
template <int R>
struct Bits {
  NativeInt r[R];

  explicit MMKERN_FN Bits(Vec<float, R> v) {
    for (int k = 0; k < R; ++k) r[k] = (NativeInt)v.r[k];
  }
  MMKERN_FN Vec<float, R> as_float() const {
    Vec<float, R> v;
    for (int k = 0; k < R; ++k) v.r[k] = (NativeFloat)r[k];
    return v;
  }
  MMKERN_FN Vec<float, R> to_float() const {
    Vec<float, R> v;
    for (int k = 0; k < R; ++k) v.r[k] = __builtin_convertvector(r[k], NativeFloat);
    return v;
  }
  friend MMKERN_FN Bits operator+(Bits a, int32_t b) {
    for (int k = 0; k < R; ++k) a.r[k] += b;
    return a;
  }
  friend MMKERN_FN Bits operator-(int32_t a, Bits b) {
    for (int k = 0; k < R; ++k) b.r[k] = a - b.r[k];
    return b;
  }
  friend MMKERN_FN Bits operator-(Bits a, Bits b) {
    for (int k = 0; k < R; ++k) a.r[k] -= b.r[k];
    return a;
  }
  friend MMKERN_FN Bits operator&(Bits a, int32_t b) {
    for (int k = 0; k < R; ++k) a.r[k] &= b;
    return a;
  }
  friend MMKERN_FN Bits operator|(Bits a, Bits b) {
    for (int k = 0; k < R; ++k) a.r[k] |= b.r[k];
    return a;
  }
  friend MMKERN_FN Bits operator<<(Bits a, int n) {
    for (int k = 0; k < R; ++k) a.r[k] <<= n;
    return a;
  }
  friend MMKERN_FN Bits operator>>(Bits a, int n) {  // keeps the sign
    for (int k = 0; k < R; ++k) a.r[k] >>= n;
    return a;
  }
};

constexpr float kInf = __builtin_inff();
constexpr float kNan = __builtin_nanf("");
constexpr float kLn2Hi = 0.693115234375f;  // 12 bits, so that a whole number times it is exact
constexpr float kLn2Lo = 3.19461833e-5f;
constexpr float kPi = 3.14159274f;
constexpr float kPiLo = -8.74227766e-8f;

// |magnitude| with the sign of sign; magnitude >= 0
template <int R>
MMKERN_FN Vec<float, R> with_sign(Vec<float, R> magnitude, Vec<float, R> sign) {
  return (Bits<R>(magnitude) | (Bits<R>(sign) & INT32_MIN)).as_float();
}

// Lanes with the sign bit set, -0 and NaN included.
template <int R>
MMKERN_FN Mask<float, R> is_negative(Vec<float, R> x) {
  Mask<float, R> m;
  for (int k = 0; k < R; ++k) m.r[k] = (NativeInt)x.r[k] < 0;
  return m;
}

// c[0] + c[1] x + c[2] x^2 + ...
template <int R>
MMKERN_FN Vec<float, R> polynomial(Vec<float, R>, float c) {
  return c;
}
template <int R, class... C>
MMKERN_FN Vec<float, R> polynomial(Vec<float, R> x, float c, C... higher) {
  return fma(polynomial(x, higher...), x, Vec<float, R>(c));
}

// The same of many c, |x| <= 1: even and odd powers apart are two chains, each half as long; the first three c, which
// rounding would show in, come one by one.
template <int R, class... C>
MMKERN_FN Vec<float, R> long_polynomial(Vec<float, R> x, float c0, float c1, float c2, C... c) {
  using V = Vec<float, R>;
  constexpr int kEven = (int(sizeof...(C)) - 1) / 2 * 2, kOdd = int(sizeof...(C)) / 2 * 2 - 1;  // the last of each
  const float all[] = {c...};
  const V square = x * x;
  V even(all[kEven]), odd(all[kOdd]);
#pragma GCC unroll 16
  for (int i = kEven - 2; i >= 0; i -= 2) even = fma(even, square, V(all[i]));
#pragma GCC unroll 16
  for (int i = kOdd - 2; i >= 0; i -= 2) odd = fma(odd, square, V(all[i]));
  return fma(fma(fma(fma(odd, x, even), x, V(c2)), x, V(c1)), x, V(c0));
}

// e^x = 2^n (1 + q), with |x - n ln 2| <= ln(2)/2
template <int R>
struct ExpParts {
  Bits<R> n;
  Vec<float, R> whole;  // n
  Vec<float, R> q;
};

// |x| < 2^20
template <int R>
MMKERN_FN ExpParts<R> exp_parts(Vec<float, R> x) {
  using V = Vec<float, R>;
  const V shift = 0x1.8p23f;  // adding it rounds to a whole number, which then is the low bits
  const V shifted = fma(x, V(1.44269504f), shift);
  const V whole = shifted - shift;
  const V exact = fma(whole, V(-kLn2Hi), x);
  const V r = fma(whole, V(-kLn2Lo), exact);
  const V lost = fma(whole, V(-kLn2Lo), exact - r);
  const V p = polynomial(r, 5.0e-01f, 1.6666545e-01f, 4.166675e-02f, 8.366409e-03f, 1.3907817e-03f);
  return {Bits<R>(shifted) - Bits<R>(shift), whole, r + fma(r * r, p, lost)};
}

// 2^n for -126 <= n <= 127
template <int R>
MMKERN_FN Vec<float, R> power_of_two(Bits<R> n) {
  return ((n + 127) << 23).as_float();
}

// v 2^n for |n| <= 250, rounded once
template <int R>
MMKERN_FN Vec<float, R> scale_by(Vec<float, R> v, Bits<R> n) {
  const Bits<R> half = n >> 1;
  return v * power_of_two(half) * power_of_two(n - half);
}

// e^x / 2 for x >= 0, without overflow below 89.4
template <int R>
MMKERN_FN Vec<float, R> half_exp(Vec<float, R> x) {
  const ExpParts<R> e = exp_parts(min(Vec<float, R>(91.0f), x));
  return scale_by(1.0f + e.q, e.n + -1);
}

// 1 ulp
template <int R>
MMKERN_FN Vec<float, R> exp(Vec<float, R> x) {
  using V = Vec<float, R>;
  const ExpParts<R> e = exp_parts(min(V(89.0f), max(V(-104.0f), x)));
  return scale_by(1.0f + e.q, e.n);
}

// e^x for x <= 88, infinity for 88.5, and 0 where it is below 2^-126: for weights, whose small ones drown in a sum.
// Half the work of exp. 2 + |x| / 2 ulp; without fma 2 + 1.25 |x|.
template <int R>
MMKERN_FN Vec<float, R> exp_flushed(Vec<float, R> x) {
  using V = Vec<float, R>;
  const V shift = 0x1.8p23f + 127.0f;  // adding it leaves the exponent's bits of 2^n lowest
  const V bounded = max(V(-88.0f), x);
  const V shifted = fma(bounded, V(1.44269504f), shift);
  const V f = fma(bounded, V(1.44269504f), shift - shifted);
  const V p = polynomial(f, 1.0f, 6.931470e-01f, 2.4022242e-01f, 5.5507336e-02f, 9.671513e-03f, 1.3264727e-03f);
  return p * (Bits<R>(shifted) << 23).as_float();
}

// 1.8 ulp
template <int R>
MMKERN_FN Vec<float, R> expm1(Vec<float, R> x) {
  using V = Vec<float, R>;
  const ExpParts<R> e = exp_parts(min(V(89.0f), max(V(-30.0f), x)));
  const V half_power = power_of_two(e.n + -1);  // half, since 2^128 would overflow
  const V y = 2.0f * fma(half_power, e.q, half_power - 0.5f);
  return select(x == V(0.0f), x, y);
}

// log(1 + f) - n ln 2 for 1 + f in [sqrt(1/2), sqrt(2)]; f = -0 and n = 0 give -0
template <int R>
MMKERN_FN Vec<float, R> log_of_parts(Vec<float, R> f, Vec<float, R> n) {
  using V = Vec<float, R>;
  const V z = f * f;  // even and odd powers apart: half as long a chain
  const V even = polynomial(z, -5.0e-01f, -2.5000823e-01f, -1.6623312e-01f, -1.31607e-01f, -7.6319136e-02f);
  const V odd = polynomial(z, 3.333333e-01f, 2.0001237e-01f, 1.4201728e-01f, 1.2761155e-01f);
  return fma(n, V(-kLn2Hi), f + fma(z, fma(f, odd, even), n * -kLn2Lo));
}

// 4 quarter = 2^-n (1 - below) with 1 - below in [sqrt(1/2), sqrt(2)]; quarter normal and positive. Of x itself 2^n
// could be subnormal.
template <int R>
struct LogParts {
  Vec<float, R> n, below;
  Vec<float, R> scale;  // 2^(n + 2)

  explicit MMKERN_FN LogParts(Vec<float, R> quarter) {
    constexpr int32_t root_half = 0x3f3504f3, one = 0x3f800000, two = 2 << 23, below_one_step = (1 << 23) - 1;
    const Bits<R> steps = (root_half + below_one_step - two) - Bits<R>(quarter);  // n is this over 2^23, rounded down
    n = (steps >> 23).to_float();
    scale = ((steps & ~below_one_step) + (one + two)).as_float();
    below = fma(-quarter, scale, Vec<float, R>(1.0f));
  }
};

// 1.1 ulp
template <int R>
MMKERN_FN Vec<float, R> log(Vec<float, R> x) {
  using V = Vec<float, R>;
  const auto tiny = x < V(0x1p-100f);
  const LogParts<R> parts(x * select(tiny, V(0x1p30f), V(0.25f)));
  const V y = log_of_parts(0.0f - parts.below, parts.n + select(tiny, V(32.0f), V(0.0f)));
  const V outside = select(x == V(0.0f), V(-kInf), V(kNan));
  return select(x > V(0.0f), select(x < V(kInf), y, x), outside);
}

// log(1 + x) - less ln 2 for finite x > -1; less is 0 or -1
template <int R, class... Less>
MMKERN_FN Vec<float, R> log1p_inside(Vec<float, R> x, Less... less) {
  using V = Vec<float, R>;
  const V quarter = 0.25f;
  const V u = fma(x, quarter, quarter);
  const V lost = fma(x, quarter, -(u - quarter));  // (1 + x)/4 = u + lost
  const LogParts<R> parts(u);
  return log_of_parts(fma(lost, parts.scale, -parts.below), (parts.n + ... + less));
}

// 2 ulp
template <int R>
MMKERN_FN Vec<float, R> log1p(Vec<float, R> x) {
  using V = Vec<float, R>;
  const V outside = select(x == V(-1.0f), V(-kInf), V(kNan));
  return select(x > V(-1.0f), select(x == V(kInf), x, log1p_inside(x)), outside);
}

// x + x^3 p(x^2)
template <int R, class... C>
MMKERN_FN Vec<float, R> odd_polynomial(Vec<float, R> x, C... c) {
  const Vec<float, R> z = x * x;
  return fma(x * z, polynomial(z, c...), x);
}

// 1.8 ulp
template <int R>
MMKERN_FN Vec<float, R> sinh(Vec<float, R> x) {
  using V = Vec<float, R>;
  const V a = abs(x), h = half_exp(a);
  const V small = odd_polynomial(a, 1.6666667e-01f, 8.3333105e-03f, 1.9842896e-04f, 2.7822118e-06f);  // to 1
  return with_sign(select(a < V(1.0f), small, h - 0.25f / h), x);
}

// 1.5 ulp
template <int R>
MMKERN_FN Vec<float, R> cosh(Vec<float, R> x) {
  const Vec<float, R> h = half_exp(abs(x));
  return h + 0.25f / h;
}

// 1.8 ulp
template <int R>
MMKERN_FN Vec<float, R> tanh(Vec<float, R> x) {
  using V = Vec<float, R>;
  const V a = abs(x);
  const V small = odd_polynomial(a, -3.333333e-01f, 1.3333221e-01f, -5.394818e-02f, 2.1706894e-02f, -8.190013e-03f,
                                 2.1526811e-03f);  // to 0.625
  const V h = half_exp(min(V(10.0f), a));
  const V large = 1.0f - 1.0f / fma(h, 2.0f * h, V(0.5f));
  return with_sign(select(a < V(0.625f), small, large), x);
}

// 1.9 ulp
template <int R>
MMKERN_FN Vec<float, R> asinh(Vec<float, R> x) {
  using V = Vec<float, R>;
  const V a = abs(x);
  const V small = odd_polynomial(a, -1.6666666e-01f, 7.499907e-02f, -4.4616096e-02f, 3.003357e-02f, -2.0049587e-02f,
                                 9.256637e-03f);  // to 0.5
  // asinh(a) = log(2a) where big
  const auto big = a > V(0x1p30f);
  const V square = a * a;
  const V t = a + square / (1.0f + sqrt(1.0f + square));
  const V large = log1p_inside(select(big, a, t), select(big, V(-1.0f), V(0.0f)));
  return with_sign(select(a < V(0.5f), small, select(a < V(kInf), large, a)), x);
}

// 2.7 ulp
template <int R>
MMKERN_FN Vec<float, R> acosh(Vec<float, R> x) {
  using V = Vec<float, R>;
  // acosh(x) = log(2x) where big
  const auto big = x > V(0x1p30f);
  const V above = x - 1.0f;
  const V t = above + sqrt(above * (above + 2.0f));
  const V y = log1p_inside(select(big, x, t), select(big, V(-1.0f), V(0.0f)));
  return select(x >= V(1.0f), select((x == V(1.0f)) | (x == V(kInf)), above, y), V(kNan));
}

// acosh(1 + t), with the digits of a small t
// 2.5 ulp
template <int R>
MMKERN_FN Vec<float, R> acosh1p(Vec<float, R> t) {
  using V = Vec<float, R>;
  // To t = 3 a function without bends times sqrt(t): half the time, and the cosh of most embeddings' distances.
  const V near =
      sqrt(t) * polynomial(t, 1.41421355f, -1.17850358e-01f, 2.6507246e-02f, -7.84806533e-03f, 2.57748399e-03f,
                           -8.28618421e-04f, 2.27115093e-04f, -4.59322684e-05f, 5.79856206e-06f, -3.34467021e-07f);
  const auto is_far = !(t <= V(3.0f));
  if (!any(is_far)) return near;
  const auto big = t > V(0x1p30f);  // log(2t) there
  const V x = select(big, t, t + sqrt(t * (t + 2.0f)));
  const V far = log1p_inside(x, select(big, V(-1.0f), V(0.0f)));
  return select(is_far, select(t == V(kInf), t, far), near);
}

// 1.2 ulp
template <int R>
MMKERN_FN Vec<float, R> atanh(Vec<float, R> x) {
  using V = Vec<float, R>;
  const V a = abs(x);
  const V small = odd_polynomial(a, 3.3333337e-01f, 1.9999622e-01f, 1.4297815e-01f, 1.0929402e-01f, 1.0524434e-01f,
                                 1.6962688e-02f, 1.8513346e-01f);  // to 0.5
  const V y = 0.5f * log1p_inside(2.0f * a / (1.0f - a));
  const V large = select(a < V(1.0f), y, select(a == V(1.0f), V(kInf), V(kNan)));
  return with_sign(select(a < V(0.5f), small, large), x);
}

// 2.4 ulp
template <int R>
MMKERN_FN Vec<float, R> erf(Vec<float, R> x) {
  using V = Vec<float, R>;
  const V a = abs(x);
  const V small = fma(a,
                      polynomial(a * a, 1.2837911e-01f, -3.7612626e-01f, 1.1283585e-01f, -2.6853813e-02f,
                                 5.1883278e-03f, -8.0101937e-04f, 7.8538615e-05f),
                      a);  // to 1
  // 1 - e^p(a), up to where it rounds to 1
  const V rest = exp(polynomial(min(V(3.92f), a), -3.5372295e-04f, -1.1270400f, -6.3822568e-01f, -1.0303735e-01f,
                                2.1805309e-02f, -2.9396052e-03f, 1.8557378e-04f));
  return with_sign(select(a < V(1.0f), small, 1.0f - rest), x);
}

// (1 + erf(x / sqrt 2)) / 2, to 1.3e-7 whatever its size, for a factor of x; 0 from -5.6 down.
template <int R>
MMKERN_FN Vec<float, R> normal_cdf(Vec<float, R> x) {
  using V = Vec<float, R>;
  if (!kFusesMultiplyAdd) return fma(V(0.5f), erf(x * 0.70710678f), V(0.5f));  // half the error of a polynomial's then
  constexpr float kEnd = 5.3f;
  const V s = fma(min(V(kEnd * kEnd), x * x), V(2 / (kEnd * kEnd)), V(-1.0f));
  const V slope = long_polynomial(s, 1.3339256e-01f, -6.6518508e-02f, 4.9264163e-02f, -3.9588932e-02f, 3.2079522e-02f,
                                  -2.5298301e-02f, 1.8925836e-02f, -1.3185473e-02f, 8.8281697e-03f, -5.8495509e-03f,
                                  3.1349296e-03f, -1.0959471e-03f, 7.3207950e-04f, -7.6456595e-04f, 2.8362998e-04f);
  return max(V(0.0f), min(V(1.0f), fma(x, slope, V(0.5f))));
}

// 1.2 ulp
template <int R>
MMKERN_FN Vec<float, R> acos(Vec<float, R> x) {
  using V = Vec<float, R>;
  const V a = abs(x);
  const auto near_one = a > V(0.5f);
  // acos(x) = pi/2 - asin(x), or 2 asin(sqrt((1 - x)/2)) where that is small, mirrored for x < 0
  const V z = select(near_one, fma(a, V(-0.5f), V(0.5f)), x * x);
  const V s = select(near_one, sqrt(z), x);
  const V p = polynomial(z, 1.666666e-01f, 7.500522e-02f, 4.451339e-02f, 3.183862e-02f, 1.4319131e-02f, 3.768592e-02f);
  const V beyond = s * z * p;  // asin(s) - s, for s up to 0.5
  const V middle = 0.5f * kPi - (s - (0.5f * kPiLo - beyond));
  const V twice = 2.0f * (s + beyond);
  const V end = select(x < V(0.0f), kPi - (twice - kPiLo), twice);
  return select(near_one, end, middle);
}

// 1.7 ulp
template <int R>
MMKERN_FN Vec<float, R> atan2(Vec<float, R> y, Vec<float, R> x) {
  using V = Vec<float, R>;
  const V ay = abs(y), ax = abs(x);
  const auto steep = ay > ax;
  const V low = select(steep, ax, ay), high = select(steep, ay, ax);
  // equal ends: inf/inf counts as 1, 0/0 as 0
  const V ratio = select(low == high, select(high == V(0.0f), V(0.0f), V(1.0f)), low / high);
  const V first = odd_polynomial(ratio, -3.3333328e-01f, 1.9999716e-01f, -1.4280343e-01f, 1.1061233e-01f,
                                 -8.821461e-02f, 6.763644e-02f, -4.4983115e-02f, 2.2777429e-02f, -7.4252402e-03f,
                                 1.1344905e-03f);  // to 1
  const V quarter = select(steep, 0.5f * kPi - (first - 0.5f * kPiLo), first);
  const V angle = select(is_negative(x), kPi - (quarter - kPiLo), quarter);
  return select((x == x) & (y == y), with_sign(angle, y), x + y);
}

// sin and cos of 2 pi v, for v in [0, 1] of at most 24 bits: of whole quarters of a turn, and of what is left of
// one. 1.2 ulp each.
template <int R>
MMKERN_FN void sin_cos_of_turns(Vec<float, R> v, Vec<float, R>& sin, Vec<float, R>& cos) {
  using V = Vec<float, R>;
  constexpr float kToWhole = 12582912.0f;  // 1.5 2^23: the sum is a whole number, in its last bits
  const V quarters = v * 4.0f, shifted = quarters + kToWhole, f = quarters - (shifted - kToWhole);
  const V s = f * polynomial(f * f, 1.5707964f, -6.4596350e-01f, 7.9680030e-02f, -4.6016580e-03f),
          c = polynomial(f * f, 1.0f, -1.2337005f, 2.5366917e-01f, -2.0859936e-02f, 9.0336300e-04f);
  const Bits<R> q(shifted);
  const auto odd = is_negative((q << 31).as_float());
  const auto flipped = [](V x, Bits<R> q) { return select(is_negative((q << 30).as_float()), -x, x); };
  sin = flipped(select(odd, c, s), q);
  cos = flipped(select(odd, s, c), q + 1);
}

// Scalar: for (i < size) v[i] = f(v[i]);
template <int R>
MMKERN_FN Vec<double, R> each_lane(Vec<double, R> v, double (*f)(double)) {
  for (int i = 0; i < v.size; ++i) v.set(i, f(v[i]));
  return v;
}

// clang-format off
template <int R> MMKERN_FN Vec<double, R> exp(Vec<double, R> x) { return each_lane(x, ::exp); }
template <int R> MMKERN_FN Vec<double, R> exp_flushed(Vec<double, R> x) { return each_lane(x, ::exp); }
template <int R> MMKERN_FN Vec<double, R> expm1(Vec<double, R> x) { return each_lane(x, ::expm1); }
template <int R> MMKERN_FN Vec<double, R> log(Vec<double, R> x) { return each_lane(x, ::log); }
template <int R> MMKERN_FN Vec<double, R> log1p(Vec<double, R> x) { return each_lane(x, ::log1p); }
template <int R> MMKERN_FN Vec<double, R> sinh(Vec<double, R> x) { return each_lane(x, ::sinh); }
template <int R> MMKERN_FN Vec<double, R> cosh(Vec<double, R> x) { return each_lane(x, ::cosh); }
template <int R> MMKERN_FN Vec<double, R> tanh(Vec<double, R> x) { return each_lane(x, ::tanh); }
template <int R> MMKERN_FN Vec<double, R> asinh(Vec<double, R> x) { return each_lane(x, ::asinh); }
template <int R> MMKERN_FN Vec<double, R> acosh(Vec<double, R> x) { return each_lane(x, ::acosh); }
template <int R> MMKERN_FN Vec<double, R> acosh1p(Vec<double, R> t) { return log1p(t + sqrt(t * (t + 2.0))); }
template <int R> MMKERN_FN Vec<double, R> atanh(Vec<double, R> x) { return each_lane(x, ::atanh); }
template <int R> MMKERN_FN Vec<double, R> erf(Vec<double, R> x) { return each_lane(x, ::erf); }
template <int R> MMKERN_FN Vec<double, R> normal_cdf(Vec<double, R> x) { return 0.5 * each_lane(x * -0.7071067811865476, ::erfc); }
template <int R> MMKERN_FN Vec<double, R> acos(Vec<double, R> x) { return each_lane(x, ::acos); }
// clang-format on

template <int R>
MMKERN_FN void sin_cos_of_turns(Vec<double, R> v, Vec<double, R>& sin, Vec<double, R>& cos) {
  const Vec<double, R> angle = v * 6.283185307179586;
  sin = each_lane(angle, ::sin);
  cos = each_lane(angle, ::cos);
}

template <int R>
MMKERN_FN Vec<double, R> atan2(Vec<double, R> y, Vec<double, R> x) {
  for (int i = 0; i < y.size; ++i) y.set(i, ::atan2(y[i], x[i]));
  return y;
}

// 1 / (1 + e^-x), 0 from -88.5 down. 2.5 ulp from 0 up, below 3 + |x| / 2, without fma 3 + 1.25 |x|.
template <class T, int R>
MMKERN_FN Vec<T, R> sigmoid(Vec<T, R> x) {
  using V = Vec<T, R>;
  const V infinite(T(sizeof(T) == sizeof(float) ? 88.5 : 710.0));  // to exp_flushed
  return V(T(1)) / (V(T(1)) + exp_flushed(min(infinite, -x)));
}

}  // namespace MMKERN_ISA
}  // namespace mmkern
