// Ops of one, three and many vectors a row: half aperture, parallel transport, weighted centroid.
#pragma once

#include "../hyperbolic.h"
#include "row_ops.h"

namespace mmkern {
inline namespace MMKERN_ISA {

// ---- Half aperture of a point's cone: one number a row ----------------------------------------------------------

namespace aperture {

template <class S>
void forward(const Call& call) {
  using T = accumulate_t<S>;
  const auto x = rows<const S>(call[0]);
  const T c = T(call.scalars[0]), min_radius = T(call.scalars[1]);
  for_each_row_block<T>(x.rows, 2 * x.cols, call.threads, [&](int64_t first, int n) {
    Lanes<T, 1> xx;
    for (int r = 0; r < n; ++r) xx.at(0, r) = squared_norm<T>(x[first + r], x.cols);
    LorentzHalfAperture::value(Vec<T>(c) * xx.get(0), min_radius).store(static_cast<S*>(call[1].data) + first, n);
  });
}

template <class S>
void backward(const Call& call) {
  using T = accumulate_t<S>;
  const auto g = row_scalars<const S>(call[0]);
  const auto x = rows<const S>(call[1]);
  const auto x_to = call[2] ? rows<S>(call[2]) : Rows<S>{};
  RowPartials<T> curvature_to(call[3], x.rows);
  const T c = T(call.scalars[0]), min_radius = T(call.scalars[1]);
  for_each_row_block<T>(x.rows, 4 * x.cols, call.threads, [&](int64_t first, int n) {
    Lanes<T, 2> k;
    for (int r = 0; r < n; ++r) k.at(0, r) = squared_norm<T>(x[first + r], x.cols);
    using D = Dual<Vec<T>, 1>;
    k.put(1, LorentzHalfAperture::value(D::variable(Vec<T>(c) * k.get(0), 0), min_radius).slope[0]);
    for (int r = 0; r < n; ++r) {
      const int64_t row = first + r;
      const T by_z = T(element(g.data, row * g.stride)) * k.at(1, r);
      curvature_to.set(row, by_z * k.at(0, r));
      if (!x_to.data) continue;
      const S* x_row = x[row];
      S* to_row = x_to[row];
      const Vec<T> by_x(2 * c * by_z);
      for_each_vec<T>(x.cols, [&](auto at) { at.store(to_row, by_x * at.load(x_row)); });
    }
  });
}

}  // namespace aperture

// ---- Parallel transport: out = u + scale (x + y) -----------------------------------------------------------------
//
// Backward, with k' = g.(x + y) and s' = k' d scale/ds for each inner product s:
//   x' = k g + (2xx' - xd') x + (xd' - 2dd') d + (xu' - du') u
//   y' = k g + (2yy' + xd') y + (2dd' - xd') d + du' u          u' = g + xu' x + du' d

namespace transport {

enum Input { kXX, kYY, kXD, kDD, kXU, kDU, kGX, kGD, kInputs, kSums = kGX };
enum Gradient { kScale, kXByX, kXByD, kXByU, kYByY, kYByU, kUByX, kCurvature, kGradients };

template <class F, class Get>
MMKERN_FN TransportSums<F> sums_of(Get get) {
  return {{get(kXX), get(kYY), get(kXD), get(kDD)}, get(kXU), get(kDU)};
}

template <class T, bool with_grad, class S>
MMKERN_FN void inner_products(const S* x, const S* y, const S* u, const S* g, int64_t cols, Lanes<T, kInputs>& in,
                              int r) {
  const auto sums = reduce_row<T, with_grad ? kInputs : kSums>(cols, [&](auto at, Vec<T>* acc) {
    const Vec<T> a = at.load(x), b = at.load(y), w = at.load(u), d = b - a;
    acc[kXX] = fma(a, a, acc[kXX]);
    acc[kYY] = fma(b, b, acc[kYY]);
    acc[kXD] = fma(a, d, acc[kXD]);
    acc[kDD] = fma(d, d, acc[kDD]);
    acc[kXU] = fma(a, w, acc[kXU]);
    acc[kDU] = fma(d, w, acc[kDU]);
    if constexpr (with_grad) {
      const Vec<T> h = at.load(g);
      acc[kGX] = fma(a, h, acc[kGX]);
      acc[kGD] = fma(d, h, acc[kGD]);
    }
  });
  in.set(r, sums);
}

template <class S>
void forward(const Call& call) {
  using T = accumulate_t<S>;
  const auto x = rows<const S>(call[0]), y = rows<const S>(call[1]), u = rows<const S>(call[2]);
  const auto out = rows<S>(call[3]);
  const bool stream = streams(bytes_of(call), call[3]);
  const Vec<T> c(T(call.scalars[0]));
  for_each_row_block<T>(x.rows, 8 * x.cols, call.threads, [&](int64_t first, int n) {
    Lanes<T, kInputs> in;
    for (int r = 0; r < n; ++r) {
      const int64_t row = first + r;
      inner_products<T, false>(x[row], y[row], u[row], static_cast<const S*>(nullptr), x.cols, in, r);
    }
    Lanes<T, 1> k;
    k.put(0, LorentzParallelTransport::scale(sums_of<Vec<T>>([&](int i) { return in.get(i); }), c));
    for (int r = 0; r < n; ++r) {
      const S *x_row = x[first + r], *y_row = y[first + r], *u_row = u[first + r];
      S* to = out[first + r];
      const Vec<T> scale(k.at(0, r));
      for_each_vec<T>(x.cols, stream,
                      [&](auto at) { at.store(to, fma(scale, at.load(x_row) + at.load(y_row), at.load(u_row))); });
    }
  });
}

template <class T>
void solve_gradient(const Lanes<T, kInputs>& in, T c, Lanes<T, kGradients>& out) {
  using D = Dual<Vec<T>, kSums + 1>;
  const D scale = LorentzParallelTransport::scale(sums_of<D>([&](int i) { return D::variable(in.get(i), i); }),
                                                  D::variable(Vec<T>(c), kSums));
  const Vec<T> scale_adjoint = in.get(kGX) + in.get(kGX) + in.get(kGD);
  Vec<T> adjoint[kSums + 1];
  for (int i = 0; i <= kSums; ++i) adjoint[i] = scale_adjoint * scale.slope[i];
  out.put(kScale, scale.value);
  out.put(kXByX, adjoint[kXX] + adjoint[kXX] - adjoint[kXD]);
  out.put(kXByD, adjoint[kXD] - adjoint[kDD] - adjoint[kDD]);
  out.put(kXByU, adjoint[kXU] - adjoint[kDU]);
  out.put(kYByY, adjoint[kYY] + adjoint[kYY] + adjoint[kXD]);
  out.put(kYByU, adjoint[kDU]);
  out.put(kUByX, adjoint[kXU]);
  out.put(kCurvature, adjoint[kSums]);
}

template <class S>
void backward(const Call& call) {
  using T = accumulate_t<S>;
  const auto g = rows<const S>(call[0]);
  const auto x = rows<const S>(call[1]), y = rows<const S>(call[2]), u = rows<const S>(call[3]);
  Rows<S> to[3];
  for (int i = 0; i < 3; ++i) to[i] = call[4 + i] ? rows<S>(call[4 + i]) : Rows<S>{};
  const bool stream = streams(bytes_of(call), call[4], call[5], call[6]);
  RowPartials<T> curvature_to(call[7], x.rows);
  for_each_row_block<T>(x.rows, 16 * x.cols, call.threads, [&](int64_t first, int n) {
    Lanes<T, kInputs> in;
    for (int r = 0; r < n; ++r) {
      const int64_t row = first + r;
      inner_products<T, true>(x[row], y[row], u[row], g[row], x.cols, in, r);
    }
    Lanes<T, kGradients> k;
    solve_gradient(in, T(call.scalars[0]), k);
    for (int r = 0; r < n; ++r) {
      const int64_t row = first + r;
      curvature_to.set(row, k.at(kCurvature, r));
      Vec<T> by[kCurvature];
      for (int i = 0; i < kCurvature; ++i) by[i] = Vec<T>(k.at(i, r));
      const S *x_row = x[row], *y_row = y[row], *u_row = u[row], *g_row = g[row];
      S* to_row[3];
      for (int i = 0; i < 3; ++i) to_row[i] = to[i].data ? to[i][row] : nullptr;
      for_each_vec<T>(x.cols, stream, [&](auto at) {
        const Vec<T> a = at.load(x_row), b = at.load(y_row), w = at.load(u_row), h = at.load(g_row), d = b - a;
        const Vec<T> carried = by[kScale] * h;
        if (to_row[0]) at.store(to_row[0], fma(by[kXByX], a, fma(by[kXByD], d, fma(by[kXByU], w, carried))));
        if (to_row[1]) at.store(to_row[1], fma(by[kYByY], b, fma(-by[kXByD], d, fma(by[kYByU], w, carried))));
        if (to_row[2]) at.store(to_row[2], fma(by[kUByX], a, fma(by[kYByU], d, h)));
      });
    }
  });
}

}  // namespace transport

// ---- Weighted centroid: out = m / sqrt(q), m = sum w_n x_n, q = m_t^2 - c|m|^2, m_t = sum w_n t_n ----------------
//
// Backward, with q' = -(g.m) q^(-3/2) / 2 and t_n = sqrt(1 + c|x_n|^2):
//   m' = g/sqrt(q) - 2c q' m     m_t' = 2 m_t q'
//   w_n' = m'.x_n + m_t' t_n     x_n' = w_n (m' + c m_t'/t_n x_n)     c' = -|m|^2 q' + sum w_n m_t' |x_n|^2 / (2 t_n)

namespace centroid {

template <class S>
struct Batch {
  Rows<const S> x;
  RowScalars<const S> weights;
  int64_t batch, members;

  Batch(const View& x_view, const View& weights_view)
      : x(rows<const S>(x_view)),
        weights(row_scalars<const S>(weights_view)),
        batch(count(x_view, x_view.rank - 2)),
        members(x_view.sizes[x_view.rank - 2]) {}
};

template <class T>
struct Moments {
  T time, squared_norm;
};

// Scalar: for (n < members) m += w[n] x[n], m_t += w[n] sqrt(1 + c |x[n]|^2);
template <class T, class S>
Moments<T> moments(const Batch<S>& in, int64_t b, T c, T* m) {
  const int64_t cols = in.x.cols;
  for (int64_t i = 0; i < cols; ++i) m[i] = 0;
  T time = 0;
  for (int64_t n = b * in.members; n < (b + 1) * in.members; ++n) {
    const S* row = in.x[n];
    const T weight = T(element(in.weights.data, n * in.weights.stride));
    const auto xx = reduce_row<T, 1>(cols, [&](auto at, Vec<T>* acc) {
      const Vec<T> v = at.load(row);
      acc[0] = fma(v, v, acc[0]);
      at.store(m, fma(Vec<T>(weight), v, at.load(m)));
    });
    time += weight * sqrt(Vec<T>(1 + c * xx.total(0)))[0];
  }
  return {time, squared_norm<T>(m, cols)};
}

template <class S>
void forward(const Call& call) {
  using T = accumulate_t<S>;
  const Batch<S> in(call[0], call[1]);
  const auto out = rows<S>(call[2]);
  const T c = T(call.scalars[0]);
  parallel_rows(in.batch, 4 * in.members * in.x.cols, call.threads, [&](int64_t begin, int64_t end) {
    Scratch<T> m(in.x.cols);
    for (int64_t b = begin; b < end; ++b) {
      const auto sum = moments<T>(in, b, c, m.data);
      const Vec<T> scale = Vec<T>(T(1)) / sqrt(Vec<T>(sum.time * sum.time - c * sum.squared_norm));
      S* to = out[b];
      for_each_vec<T>(in.x.cols, [&](auto at) { at.store(to, scale * at.load(m.data)); });
    }
  });
}

template <class S>
void backward(const Call& call) {
  using T = accumulate_t<S>;
  const auto g = rows<const S>(call[0]);
  const Batch<S> in(call[1], call[2]);
  const auto x_to = call[3] ? rows<S>(call[3]) : Rows<S>{};
  const auto weights_to = row_scalars<S>(call[4]);
  RowPartials<T> curvature_to(call[5], in.batch);
  const T c = T(call.scalars[0]);
  const int64_t cols = in.x.cols;
  parallel_rows(in.batch, 12 * in.members * cols, call.threads, [&](int64_t begin, int64_t end) {
    Scratch<T> m(cols);
    for (int64_t b = begin; b < end; ++b) {
      const auto sum = moments<T>(in, b, c, m.data);
      const S* g_row = g[b];
      const auto gm =
          reduce_row<T, 1>(cols, [&](auto at, Vec<T>* acc) { acc[0] = fma(at.load(g_row), at.load(m.data), acc[0]); });
      const T q = sum.time * sum.time - c * sum.squared_norm;
      const T inverse_root = (Vec<T>(T(1)) / sqrt(Vec<T>(q)))[0];
      const T q_adjoint = T(-0.5) * gm.total(0) * inverse_root / q, time_adjoint = 2 * sum.time * q_adjoint;
      for_each_vec<T>(cols, [&](auto at) {
        at.store(m.data, fma(Vec<T>(inverse_root), at.load(g_row), Vec<T>(-2 * c * q_adjoint) * at.load(m.data)));
      });
      T c_adjoint = -sum.squared_norm * q_adjoint;
      for (int64_t n = b * in.members; n < (b + 1) * in.members; ++n) {
        const S* row = in.x[n];
        const T weight = T(element(in.weights.data, n * in.weights.stride));
        const auto sums = reduce_row<T, 2>(cols, [&](auto at, Vec<T>* acc) {
          const Vec<T> v = at.load(row);
          acc[0] = fma(v, v, acc[0]);
          acc[1] = fma(v, at.load(m.data), acc[1]);
        });
        const T xx = sums.total(0), mx = sums.total(1);
        const T time = sqrt(Vec<T>(1 + c * xx))[0];
        c_adjoint += weight * time_adjoint * xx / (2 * time);
        if (weights_to.data) set_element(weights_to.data, n * weights_to.stride, mx + time_adjoint * time);
        if (!x_to.data) continue;
        S* to = x_to[n];
        const Vec<T> by_m(weight), by_x(weight * c * time_adjoint / time);
        for_each_vec<T>(cols, [&](auto at) { at.store(to, fma(by_m, at.load(m.data), by_x * at.load(row))); });
      }
      curvature_to.set(b, c_adjoint);
    }
  });
}

}  // namespace centroid
}  // namespace MMKERN_ISA
}  // namespace mmkern
