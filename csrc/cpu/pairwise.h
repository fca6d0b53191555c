// All pairs of rows on the tile loop, with what the score s = x.y of a pair becomes stated by a geometry: its value,
// and the value's derivatives.
//
// Where |x - y| is small beside |x| and |y| the scores of a distance cancel; those pairs ("near") are redone from the
// differences of their coordinates.
//
// Backward: for one pair, x' = alpha x - kappa y and y' = beta y - kappa x. The kappas fill a matrix, so x' and y' are
// two more products on the same tile loop; alpha and beta are sums over a row and a column of it. A near pair keeps its
// digits as x' = -kappa (y - x) + (alpha - kappa) x: its difference is added to the product, which leaves it out.
#pragma once

#include "../hyperbolic.h"
#include "hyperbolic_geometry.h"
#include "row_ops.h"
#include "score_tiles.h"
#include "stored.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace pairwise {

// A matrix in its storage type.
template <class T>
class StoredRows {
 public:
  explicit StoredRows(const View& view)
      : stored_(view),
        stride_(view ? collapsed_stride(view, 1, view.sizes[1]) : 0),
        stream_(view.dtype == Dtype::float32 && view.sizes[1] % Vec<T>::size == 0 &&
                streams(2 * bytes_of(view), view)) {}

  explicit operator bool() const { return bool(stored_); }

  void read(int64_t i, int64_t j, int64_t n, T* to) const { (stored_ + (i * stride_ + j)).read(n, to); }
  void write(int64_t i, int64_t j, int64_t n, const T* from) const {
    (stored_ + (i * stride_ + j)).write(n, from, stream_);
  }
  // Row i from column j on where it is stored past the caches; else null. Such rows are whole vectors.
  T* streamed(int64_t i, int64_t j) const { return stream_ ? (stored_ + (i * stride_ + j)).as_they_are() : nullptr; }

 private:
  Stored<T> stored_;
  int64_t stride_;
  bool stream_;
};

// The rows of an input as T: its own, or a copy of a 16-bit input.
template <class T>
struct InputRows {
  Scratch<T> copy;
  const Rows<const T> rows;

  explicit InputRows(const View& view)
      : copy(Stored<T>(view).as_they_are() ? 0 : size(view)), rows(view_or_copy(view)) {}

 private:
  static int64_t size(const View& view) { return view.sizes[0] * view.sizes[1]; }

  Rows<const T> view_or_copy(const View& view) {
    if (Stored<T>(view).as_they_are()) return mmkern::rows<const T>(view);
    const int64_t n = view.sizes[0], cols = view.sizes[1];
    const StoredRows<T> stored(view);
    for (int64_t i = 0; i < n; ++i) stored.read(i, 0, cols, copy.data + i * cols);
    return {copy.data, n, cols, cols};
  }
};

// Whether a geometry's value is the product itself: its rows have no facts, and x' is -kappa y alone.
template <class Geometry>
inline constexpr bool is_product = false;

// |row|^2 and the geometry's factor (see hyperbolic_geometry.h) of every row.
template <class T>
struct RowFacts {
  Scratch<T> squares, factors;
  const int64_t rows;

  template <class Geometry, class S>
  RowFacts(const Geometry& geometry, const Rows<const S>& x)
      : squares(x.rows + Vec<T>::size), factors(x.rows + Vec<T>::size), rows(x.rows) {
    if (is_product<Geometry>) return;
    for_each_row_block<T>(x.rows, x.cols, 1, [&](int64_t first, int n) {
      Lanes<T, 1> xx;
      for (int r = 0; r < n; ++r) xx.at(0, r) = squared_norm<T>(x[first + r], x.cols);
      xx.get(0).store(squares.data + first);
      geometry.factor(xx.get(0)).store(factors.data + first);
    });
  }

  Facts<Vec<T>> broadcast(int64_t i) const { return {Vec<T>(squares.data[i]), Vec<T>(factors.data[i])}; }
  // The arrays are padded to a whole vector, so a partial one reads no further.
  Facts<Vec<T>> load(int64_t j) const { return {Vec<T>::load(squares.data + j), Vec<T>::load(factors.data + j)}; }
};

