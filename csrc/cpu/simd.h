// Vectors of floats and doubles, written once and compiled for each ISA level.
//
// Vec<T, R> is R registers of the level's native width: 16 bytes (x86-64-v2, aarch64), 32 (AVX2) or 64 (AVX-512). The
// width is fixed because GCC turns vectors wider than the machine's into scalar code. All names live in a namespace of
// the level (-DMMKERN_ISA=v2, avx2 or avx512, beside the matching -march), everything is inlined and nothing comes from
// std, so that the linker cannot keep one level's copy of a function for another level.
#pragma once

#include <math.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef MMKERN_ISA
#define MMKERN_ISA baseline
#endif
#ifndef MMKERN_FN
#define MMKERN_FN inline __attribute__((always_inline))
#endif

namespace mmkern {
inline namespace MMKERN_ISA {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define MMKERN_AVX512 1
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MMKERN_AVX2 1
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Whether fma rounds once.
#if defined(MMKERN_AVX512) || defined(MMKERN_AVX2) || defined(__aarch64__)
constexpr bool kFusesMultiplyAdd = true;
#else
constexpr bool kFusesMultiplyAdd = false;
#endif

inline bool has_dot_pairs() {
#if defined(MMKERN_AVX512)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

template <class S>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class S>
using accumulate_t = typename Accumulate<S>::type;

template <class T, int N>
struct NativeOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};
// N elements of T as one GCC vector.
template <class T, int N>
using native_t = typename NativeOf<T, N>::type;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
struct SignedOf {
  using type = int32_t;
};
template <>
struct SignedOf<double> {
  using type = int64_t;
};
template <>
struct SignedOf<int64_t> {
  using type = int64_t;
};

}  // namespace MMKERN_ISA
}  // namespace mmkern

#include "simd_native.h"

