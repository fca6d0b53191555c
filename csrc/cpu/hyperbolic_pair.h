// Ops of two points. A map: out = a x + b e, with e = y - x where the points may be near (log maps) and e = y where
// they are not compared (exp maps, Moebius addition). A scalar: one number a row. The coefficients follow from
// |x|^2, |y|^2 and x.d, |d|^2 (d = y - x) or x.y.
//
// Backward. With A = g.x, B = g.e the adjoints of a and b, and s' the adjoint of each inner product s:
//   e = y - x:  x' = (a - b) g + (2xx' - xd') x + (xd' - 2dd') d     y' = b g + (2yy' + xd') y + (2dd' - xd') d
//   e = y:      x' =  a      g +  2xx'        x +  xy'         y     y' = b g +  2yy'        y +  xy'         x
// The difference d is always subtracted element by element: (2dd')x - (2dd')y would cancel.
#pragma once

#include "../hyperbolic.h"
#include "row_ops.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace pair {

enum Input { kXX, kYY, kXD, kDD, kGX, kGE, kInputs, kXY = kXD, kRowGrad = kGX };
enum Coefficient { kA, kB, kCoefficients, kValue = kA };
enum Gradient { kXByG, kXByX, kXByE, kYByG, kYByY, kYByE, kCurvature, kGradients };

template <class T>
using Inputs = Lanes<T, kInputs>;
template <class T>
using Outputs = Lanes<T, kCoefficients>;
template <class T>
using GradientOutputs = Lanes<T, kGradients>;
template <class T>
using Solve = void (*)(const Inputs<T>&, T c, T option, Outputs<T>&);
template <class T>
using SolveGradient = void (*)(const Inputs<T>&, T c, T option, GradientOutputs<T>&);

// Two facts about an op that shape its loops.
enum class Points { compared, combined };  // e = y - x, or e = y
enum class Result { map, scalar };

template <Points points, class F>
MMKERN_FN auto sums_of(F xx, F yy, F xd_or_xy, F dd) {
  if constexpr (points == Points::compared) {
    return DifferenceSums<F>{xx, yy, xd_or_xy, dd};
  } else {
    return PlainSums<F>{xx, yy, xd_or_xy};
  }
}

template <class Op, Points points, Result kind>
struct Solver {
  template <class T>
  static void solve(const Inputs<T>& in, T c, T option, Outputs<T>& out) {
    const auto sums = sums_of<points>(in.get(kXX), in.get(kYY), in.get(kXD), in.get(kDD));
    if constexpr (kind == Result::map) {
      const auto k = Op::coefficients(sums, Vec<T>(c));
      out.put(kA, k.a);
      out.put(kB, k.b);
    } else {
      out.put(kValue, Op::value(sums, Vec<T>(c), option));
    }
  }

  template <class T>
  static void solve_gradient(const Inputs<T>& in, T c, T option, GradientOutputs<T>& out) {
    using V = Vec<T>;
    constexpr bool compared = points == Points::compared;
    constexpr int kVariables = compared ? 5 : 4;
    using D = Dual<V, kVariables>;
    const auto sums = sums_of<points>(D::variable(in.get(kXX), 0), D::variable(in.get(kYY), 1),
                                      D::variable(in.get(kXD), 2), D::variable(in.get(kDD), compared ? 3 : 0));
    const D curvature = D::variable(V(c), kVariables - 1);
    V a(T(0)), b(T(0)), adjoint[kVariables];
    if constexpr (kind == Result::map) {
      const auto k = Op::coefficients(sums, curvature);
      a = k.a.value;
      b = k.b.value;
      for (int i = 0; i < kVariables; ++i) adjoint[i] = fma(in.get(kGX), k.a.slope[i], in.get(kGE) * k.b.slope[i]);
    } else {
      const D value = Op::value(sums, curvature, option);
      for (int i = 0; i < kVariables; ++i) adjoint[i] = in.get(kRowGrad) * value.slope[i];
    }
    const V xx2 = adjoint[0] + adjoint[0], yy2 = adjoint[1] + adjoint[1], cross = adjoint[2];
    out.put(kYByG, b);
    out.put(kCurvature, adjoint[kVariables - 1]);
    if constexpr (compared) {
      const V dd2 = adjoint[3] + adjoint[3];
      out.put(kXByG, a - b);
      out.put(kXByX, xx2 - cross);
      out.put(kXByE, cross - dd2);
      out.put(kYByY, yy2 + cross);
      out.put(kYByE, dd2 - cross);
    } else {
      out.put(kXByG, a);
      out.put(kXByX, xx2);
      out.put(kXByE, cross);
      out.put(kYByY, yy2);
      out.put(kYByE, cross);
    }
  }
};

