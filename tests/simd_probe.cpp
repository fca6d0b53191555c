// What tests/test_simd.py and tests/test_parallel.py call: each operation of Vec over arrays, for several T and R.
#include "parallel.h"
#include "simd.h"

using namespace mmkern;

template <class T, int R>
struct Shape {};

// out[i] = expression of the vectors a, b, c; n is a multiple of every vector size
#define PROBE(name, ...)                                                                                               \
  template <class T, int R>                                                                                            \
  static void name##_loop(Shape<T, R>, const T* pa, const T* pb, const T* pc, T* out, int64_t n) {                     \
    for (int64_t i = 0; i < n; i += Vec<T, R>::size) {                                                                 \
      [[maybe_unused]] const auto a = Vec<T, R>::load(pa + i), b = Vec<T, R>::load(pb + i),                            \
                                  c = Vec<T, R>::load(pc + i);                                                         \
      const Vec<T, R> y = __VA_ARGS__;                                                                                 \
      y.store(out + i);                                                                                                \
    }                                                                                                                  \
  }                                                                                                                    \
  PROBE_AT(name, f, float, 1)                                                                                          \
  PROBE_AT(name, f, float, 2)                                                                                          \
  PROBE_AT(name, f, float, 3)                                                                                          \
  PROBE_AT(name, d, double, 1)                                                                                         \
  PROBE_AT(name, d, double, 2)

// the same, for functions too long to compile for every R
#define PROBE_MATH(name, ...)                                                                                          \
  template <class T, int R>                                                                                            \
  static void name##_loop(Shape<T, R>, const T* pa, const T* pb, const T*, T* out, int64_t n) {                        \
    for (int64_t i = 0; i < n; i += Vec<T, R>::size) {                                                                 \
      [[maybe_unused]] const auto a = Vec<T, R>::load(pa + i), b = Vec<T, R>::load(pb + i);                            \
      (__VA_ARGS__).store(out + i);                                                                                    \
    }                                                                                                                  \
  }                                                                                                                    \
  PROBE_AT(name, f, float, 1)                                                                                          \
  PROBE_AT(name, f, float, 2)                                                                                          \
  PROBE_AT(name, d, double, 1)

#define PROBE_AT(name, letter, T, R)                                                                                   \
  extern "C" void name##_##letter##R(const T* a, const T* b, const T* c, T* out, int64_t n) {                          \
    name##_loop(Shape<T, R>{}, a, b, c, out, n);                                                                       \
  }

PROBE(add, a + b)
PROBE(subtract, a - b)
PROBE(multiply, a* b)
PROBE(divide, a / b)
PROBE(negative, -a)
PROBE(absolute, abs(a))
PROBE(square_root, sqrt(a))
PROBE(fused, fma(a, b, c))
PROBE(smaller_of, min(a, b))
PROBE(larger_of, max(a, b))
PROBE(scalars, (2 * a + 1) * T(0.5))
PROBE(less, select(a < b, a, c))
PROBE(less_equal, select(a <= b, a, c))
PROBE(greater, select(a > b, a, c))
PROBE(greater_equal, select(a >= b, a, c))
PROBE(equal, select(a == b, a, c))
PROBE(different, select(a != b, a, c))
PROBE(logic, select(((a < b) & !(b < c)) | (a > c), a, b))
PROBE(broadcast, (Vec<T, R>(pa[i])))
PROBE(horizontal_sum, (Vec<T, R>(sum(a))))
PROBE(horizontal_max, (Vec<T, R>(max_of(a))))
PROBE(any_negative, (Vec<T, R>(T(any(a < T(0))))))
PROBE(all_negative, (Vec<T, R>(T(all(a < T(0))))))
PROBE(compound, [&] {
  auto y = a;
  y += b;
  y *= c;
  y -= a;
  y /= b;
  return y;
}())
PROBE(reversed, [&] {
  auto y = a;
  for (int l = 0; l < y.size; ++l) y.set(l, a[y.size - 1 - l]);
  return y;
}())

PROBE_MATH(exp, exp(a))
PROBE_MATH(exp_flushed, exp_flushed(a))
PROBE_MATH(expm1, expm1(a))
PROBE_MATH(log, log(a))
PROBE_MATH(log1p, log1p(a))
PROBE_MATH(sinh, sinh(a))
PROBE_MATH(cosh, cosh(a))
PROBE_MATH(sigmoid, sigmoid(a))
PROBE_MATH(tanh, tanh(a))
PROBE_MATH(asinh, asinh(a))
PROBE_MATH(acosh, acosh(a))
PROBE_MATH(acosh1p, acosh1p(a))
PROBE_MATH(atanh, atanh(a))
PROBE_MATH(erf, erf(a))
PROBE_MATH(normal_cdf, normal_cdf(a))
PROBE_MATH(acos, acos(a))
PROBE_MATH(atan2, atan2(a, b))
PROBE_MATH(sin_of_turns, [&] {
  auto sin = a, cos = a;
  sin_cos_of_turns(a, sin, cos);
  return sin;
}())
PROBE_MATH(cos_of_turns, [&] {
  auto sin = a, cos = a;
  sin_cos_of_turns(a, sin, cos);
  return cos;
}())

extern "C" int lanes_f() { return Vec<float>::size; }
extern "C" int lanes_d() { return Vec<double>::size; }

template <class T>
static void transposed(const T* in, T* out) {
  constexpr int W = Vec<T>::size;
  Vec<T> rows[W];
  for (int i = 0; i < W; ++i) rows[i] = Vec<T>::load(in + i * W);
  transpose(rows);
  for (int i = 0; i < W; ++i) rows[i].store(out + i * W);
}
extern "C" void transpose_f(const float* in, float* out) { transposed(in, out); }
extern "C" void transpose_d(const double* in, double* out) { transposed(in, out); }

// Whole and partial loads and stores between S and T.
#define STORAGE(name, S, T, R)                                                                                         \
  extern "C" void load_##name(const S* in, T* out, int64_t n) {                                                        \
    for (int64_t i = 0; i < n; i += Vec<T, R>::size) Vec<T, R>::load(in + i).store(out + i);                           \
  }                                                                                                                    \
  extern "C" void store_##name(const T* in, S* out, int64_t n) {                                                       \
    for (int64_t i = 0; i < n; i += Vec<T, R>::size) Vec<T, R>::load(in + i).store(out + i);                           \
  }                                                                                                                    \
  extern "C" void load_first_##name(const S* in, T* out, int n) { Vec<T, R>::load(in, n).store(out); }                 \
  extern "C" void store_first_##name(const T* in, S* out, int n) { Vec<T, R>::load(in).store(out, n); }

STORAGE(float1, float, float, 1)
STORAGE(float2, float, float, 2)
STORAGE(double1, double, double, 1)
STORAGE(double2, double, double, 2)
STORAGE(bf161, bf16, float, 1)
STORAGE(bf162, bf16, float, 2)
STORAGE(half1, half, float, 1)
STORAGE(half2, half, float, 2)

extern "C" bool shares(int64_t work, int threads) { return is_parallel(work, threads); }

// How often each row was visited, and by blocks of how many rows.
extern "C" void visit_rows(int64_t rows, int64_t work_per_row, int threads, int* visits, int64_t* block) {
  parallel_rows(rows, work_per_row, threads, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      ++visits[i];
      block[i] = end - begin;
    }
  });
}

extern "C" void visit_blocks(int64_t count, int threads, int* visits) {
  parallel_blocks(count, threads, [=](int64_t i) { ++visits[i]; });
}
