// Radial maps: out = scale(z) x with z = c|x|^2. The norms of a block of rows, the scales with one lane a row, then
// the rows again, still in cache.
//
// Backward: x' = scale g + 2c scale'(z) (g.x) x;  c' = sum of scale'(z) |x|^2 (g.x);  r' = (g.x) d scale/dr.
#pragma once

#include "../hyperbolic.h"
#include "row_ops.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace radial {

enum Input { kZ, kFactor, kInputs };
enum Output { kScale, kByZ, kByFactor, kOutputs };

template <class T>
using Inputs = Lanes<T, kInputs>;
template <class T>
using Outputs = Lanes<T, kOutputs>;
template <class T>
using Solve = void (*)(const Inputs<T>&, Outputs<T>&);

template <class Op>
struct Scale {
  template <class T>
  static void solve(const Inputs<T>& in, Outputs<T>& out) {
    out.put(kScale, Op::scale(in.get(kZ), in.get(kFactor)));
  }
};

template <class Op>
struct ScaleAndSlopes {
  template <class T>
  static void solve(const Inputs<T>& in, Outputs<T>& out) {
    using D = Dual<Vec<T>, 2>;
    const D scale = Op::scale(D::variable(in.get(kZ), 0), D::variable(in.get(kFactor), 1));
    out.put(kScale, scale.value);
    out.put(kByZ, scale.slope[0]);
    out.put(kByFactor, scale.slope[1]);
  }
};

// out = by_x x + by_g g, and what the row adds to the gradients of its scalars.
template <class T>
struct RowResult {
  T by_x, by_g, curvature, factor;
};

template <class T>
RowResult<T> result(const Outputs<T>& k, int r, T xx, T gx, T c) {
  return {2 * c * k.at(kByZ, r) * gx, k.at(kScale, r), k.at(kByZ, r) * xx * gx, k.at(kByFactor, r) * gx};
}

// A far row, where |x|^2 or the slope of its scale would leave the range of float32, is worked in float64, so that the
// maps hold to the range of the dtype.
template <class S>
RowResult<double> wide_result(const S* x, const S* g, int64_t cols, double c, double factor, Solve<double> solve) {
  double xx = 0, gx = 0;
  for (int64_t i = 0; i < cols; ++i) {
    xx += element(x, i) * element(x, i);
    gx += g ? element(x, i) * element(g, i) : 0;
  }
  Inputs<double> in;
  in.at(kZ, 0) = c * xx;
  in.at(kFactor, 0) = factor;
  Outputs<double> k;
  solve(in, k);
  return result(k, 0, xx, gx, c);
}

template <class S>
bool is_far(accumulate_t<S> z) {
  return sizeof(accumulate_t<S>) == sizeof(float) && z > accumulate_t<S>(1e16);
}

template <class S>
__attribute__((noinline)) void write_far(S* to, const S* x, int64_t cols, double c, double factor,
                                         Solve<double> solve) {
  const auto far = wide_result<S>(x, nullptr, cols, c, factor, solve);
  for (int64_t i = 0; i < cols; ++i) set_element(to, i, far.by_g * element(x, i));
}

// How far after the row written the row read ahead lies, and how many rows share a solve. In cache, two such blocks of
// x and one of out stay in most of L1; they are no whole pages apart, since a load waits for a store to the same place
// in another page.
inline int rows_ahead(int64_t row_bytes, int most, bool stream) {
  constexpr int64_t kBlock = 8192, kPage = 4096;
  int64_t rows = stream || row_bytes == 0 ? most : kBlock / row_bytes;
  rows = rows < 1 ? 1 : rows < most ? rows : most;
  return int(rows > 2 && rows * row_bytes % kPage == 0 ? rows - 1 : rows);
}

// While a row is written, |x|^2 of the row read ahead is formed: its loads fill the time of the stores.
template <class S>
void forward(const Rows<const S>& x, RowScalars<const accumulate_t<S>> factor, const Rows<S>& out, bool stream,
             double curvature, int threads, Solve<accumulate_t<S>> solve, Solve<double> solve_wide) {
  using T = accumulate_t<S>;
  const int lanes = rows_ahead(x.cols * int64_t(sizeof(S)), Vec<T>::size, stream);
  parallel_rows(x.rows, 3 * x.cols, threads, [=](int64_t begin, int64_t end) {
    const T c = T(curvature);
    Inputs<T> in;
    Outputs<T> k;
    in.put(kFactor, Vec<T>(T(1)));
    const auto look_at = [&](int64_t row, int lane, T norm) {
      in.at(kZ, lane) = c * norm;
      if (factor.data) in.at(kFactor, lane) = factor.get(row, T(1));
    };
    for (int lane = 0; lane < lanes && begin + lane < end; ++lane)
      look_at(begin + lane, lane, squared_norm<T>(x[begin + lane], x.cols));
    int lane = 0;
    for (int64_t row = begin; row < end; ++row) {
      if (lane == 0) solve(in, k);
      const S *from = x[row], *ahead = row + lanes < end ? x[row + lanes] : nullptr;
      S* to = out[row];
      const Vec<T> scale(k.at(kScale, lane));
      if (is_far<S>(in.at(kZ, lane))) {
        write_far<S>(to, from, x.cols, curvature, in.at(kFactor, lane), solve_wide);
        if (ahead) look_at(row + lanes, lane, squared_norm<T>(ahead, x.cols));
      } else if (ahead) {
        const auto norm = write_and_reduce_row<T, 1>(x.cols, stream, to, [=](auto at, Vec<T>* acc) {
          const Vec<T> v = at.load(ahead);
          acc[0] = fma(v, v, acc[0]);
          return scale * at.load(from);
        });
        look_at(row + lanes, lane, norm.total(0));
      } else {
        for_each_vec<T>(x.cols, stream, [=](auto at) { at.store(to, scale * at.load(from)); });
      }
      lane = lane + 1 < lanes ? lane + 1 : 0;
    }
    store_fence();
  });
}