// acc += |x|^2, |y|^2, and x.d, |d|^2 or x.y; with g: g.x and g.e.
template <class T, Points points, bool with_grad, class At, class S>
MMKERN_FN void add_products(At at, const S* x, const S* y, const S* g, Vec<T>* acc) {
  const Vec<T> a = at.load(x), b = at.load(y);
  Vec<T> e = b;
  acc[kXX] = fma(a, a, acc[kXX]);
  acc[kYY] = fma(b, b, acc[kYY]);
  if constexpr (points == Points::compared) {
    e = b - a;
    acc[kDD] = fma(e, e, acc[kDD]);
  }
  acc[kXD] = fma(a, e, acc[kXD]);
  if constexpr (with_grad) {
    const Vec<T> h = at.load(g);
    acc[kGX] = fma(h, a, acc[kGX]);
    acc[kGE] = fma(h, e, acc[kGE]);
  }
}

template <class T, Points points, bool with_grad, class S>
MMKERN_FN void inner_products(const S* x, const S* y, const S* g, int64_t cols, Inputs<T>& in, int r) {
  in.set(r, reduce_row<T, with_grad ? 6 : 4>(
                cols, [&](auto at, Vec<T>* acc) { add_products<T, points, with_grad>(at, x, y, g, acc); }));
}

// Where a map is written, the next block's inner products are formed in the same loop: its loads fill the time of
// this one's stores.
template <class S, Points points, Result kind>
void forward(const Call& call, double option, Solve<accumulate_t<S>> solve) {
  using T = accumulate_t<S>;
  constexpr const S* kNoGrad = nullptr;
  const auto x = rows<const S>(call[0]), y = rows<const S>(call[1]);
  const auto out = kind == Result::map ? rows<S>(call[2]) : Rows<S>{};
  const bool stream = kind == Result::map && streams(bytes_of(call), call[2]);
  const T c = T(call.scalars[0]);
  for_each_run_of_blocks<T>(x.rows, 5 * x.cols, call.threads, [&](auto block, int64_t count) {
    Inputs<T> in;
    const auto look_at = [&](const RowBlock& b) {
      for (int r = 0; r < b.n; ++r) {
        inner_products<T, points, false>(x[b.first + r], y[b.first + r], kNoGrad, x.cols, in, r);
      }
    };
    look_at(block(0));
    for (int64_t i = 0; i < count; ++i) {
      const RowBlock now = block(i), next = i + 1 < count ? block(i + 1) : RowBlock{0, 0};
      Outputs<T> k;
      solve(in, c, T(option), k);
      if constexpr (kind == Result::scalar) {
        k.get(kValue).store(static_cast<S*>(call[2].data) + now.first, now.n);
        look_at(next);
      } else {
        for (int r = 0; r < now.n; ++r) {
          const S *x_row = x[now.first + r], *y_row = y[now.first + r];
          S* to = out[now.first + r];
          const Vec<T> a(k.at(kA, r)), b(k.at(kB, r));
          const auto value = [&](auto at) {
            const Vec<T> u = at.load(x_row);
            Vec<T> e = at.load(y_row);
            if constexpr (points == Points::compared) e = e - u;
            return fma(a, u, b * e);
          };
          if (r < next.n) {
            const S *x_next = x[next.first + r], *y_next = y[next.first + r];
            in.set(r, write_and_reduce_row<T, 4>(x.cols, stream, to, [&](auto at, Vec<T>* acc) {
                     add_products<T, points, false>(at, x_next, y_next, kNoGrad, acc);
                     return value(at);
                   }));
          } else {
            for_each_vec<T>(x.cols, stream, [&](auto at) { at.store(to, value(at)); });
          }
        }
      }
    }
  });
}