template <class T, class S>
DifferenceSums<Vec<T>> differences(const Rows<const S>& x, int64_t i, const Rows<const S>& y, int64_t j, T xx, T yy) {
  const S *x_row = x[i], *y_row = y[j];
  const auto sums = reduce_row<T, 2>(x.cols, [&](auto at, Vec<T>* acc) {
    const Vec<T> a = at.load(x_row), d = at.load(y_row) - a;
    acc[0] = fma(a, d, acc[0]);
    acc[1] = fma(d, d, acc[1]);
  });
  return {Vec<T>(xx), Vec<T>(yy), Vec<T>(sums.total(0)), Vec<T>(sums.total(1))};
}

// f(j, lanes): the columns of a tile row in vectors.
template <class T, class F>
MMKERN_FN void for_each_column(int cols, F f) {
  for (int j = 0; j < cols; j += Vec<T>::size) f(j, cols - j < Vec<T>::size ? cols - j : Vec<T>::size);
}

template <class T>
MMKERN_FN bool lane_of(Mask<T, 1> mask, int lane) {
  return select(mask, Vec<T>(T(1)), Vec<T>(T(0)))[lane] != T(0);
}

// f(lane, their differences) for the near ones of the pairs of row i of x with rows j, ... of y.
template <class T, class F>
MMKERN_FN void for_each_near(Mask<T, 1> near, int lanes, const Rows<const T>& x, int64_t i, const Facts<Vec<T>>& at_x,
                             const Rows<const T>& y, int64_t j, const Facts<Vec<T>>& at_y, F f) {
  if (!any(near)) return;
  for (int lane = 0; lane < lanes; ++lane)
    if (lane_of<T>(near, lane)) f(lane, differences<T>(x, i, y, j + lane, at_x.square[0], at_y.square[lane]));
}

// f(r, c, lanes, value) for the vectors of a tile whose rows and columns are i0, j0, ... of x and y.
template <class T, class Geometry, class F>
MMKERN_FN void for_each_value(const Geometry& geometry, const Rows<const T>& x, const Rows<const T>& y,
                              const RowFacts<T>& of_x, const RowFacts<T>& of_y, int64_t i0, int64_t j0, int tile_rows,
                              int tile_cols, const T* tile, int64_t ld, F f) {
  for (int r = 0; r < tile_rows; ++r) {
    const int64_t i = i0 + r;
    const auto at_x = of_x.broadcast(i);
    for_each_column<T>(tile_cols, [&](int c, int lanes) {
      const auto at_y = of_y.load(j0 + c);
      const Vec<T> scores = Vec<T>::load(tile + r * ld + c);
      Vec<T> value = geometry.value(scores, at_x, at_y);
      const auto near = geometry.is_near(scores, at_x, at_y);
      for_each_near(near, lanes, x, i, at_x, y, j0 + c, at_y,
                    [&](int lane, const auto& sums) { value.set(lane, geometry.near_value(sums)[0]); });
      f(r, c, lanes, value);
    });
  }
}

// A near pair of one block of rows, in the order in which the tile loop meets them.
template <class T>
struct NearPair {
  int64_t i, j;
  T kappa;
};

template <class T>
class NearPairs {
 public:
  NearPairs() = default;
  NearPairs(const NearPairs&) = delete;
  NearPairs& operator=(const NearPairs&) = delete;
  ~NearPairs() { free(data_); }

  void add(const NearPair<T>& pair) {
    if (size_ == capacity_) {
      capacity_ = capacity_ ? 2 * capacity_ : 16;
      data_ = static_cast<NearPair<T>*>(realloc(data_, size_t(capacity_) * sizeof(NearPair<T>)));
    }
    data_[size_++] = pair;
  }
  void clear() { size_ = 0; }
  const NearPair<T>* begin() const { return data_; }
  const NearPair<T>* end() const { return data_ + size_; }

 private:
  NearPair<T>* data_ = nullptr;
  int64_t size_ = 0, capacity_ = 0;
};