namespace mmkern {
inline namespace MMKERN_ISA {

// A truth value per lane of Vec<T, R>.
template <class T, int R>
struct Mask {
  using Native = native_t<typename SignedOf<T>::type, kLanes<T>>;
  Native r[R];

  friend MMKERN_FN Mask operator&(Mask a, Mask b) {
    for (int k = 0; k < R; ++k) a.r[k] &= b.r[k];
    return a;
  }
  friend MMKERN_FN Mask operator|(Mask a, Mask b) {
    for (int k = 0; k < R; ++k) a.r[k] |= b.r[k];
    return a;
  }
  friend MMKERN_FN Mask operator!(Mask a) {
    for (int k = 0; k < R; ++k) a.r[k] = ~a.r[k];
    return a;
  }
  friend MMKERN_FN bool any(Mask a) {
    for (int k = 1; k < R; ++k) a.r[0] |= a.r[k];
    return any_lane(a.r[0]);
  }
  friend MMKERN_FN bool all(Mask a) { return !any(!a); }
  // Scalar: for (i < size) bits |= uint64_t(a[i]) << i;
  friend MMKERN_FN uint64_t bits_of(Mask a) {
    constexpr int kLane = int(sizeof(Native) / sizeof(a.r[0][0]));
    uint64_t bits = 0;
    for (int k = 0; k < R; ++k) bits |= uint64_t(lane_bits(a.r[k])) << (k * kLane);
    return bits;
  }
};

template <class T, int R = 1>
struct Vec {
  static constexpr int kLane = kLanes<T>;
  static constexpr int size = R * kLane;
  using Native = native_t<T, kLane>;
  Native r[R];

  MMKERN_FN Vec() {}
  MMKERN_FN Vec(T x) {
    for (int k = 0; k < R; ++k) r[k] = x - Native{};  // x - 0 is x for every x, -0 and NaN too, and costs nothing
  }

  // S is T, or a 16-bit type where T is float.
  template <class S>
  static MMKERN_FN Vec load(const S* p) {
    Vec v;
    for (int k = 0; k < R; ++k) load_lanes(v.r[k], p + k * kLane);
    return v;
  }
  // The first n lanes; the others are 0 and their memory is not touched.
  template <class S>
  static MMKERN_FN Vec load(const S* p, int n) {
    Vec v;
    for (int k = 0; k < R; ++k) load_lanes(v.r[k], p + k * kLane, lanes_in(k, n));
    return v;
  }
  // 16-bit types round to nearest even; NaN stays NaN.
  template <bool kStream = false, class S>
  MMKERN_FN void store(S* p) const {
    for (int k = 0; k < R; ++k) store_lanes<kStream>(r[k], p + k * kLane);
  }
  template <class S>
  MMKERN_FN void store(S* p, int n) const {
    for (int k = 0; k < R; ++k) store_lanes(r[k], p + k * kLane, lanes_in(k, n));
  }

  MMKERN_FN T operator[](int i) const { return r[i / kLane][i % kLane]; }
  MMKERN_FN void set(int i, T value) { r[i / kLane][i % kLane] = value; }

  MMKERN_FN Vec& operator+=(Vec b) { return *this = *this + b; }
  MMKERN_FN Vec& operator-=(Vec b) { return *this = *this - b; }
  MMKERN_FN Vec& operator*=(Vec b) { return *this = *this * b; }
  MMKERN_FN Vec& operator/=(Vec b) { return *this = *this / b; }

  friend MMKERN_FN Vec operator+(Vec a, Vec b) {
    for (int k = 0; k < R; ++k) a.r[k] = a.r[k] + b.r[k];
    return a;
  }
  friend MMKERN_FN Vec operator-(Vec a, Vec b) {
    for (int k = 0; k < R; ++k) a.r[k] = a.r[k] - b.r[k];
    return a;
  }
  friend MMKERN_FN Vec operator*(Vec a, Vec b) {
    for (int k = 0; k < R; ++k) a.r[k] = a.r[k] * b.r[k];
    return a;
  }
  friend MMKERN_FN Vec operator/(Vec a, Vec b) {
    for (int k = 0; k < R; ++k) a.r[k] = a.r[k] / b.r[k];
    return a;
  }
  friend MMKERN_FN Vec operator-(Vec a) {
    for (int k = 0; k < R; ++k) a.r[k] = -a.r[k];
    return a;
  }

  friend MMKERN_FN Mask<T, R> operator<(Vec a, Vec b) {
    Mask<T, R> m;
    for (int k = 0; k < R; ++k) m.r[k] = (typename Mask<T, R>::Native)(a.r[k] < b.r[k]);
    return m;
  }
  friend MMKERN_FN Mask<T, R> operator<=(Vec a, Vec b) {
    Mask<T, R> m;
    for (int k = 0; k < R; ++k) m.r[k] = (typename Mask<T, R>::Native)(a.r[k] <= b.r[k]);
    return m;
  }
  friend MMKERN_FN Mask<T, R> operator==(Vec a, Vec b) {
    Mask<T, R> m;
    for (int k = 0; k < R; ++k) m.r[k] = (typename Mask<T, R>::Native)(a.r[k] == b.r[k]);
    return m;
  }
  friend MMKERN_FN Mask<T, R> operator>(Vec a, Vec b) { return b < a; }
  friend MMKERN_FN Mask<T, R> operator>=(Vec a, Vec b) { return b <= a; }
  friend MMKERN_FN Mask<T, R> operator!=(Vec a, Vec b) { return !(a == b); }

  // a where the mask holds, else b
  friend MMKERN_FN Vec select(Mask<T, R> m, Vec a, Vec b) {
    for (int k = 0; k < R; ++k) a.r[k] = m.r[k] ? a.r[k] : b.r[k];
    return a;
  }
  // a < b ? a : b, so b wherever either is NaN, and b of two zeros
  friend MMKERN_FN Vec min(Vec a, Vec b) {
    for (int k = 0; k < R; ++k) a.r[k] = min_lanes(a.r[k], b.r[k]);
    return a;
  }
  // a > b ? a : b, so b wherever either is NaN, and b of two zeros
  friend MMKERN_FN Vec max(Vec a, Vec b) {
    for (int k = 0; k < R; ++k) a.r[k] = max_lanes(a.r[k], b.r[k]);
    return a;
  }
  // a * b + c: rounded once if kFusesMultiplyAdd, else twice
  friend MMKERN_FN Vec fma(Vec a, Vec b, Vec c) {
    for (int k = 0; k < R; ++k) a.r[k] = fma_lanes(a.r[k], b.r[k], c.r[k]);
    return a;
  }
#if defined(MMKERN_AVX512)
  // a.x * b.x + a.y * b.y + c of lanes that hold a pair of bf16, rounded twice; subnormal numbers count as 0. Twice the
  // terms of an fma in its time, where has_dot_pairs().
  friend MMKERN_FN Vec dot_pairs(Vec a, Vec b, Vec c) {
    for (int k = 0; k < R; ++k) a.r[k] = dot_pairs_lanes(a.r[k], b.r[k], c.r[k]);
    return a;
  }
#endif
  friend MMKERN_FN Vec sqrt(Vec a) {
    for (int k = 0; k < R; ++k) a.r[k] = sqrt_lanes(a.r[k]);
    return a;
  }
  friend MMKERN_FN Vec abs(Vec a) {
    using Bits = typename Mask<T, R>::Native;
    constexpr auto keep = ~((typename SignedOf<T>::type)(1) << (8 * sizeof(T) - 1));
    for (int k = 0; k < R; ++k) a.r[k] = (Native)((Bits)a.r[k] & keep);
    return a;
  }

  // Scalar: for (i < size) total += v[i];  as a tree: registers, then halves of a register
  friend MMKERN_FN T sum(Vec v) {
    for (int step = 1; step < R; step *= 2)
      for (int k = 0; k + step < R; k += 2 * step) v.r[k] += v.r[k + step];
    return fold(v.r[0], [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
  }
  // Scalar: for (i < size) top = v[i] > top ? v[i] : top;  a NaN may be dropped
  friend MMKERN_FN T max_of(Vec v) {
    for (int k = 1; k < R; ++k) v.r[0] = max_lanes(v.r[0], v.r[k]);
    return fold(v.r[0], [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
  }

  // Scalar: for (i < size) if (m[i]) to[n++] = v[i];  returns n; behind these, up to `size` numbers may be overwritten
  friend MMKERN_FN int compress(Vec v, Mask<T, R> m, T* to) {
    int n = 0;
    for (int k = 0; k < R; ++k) n += compress_lanes(v.r[k], m.r[k], to + n);
    return n;
  }

 private:
  static MMKERN_FN int lanes_in(int k, int n) {
    const int left = n - k * kLane;
    return left < 0 ? 0 : left > kLane ? kLane : left;
  }
};

template <int... L>
struct LaneList {};

template <int kWhich, int... L>
MMKERN_FN native_t<double, kLanes<double>> half_in_double(Vec<float> v, LaneList<L...>) {
  constexpr int kHalf = kLanes<double>;
  const auto half = __builtin_shufflevector(v.r[0], v.r[0], (L + kWhich * kHalf)...);
  return __builtin_convertvector(half, native_t<double, kHalf>);
}

// The same numbers in double.
template <int kHalf = kLanes<double>>
MMKERN_FN Vec<double, 2> in_double(Vec<float> v) {
  constexpr LaneList<__integer_pack(kHalf)...> lanes;
  Vec<double, 2> wide;
  wide.r[0] = half_in_double<0>(v, lanes);
  wide.r[1] = half_in_double<1>(v, lanes);
  return wide;
}
MMKERN_FN Vec<double> in_double(Vec<double> v) { return v; }

template <int... L>
MMKERN_FN NativeFloat joined(native_t<double, kLanes<double>> low, native_t<double, kLanes<double>> high,
                             LaneList<L...>) {
  using Half = native_t<float, kLanes<double>>;
  return __builtin_shufflevector(__builtin_convertvector(low, Half), __builtin_convertvector(high, Half), L...);
}

// Rounded to the type of sums.
template <int kWhole = kLanes<float>>
MMKERN_FN Vec<float> rounded(Vec<double, 2> v) {
  Vec<float> single;
  single.r[0] = joined(v.r[0], v.r[1], LaneList<__integer_pack(kWhole)...>{});
  return single;
}
MMKERN_FN Vec<double> rounded(Vec<double> v) { return v; }

// A sum in double.
template <class T>
class WideSum {
 public:
  MMKERN_FN void add(Vec<T> v) { sums_ += in_double(v); }
  MMKERN_FN double total() const { return sum(sums_); }

 private:
  decltype(in_double(Vec<T>())) sums_ = 0.0;
};

template <int Step, class Native, int... L>
MMKERN_FN void swap_blocks(Native& a, Native& b, LaneList<L...>) {
  constexpr int W = sizeof...(L);
  const Native top = __builtin_shufflevector(a, b, (L & Step ? W + L - Step : L)...);
  b = __builtin_shufflevector(a, b, (L & Step ? W + L : L + Step)...);
  a = top;
}

// Scalar: for (i < W) for (j < i) swap(rows[i][j], rows[j][i]);  by swapping blocks of Step, 2 Step, ...
template <int Step = 1, class T>
MMKERN_FN void transpose(Vec<T> (&rows)[Vec<T>::size]) {
  constexpr int W = Vec<T>::size;
  if constexpr (Step < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (!(i & Step)) swap_blocks<Step>(rows[i].r[0], rows[i + Step].r[0], LaneList<__integer_pack(W)...>{});
    transpose<2 * Step>(rows);
  }
}

// Scalar: for (i < W) out[i] = sum(v[i]);  v is overwritten
template <int Step = 1, class T>
MMKERN_FN Vec<T> sum_of_each(Vec<T> (&v)[Vec<T>::size]) {
  constexpr int W = Vec<T>::size;
  if constexpr (Step < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2 * Step) {
      swap_blocks<Step>(v[i].r[0], v[i + Step].r[0], LaneList<__integer_pack(W)...>{});
      v[i] += v[i + Step];
    }
    return sum_of_each<2 * Step>(v);
  }
  return v[0];
}

#if defined(MMKERN_AVX2)
// Scalar: for (i < 4) for (j < 8) to[i][j] = from[j * stride + i]
// Halves are put together as they are loaded, so that no shuffle crosses the middle of a register.
MMKERN_FN void load_four_columns(const float* from, int64_t stride, Vec<float>* to) {
  native_t<float, 8> v[4], pairs[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    native_t<float, 4> low, high;
    load_native<float, 4>(low, from + i * stride);
    load_native<float, 4>(high, from + (i + 4) * stride);
    v[i] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    pairs[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 2] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    to[2 * i].r[0] = __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13);
    to[2 * i + 1].r[0] = __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  }
}
#endif

// The transpose of a whole block: to[i] holds from[i], from[stride + i], from[2 stride + i], ...
template <class T, class S>
MMKERN_FN void load_transposed(const S* from, int64_t stride, Vec<T> (&to)[Vec<T>::size]) {
#if defined(MMKERN_AVX2)
  if constexpr (sizeof(S) == sizeof(float) && sizeof(T) == sizeof(float)) {
    load_four_columns(from, stride, to);
    return load_four_columns(from + 4, stride, to + 4);
  }
#endif
#pragma GCC unroll 16
  for (int r = 0; r < Vec<T>::size; ++r) to[r] = Vec<T>::load(from + r * stride);
  transpose(to);
}

}  // namespace MMKERN_ISA
}  // namespace mmkern

#include "simd_math.h"