template <class S, Points points, Result kind>
void backward(const Call& call, double option, SolveGradient<accumulate_t<S>> solve) {
  using T = accumulate_t<S>;
  constexpr bool is_map = kind == Result::map;
  const View &grad = call[0], &x_out = call[3], &y_out = call[4];
  const auto x = rows<const S>(call[1]), y = rows<const S>(call[2]);
  const auto g = is_map ? rows<const S>(grad) : Rows<const S>{};
  const auto row_grad = row_scalars<const S>(is_map ? View{} : grad);
  const auto x_to = x_out ? rows<S>(x_out) : Rows<S>{}, y_to = y_out ? rows<S>(y_out) : Rows<S>{};
  const bool stream = streams(bytes_of(call), x_out, y_out);
  RowPartials<T> curvature_to(call[5], x.rows);
  const T c = T(call.scalars[0]);
  for_each_row_block<T>(x.rows, 12 * x.cols, call.threads, [&](int64_t first, int n) {
    Inputs<T> in;
    for (int r = 0; r < n; ++r) {
      const int64_t row = first + r;
      inner_products<T, points, is_map>(x[row], y[row], is_map ? g[row] : nullptr, x.cols, in, r);
      if constexpr (!is_map) in.at(kRowGrad, r) = T(element(row_grad.data, row * row_grad.stride));
    }
    GradientOutputs<T> k;
    solve(in, c, T(option), k);
    for (int r = 0; r < n; ++r) {
      const int64_t row = first + r;
      curvature_to.set(row, k.at(kCurvature, r));
      const Vec<T> xg(k.at(kXByG, r)), xx(k.at(kXByX, r)), xe(k.at(kXByE, r));
      const Vec<T> yg(k.at(kYByG, r)), yy(k.at(kYByY, r)), ye(k.at(kYByE, r));
      const S *x_row = x[row], *y_row = y[row], *g_row = is_map ? g[row] : nullptr;
      S *x_row_to = x_to.data ? x_to[row] : nullptr, *y_row_to = y_to.data ? y_to[row] : nullptr;
      for_each_vec<T>(x.cols, stream, [&](auto at) {
        at.prefetch(x_row + n * x.stride);  // of the next block: its loads would wait for these stores
        at.prefetch(y_row + n * y.stride);
        const Vec<T> u = at.load(x_row), v = at.load(y_row);
        const Vec<T> d = v - u;
        Vec<T> x_value = xx * u, y_value = yy * v;
        if constexpr (points == Points::compared) {
          x_value = fma(xe, d, x_value);
          y_value = fma(ye, d, y_value);
        } else {
          x_value = fma(xe, v, x_value);
          y_value = fma(ye, u, y_value);
        }
        if constexpr (is_map) {
          const Vec<T> h = at.load(g_row);
          x_value = fma(xg, h, x_value);
          y_value = fma(yg, h, y_value);
        }
        if (x_row_to) at.store(x_row_to, x_value);
        if (y_row_to) at.store(y_row_to, y_value);
      });
    }
  });
}

// Tensors: x, y, out. Scalars: c, then the op's option where it has one.
template <class Op, Points points, Result kind>
void run(const Call& call) {
  with_storage(call[0].dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    forward<S, points, kind>(call, call.scalars[1], &Solver<Op, points, kind>::template solve<accumulate_t<S>>);
  });
}

// Tensors: grad, x, y, x', y', c'.
template <class Op, Points points, Result kind>
void run_backward(const Call& call) {
  with_storage(call[1].dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    backward<S, points, kind>(call, call.scalars[1],
                              &Solver<Op, points, kind>::template solve_gradient<accumulate_t<S>>);
  });
}

}  // namespace pair
}  // namespace MMKERN_ISA
}  // namespace mmkern