// What one pass over the scores leaves for the two products.
template <class T>
struct Weights {
  int64_t rows = 0, cols = 0, blocks = 0;
  const Scratch<T> kappa, alpha, beta, curvature;  // [rows, cols], [rows], [blocks, cols], [rows]
  NearPairs<T>* const near;                        // [blocks]

  // Room for at most so many.
  Weights(int64_t n, int64_t m)
      : kappa(n * m), alpha(n), beta(blocks_of_rows(n) * m), curvature(n), near(new NearPairs<T>[blocks_of_rows(n)]) {}
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;
  ~Weights() { delete[] near; }

  void begin(int64_t n, int64_t m) {
    rows = n;
    cols = m;
    blocks = blocks_of_rows(n);
    for (int64_t i = 0; i < n; ++i) alpha.data[i] = curvature.data[i] = 0;
    for (int64_t i = 0; i < blocks * m; ++i) beta.data[i] = 0;
    for (int64_t b = 0; b < blocks; ++b) near[b].clear();
  }
  // The sums of a column over all rows.
  void add_up_beta(T* to) const {
    for (int64_t j = 0; j < cols; ++j) {
      to[j] = 0;
      for (int64_t b = 0; b < blocks; ++b) to[j] += beta.data[b * cols + j];
    }
  }
  Rows<const T> kappas() const { return {kappa.data, rows, cols, cols}; }

  static int64_t block_of(int64_t i) { return i / TileShape<T>::block_rows; }

 private:
  static int64_t blocks_of_rows(int64_t n) { return blocks_of(n, TileShape<T>::block_rows); }
};

// The tile loop over products of x and y, or, where these are kept, over them as they lie.
template <class T, class F>
void for_each_tile(const Rows<const T>& x, const Rows<const T>& y, const Rows<const T>& kept, int threads, F f) {
  if (!kept.data) return score_tiles<T>(x, y, threads, f);
  constexpr int64_t kRows = TileShape<T>::block_rows;
  if (!is_parallel(kept.rows * kept.cols, threads)) threads = 1;
  parallel_blocks(blocks_of(kept.rows, kRows), threads, [&](int64_t b) {
    const int64_t i0 = b * kRows;
    f(i0, int64_t(0), int(smaller(kRows, kept.rows - i0)), int(kept.cols), kept[i0], kept.stride);
  });
}

// `upstream.of_row(i, j0, cols, room)` is a function of (c, lanes, value) that knows the gradient of the values of row
// i at columns j0 + c, ...; `upstream.end(i, it)` is told when the row is done.
template <class T, class Geometry, class Upstream>
void find_weights(const Geometry& geometry, const Rows<const T>& x, const Rows<const T>& y, const Rows<const T>& kept,
                  const Upstream& upstream, int threads, Weights<T>& weights) {
  weights.begin(x.rows, y.rows);
  const RowFacts<T> of_x(geometry, x), of_y(geometry, y);
  const Vec<T> lane_index = lane_indices<T>(), zero(T(0));
  for_each_tile(x, y, kept, threads,
                [&](int64_t i0, int64_t j0, int tile_rows, int tile_cols, const T* tile, int64_t ld) {
                  const int64_t block = Weights<T>::block_of(i0);
                  T* const beta = weights.beta.data + block * weights.cols + j0;
                  for (int r = 0; r < tile_rows; ++r) {
                    const int64_t i = i0 + r;
                    const auto at_x = of_x.broadcast(i);
                    T* const kappa = weights.kappa.data + i * weights.cols + j0;
                    auto gradient_at = upstream.of_row(i, j0, tile_cols, kappa);
                    Vec<T> alpha = zero, curvature = zero;
                    for_each_column<T>(tile_cols, [&](int c, int lanes) {
                      const auto at_y = of_y.load(j0 + c);
                      const Vec<T> scores = Vec<T>::load(tile + r * ld + c, lanes);
                      const auto near = geometry.is_near(scores, at_x, at_y);
                      const auto redo = [&](auto f) { for_each_near(near, lanes, x, i, at_x, y, j0 + c, at_y, f); };
                      Vec<T> value = zero;
                      if constexpr (Upstream::kReadsValues) {
                        value = geometry.value(scores, at_x, at_y);
                        redo([&](int lane, const auto& sums) { value.set(lane, geometry.near_value(sums)[0]); });
                      }
                      const Vec<T> g = gradient_at(c, lanes, value);
                      auto pair = geometry.gradient(scores, g, at_x, at_y);
                      redo([&](int lane, const auto& sums) {
                        const auto exact = geometry.near_gradient(sums, Vec<T>(g[lane]));
                        weights.near[block].add({i, j0 + c + lane, exact.kappa[0]});
                        pair.kappa.set(lane, T(0));
                        pair.alpha.set(lane, exact.alpha[0]);
                        pair.beta.set(lane, exact.beta[0]);
                        pair.curvature.set(lane, exact.curvature[0]);
                      });
                      pair.kappa.store(kappa + c, lanes);
                      if (is_product<Geometry>) return;
                      const auto inside = lane_index < Vec<T>(T(lanes));
                      alpha += select(inside, pair.alpha, zero);
                      curvature += select(inside, pair.curvature, zero);
                      (Vec<T>::load(beta + c, lanes) + pair.beta).store(beta + c, lanes);
                    });
                    weights.alpha.data[i] += sum(alpha);
                    weights.curvature.data[i] += sum(curvature);
                    upstream.end(i, gradient_at);
                  }
                });
}