struct Gradients {
  View factor, x, curvature;
};

template <class S>
void backward(const View& grad_view, const View& x_view, const View& factor_view, const Gradients& to, double curvature,
              int threads, Solve<accumulate_t<S>> solve, Solve<double> solve_wide) {
  using T = accumulate_t<S>;
  const auto g = rows<const S>(grad_view);
  const auto x = rows<const S>(x_view);
  const auto factor = row_scalars<const T>(factor_view);
  const auto x_to = to.x ? rows<S>(to.x) : Rows<S>{};
  const auto factor_to = row_scalars<T>(to.factor);
  const bool stream = streams(bytes_of(grad_view) + bytes_of(x_view) + bytes_of(to.x), to.x);
  RowPartials<T> curvature_to(to.curvature, x.rows);
  const T c = T(curvature);
  for_each_row_block<T>(x.rows, 6 * x.cols, threads, [&](int64_t first, int n) {
    Inputs<T> in;
    enum { kXX, kGX, kSums };
    Lanes<T, kSums> sums;
    for (int r = 0; r < n; ++r) {
      const S *x_row = x[first + r], *g_row = g[first + r];
      sums.set(r, reduce_row<T, kSums>(x.cols, [&](auto at, Vec<T>* acc) {
                 const Vec<T> v = at.load(x_row);
                 acc[kXX] = fma(v, v, acc[kXX]);
                 acc[kGX] = fma(v, at.load(g_row), acc[kGX]);
               }));
      in.at(kZ, r) = c * sums.at(kXX, r);
      in.at(kFactor, r) = factor.get(first + r, T(1));
    }
    Outputs<T> k;
    solve(in, k);
    for (int r = 0; r < n; ++r) {
      const int64_t row = first + r;
      const S *x_row = x[row], *g_row = g[row];
      if (is_far<S>(in.at(kZ, r))) {
        const auto far = wide_result<S>(x_row, g_row, x.cols, curvature, in.at(kFactor, r), solve_wide);
        curvature_to.set(row, T(far.curvature));
        factor_to.set(row, T(far.factor));
        for (int64_t i = 0; x_to.data && i < x.cols; ++i)
          set_element(x_to[row], i, far.by_x * element(x_row, i) + far.by_g * element(g_row, i));
        continue;
      }
      const auto near = result(k, r, sums.at(kXX, r), sums.at(kGX, r), c);
      curvature_to.set(row, near.curvature);
      factor_to.set(row, near.factor);
      if (!x_to.data) continue;
      const Vec<T> by_x(near.by_x), by_g(near.by_g);
      S* to_row = x_to[row];
      for_each_vec<T>(x.cols, stream,
                      [&](auto at) { at.store(to_row, fma(by_x, at.load(x_row), by_g * at.load(g_row))); });
    }
  });
}

// Tensors: x, out. With a factor: factor, x, out.
template <class Op, bool kHasFactor = false>
void run(const Call& call) {
  const View *factor = &call[0], *x = &call[kHasFactor], *out = &call[kHasFactor + 1];
  with_storage(x->dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    using T = accumulate_t<S>;
    forward<S>(rows<const S>(*x), row_scalars<const T>(kHasFactor ? *factor : View{}), rows<S>(*out),
               streams(bytes_of(call), *out), call.scalars[0], call.threads, &Scale<Op>::template solve<T>,
               &Scale<Op>::template solve<double>);
  });
}

// Tensors: grad, x, x', c'. With a factor: grad, factor, x, factor', x', c'.
template <class Op, bool kHasFactor = false>
void run_backward(const Call& call) {
  const View *x = &call[1 + kHasFactor], *to = &call[2 + kHasFactor];
  const View none{};
  const Gradients gradients = kHasFactor ? Gradients{to[0], to[1], to[2]} : Gradients{none, to[0], to[1]};
  with_storage(x->dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    backward<S>(call[0], *x, kHasFactor ? call[1] : none, gradients, call.scalars[0], call.threads,
                &ScaleAndSlopes<Op>::template solve<accumulate_t<S>>, &ScaleAndSlopes<Op>::template solve<double>);
  });
}

}  // namespace radial
}  // namespace MMKERN_ISA
}  // namespace mmkern
