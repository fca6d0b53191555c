// Inner products and distances of all pairs, as a matrix, on the tile loop.
#pragma once

#include "pairwise.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace pairwise {

template <class T, class Geometry>
void forward(const Call& call) {
  const InputRows<T> x_rows(call[0]), y_rows(call[1]);
  const auto &x = x_rows.rows, &y = y_rows.rows;
  const StoredRows<T> out(call[2]);
  const Geometry geometry(T(call.scalars[0]));
  const RowFacts<T> of_x(geometry, x), of_y(geometry, y);
  score_tiles<T>(x, y, call.threads, [&](int64_t i0, int64_t j0, int tile_rows, int tile_cols, T* tile, int64_t ld) {
    const bool streamed = out.streamed(i0, j0);
    for_each_value<T>(
        geometry, x, y, of_x, of_y, i0, j0, tile_rows, tile_cols, tile, ld, [&](int r, int c, int, Vec<T> value) {
          streamed ? value.template store<true>(out.streamed(i0 + r, j0) + c) : value.store(tile + r * ld + c);
        });
    for (int r = 0; !streamed && r < tile_rows; ++r) out.write(i0 + r, j0, tile_cols, tile + r * ld);
  });
}

// The gradient of a matrix of values.
template <class T>
struct GradientRows {
  static constexpr bool kReadsValues = false;
  const StoredRows<T> rows;

  auto of_row(int64_t i, int64_t j0, int cols, T* room) const {
    rows.read(i, j0, cols, room);
    return [room](int c, int lanes, Vec<T>) __attribute__((always_inline)) { return Vec<T>::load(room + c, lanes); };
  }
  template <class Row>
  void end(int64_t, const Row&) const {}
};

// Tensors: grad, x, y, x', y', c'.
template <class T, class Geometry>
void backward(const Call& call) {
  const InputRows<T> x_rows(call[1]), y_rows(call[2]);
  const auto &x = x_rows.rows, &y = y_rows.rows;
  const StoredRows<T> x_to(call[3]), y_to(call[4]);
  RowPartials<T> curvature_to(call[5], x.rows);
  Weights<T> weights(x.rows, y.rows);
  find_weights<T>(Geometry(T(call.scalars[0])), x, y, {}, GradientRows<T>{StoredRows<T>(call[0])}, call.threads,
                  weights);
  for (int64_t i = 0; i < x.rows; ++i) curvature_to.set(i, weights.curvature.data[i]);
  const auto write_to = [](const StoredRows<T>& to) {
    return [&to](int64_t i, int64_t d0, int n, const T* row) { to.write(i, d0, n, row); };
  };
  if (x_to) combine<T>(weights.kappas(), x, y, weights.alpha.data, {weights, false}, call.threads, write_to(x_to));
  if (!y_to) return;
  const Scratch<T> beta(y.rows);
  weights.add_up_beta(beta.data);
  combine<T>(Columns<const T>(weights.kappas()), y, x, beta.data, {weights, true}, call.threads, write_to(y_to));
}

template <template <class> class Geometry>
void run(const Call& call) {
  if (call[0].dtype == Dtype::float64) return forward<double, Geometry<double>>(call);
  forward<float, Geometry<float>>(call);
}

template <template <class> class Geometry>
void run_backward(const Call& call) {
  if (call[1].dtype == Dtype::float64) return backward<double, Geometry<double>>(call);
  backward<float, Geometry<float>>(call);
}

}  // namespace pairwise
}  // namespace MMKERN_ISA
}  // namespace mmkern