// The near pairs as seen from x, or from y with their roles exchanged.
template <class T>
class NearPairsOf {
 public:
  NearPairsOf(const Weights<T>& weights, bool from_y) : weights_(weights), from_y_(from_y) {}

  // f(i, j, kappa) for the pairs of rows [i0, i0 + rows), a block of the tile loop.
  template <class F>
  void for_each(int64_t i0, int64_t rows, F f) const {
    const int64_t first = from_y_ ? 0 : weights_.block_of(i0), last = from_y_ ? weights_.blocks : first + 1;
    for (int64_t b = first; b < last; ++b) {
      for (const auto& pair : weights_.near[b]) {
        const int64_t i = from_y_ ? pair.j : pair.i, j = from_y_ ? pair.i : pair.j;
        if (i >= i0 && i < i0 + rows) f(i, j, pair.kappa);
      }
    }
  }

 private:
  const Weights<T>& weights_;
  const bool from_y_;
};

// put(i, d0, n, row): columns d0, ... of row i of scale x - kappa y, or of -kappa y where there is no scale; near pairs
// enter through their differences.
template <class T, class Kappa, class Put>
void combine(const Kappa& kappa, const Rows<const T>& x, const Rows<const T>& y, const T* scale,
             const NearPairsOf<T>& near, int threads, Put put) {
  score_tiles<T>(kappa, Columns<const T>(y), threads,
                 [&](int64_t i0, int64_t d0, int tile_rows, int tile_cols, T* tile, int64_t ld) {
                   near.for_each(i0, tile_rows, [&](int64_t i, int64_t j, T weight) {
                     const T *x_row = x[i] + d0, *y_row = y[j] + d0;
                     T* const row = tile + (i - i0) * ld;
                     for_each_vec<T>(tile_cols, [&](auto at) {
                       at.store(row, fma(Vec<T>(weight), at.load(y_row) - at.load(x_row), at.load(row)));
                     });
                   });
                   for (int r = 0; r < tile_rows; ++r) {
                     const T* x_row = x[i0 + r] + d0;
                     T* const row = tile + r * ld;
                     const Vec<T> by_x(scale ? scale[i0 + r] : T(0));
                     for_each_vec<T>(tile_cols, [&](auto at) {
                       at.store(row, scale ? by_x * at.load(x_row) - at.load(row) : -at.load(row));
                     });
                     put(i0 + r, d0, tile_cols, row);
                   }
                 });
}

}  // namespace pairwise
}  // namespace MMKERN_ISA
}  // namespace mmkern
