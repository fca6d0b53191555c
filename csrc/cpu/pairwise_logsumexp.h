// Log-sum-exps of the scores of all pairs, over rows and over columns: pairwise_logsumexp and
// lorentz_pairwise_logsumexp of mmkern/reference/contrastive.py. Scores live in tiles, forward and backward; no matrix
// of them is in memory unless the caller asks for one.
//
// Forward: a row's softmax goes along its tiles. A column's goes down the blocks of rows: each block leaves a largest
// score and a sum of each column, which are merged in the order of the blocks.
#pragma once

#include "contrastive_pairs.h"
#include "softmax.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace contrastive {

// The log-sum-exps of pairs of one kind.
template <class T>
class LogSums {
 public:
  LogSums(int64_t rows, int64_t cols, int64_t most_blocks)
      : rows_(rows), cols_(cols), softmax_(rows), columns_(cols, most_blocks) {
    for (int64_t i = 0; i < rows; ++i) softmax_.data[i] = {};
  }

  // Takes a tile of rows i, ... and columns j, ... of the scores, which it overwrites; the rows are a whole `block`.
  void add(int64_t block, int64_t i, int64_t j, int rows, int cols, T* tile, int64_t ld) {
    columns_.add(block, j, rows, cols, tile, ld);
    for (int r = 0; r < rows; ++r) softmax_.data[i + r].weigh(tile + r * ld, cols);
  }

  // Takes what the first `blocks` of them have left of the columns.
  void merge(int64_t blocks) { columns_.merge(blocks); }

  void write(const View& rows, const View& cols) const {
    const Scratch<T> logs(rows_ + columns_.stride);
    logs_of_sums(softmax_.data, rows_, logs.data);
    columns_.logs(logs.data + rows_);
    const RowScalars<T> to_rows = row_scalars<T>(rows), to_cols = row_scalars<T>(cols);
    for (int64_t i = 0; i < rows_; ++i) to_rows.set(i, logs.data[i]);
    for (int64_t j = 0; j < cols_; ++j) to_cols.set(j, logs.data[rows_ + j]);
  }

 private:
  const int64_t rows_, cols_;
  const Scratch<Softmax<T>> softmax_;
  ColumnSoftmax<T> columns_;
};

inline thread_local ThreadBuffer positive_tile;

// A matrix of all pairs that the caller may ask for.
template <class T>
Rows<T> matrix_of(const View& view, int64_t rows, int64_t cols) {
  const bool asked = view && view.sizes[0] == rows && view.sizes[1] == cols;
  return {asked ? static_cast<T*>(view.data) : nullptr, rows, cols, cols};
}

// Tensors: x, y, the mask of positives; over rows and over columns, of pairs that are not positive, then of those that
// are; the products. Scalars: of the geometry, if it has one; the scale, whether the diagonal is positive.
template <class T, class Geometry, bool kCurved>
void forward(const Call& call) {
  constexpr int64_t kBlock = TileShape<T>::block_rows, kRows = 40 * kBlock;
  const InputRows<T> x_rows(call[0]), y_rows(call[1]);
  const auto &x = x_rows.rows, &y = y_rows.rows;
  const Geometry geometry{T(call.scalars[0])};
  const Vec<T> by(Geometry::kSign * T(call.scalars[kCurved]));
  const Positives positives{call[2], call.scalars[kCurved + 1] != 0};
  const bool several = bool(positives.mask);  // else a row has one at most, whose score is its log-sum-exp
  const RowFacts<T> of_x(geometry, x), of_y(geometry, y);
  const Rows<T> kept = matrix_of<T>(call[7], x.rows, y.rows);
  const RowScalars<T> to_rows = row_scalars<T>(call[5]), to_cols = row_scalars<T>(call[6]);
  for (int64_t i = 0; i < x.rows; ++i) to_rows.set(i, minus_infinity<T>());
  for (int64_t j = 0; j < y.rows; ++j) to_cols.set(j, minus_infinity<T>());
  const int64_t blocks = blocks_of(smaller(kRows, x.rows), kBlock);
  LogSums<T> negative(x.rows, y.rows, blocks), positive(x.rows, several ? y.rows : 0, several ? blocks : 0);
  const auto take = [&](int64_t block, int64_t i, int64_t j, int rows, int cols, T* tile, int64_t ld) {
    T* const apart = several ? positive_tile.reserve<T>(kBlock * TileShape<T>::block_stride) : nullptr;
    const auto put = [&](int r, int c, int lanes, Vec<T> value) {
      Vec<T> score = value * by, chosen(minus_infinity<T>());
      if (positives.meet(i + r, j + c, lanes))
        positives.for_each(i + r, j + c, lanes, [&](int lane) {
          chosen.set(lane, score[lane]);
          score.set(lane, minus_infinity<T>());
          if (several) return;
          to_rows.set(i + r, chosen[lane]);
          to_cols.set(j + c + lane, chosen[lane]);
        });
      score.store(tile + r * ld + c);
      if (several) chosen.store(apart + r * ld + c);
    };
    pairwise::for_each_value<T>(geometry, x, y, of_x, of_y, i, j, rows, cols, tile, ld, put);
    negative.add(block, i, j, rows, cols, tile, ld);
    if (several) positive.add(block, i, j, rows, cols, apart, ld);
  };
  for (int64_t first = 0; first < x.rows; first += kRows) {
    const auto some = x.part(first, smaller(kRows, x.rows - first));
    score_tiles<T>(some, y, call.threads, [&](int64_t i0, int64_t j0, int rows, int cols, T* tile, int64_t ld) {
      for (int r = 0; kept.data && r < rows; ++r)
        for_each_vec<T>(cols, [&](auto at) { at.keep(kept[first + i0 + r] + j0, at.load(tile + r * ld)); });
      take(i0 / kBlock, first + i0, j0, rows, cols, tile, ld);
    });
    negative.merge(blocks_of(some.rows, kBlock));
    if (several) positive.merge(blocks_of(some.rows, kBlock));
  }
  negative.write(call[3], call[4]);
  if (several) positive.write(call[5], call[6]);
}

// ---- Backward ----

// Of pairs of one kind: the log-sum-exps, and their gradients; columns in whole vectors.
template <class T>
struct LogGradients {
  const RowScalars<T> row_logs, row_grads;
  const Scratch<T> col_logs, col_grads;

  LogGradients(const View& rows_grad, const View& cols_grad, const View& rows, const View& cols)
      : row_logs(row_scalars<T>(rows)),
        row_grads(row_scalars<T>(rows_grad)),
        col_logs(room(cols)),
        col_grads(room(cols)) {
    const RowScalars<T> logs = row_scalars<T>(cols), grads = row_scalars<T>(cols_grad);
    for (int64_t j = 0; j < cols.sizes[0]; ++j) {
      col_logs.data[j] = logs.get(j, 0);
      col_grads.data[j] = grads.get(j, 0);
    }
  }

  // d/ds of a score of row i: the softmax of its row and that of its column.
  struct Row {
    Vec<T> log, grad;
    const T *logs, *grads;
    MMKERN_FN Vec<T> at(int c, Vec<T> score) const {
      const Vec<T> of_row = exp_flushed(score - log), of_col = exp_flushed(score - Vec<T>::load(logs + c));
      return fma(grad, of_row, Vec<T>::load(grads + c) * of_col);
    }
  };
  Row row(int64_t i, int64_t j) const {
    return {Vec<T>(row_logs.get(i, 0)), Vec<T>(row_grads.get(i, 0)), col_logs.data + j, col_grads.data + j};
  }

 private:
  static int64_t room(const View& cols) { return cols.sizes[0] + Vec<T>::size; }
};

// The gradient of the values of a block of pairs, whose first is (first, from).
template <class T>
struct ScoreGradients {
  static constexpr bool kReadsValues = true;
  const LogGradients<T>&negative, &positive;
  const Positives& positives;
  const T by;
  const int64_t first, from;
  T* const of_scale;  // of each row: the sum of gradient times value

  struct Row {
    const ScoreGradients& all;
    const int64_t i, j;
    const typename LogGradients<T>::Row negative, positive;
    Vec<T> total{T(0)};

    MMKERN_FN Vec<T> operator()(int c, int lanes, Vec<T> value) {
      const Vec<T> score = value * Vec<T>(all.by);
      Vec<T> g = negative.at(c, score);
      if (all.positives.meet(i, j + c, lanes)) {
        const Vec<T> chosen = positive.at(c, score);
        all.positives.for_each(i, j + c, lanes, [&](int lane) { g.set(lane, chosen[lane]); });
      }
      for (int lane = lanes; lane < Vec<T>::size; ++lane) g.set(lane, T(0));
      total = fma(g, value, total);
      return g * Vec<T>(all.by);
    }
  };
  Row of_row(int64_t i, int64_t j0, int, T*) const {
    return {*this, first + i, from + j0, negative.row(first + i, from + j0), positive.row(first + i, from + j0)};
  }
  void end(int64_t i, const Row& row) const { of_scale[i] += sum(row.total); }
};

// Tensors: the gradients of the four log-sum-exps, x, y, the mask, these, the products, x', y', c' if there is a
// curvature, scale'.
template <class T, class Geometry, bool kCurved>
void backward(const Call& call) {
  const InputRows<T> x(call[4]), y(call[5]);
  const int64_t rows = x.rows.rows;
  const T by = Geometry::kSign * T(call.scalars[kCurved]);
  const Positives positives{call[6], call.scalars[kCurved + 1] != 0};
  const LogGradients<T> negative(call[0], call[1], call[7], call[8]), positive(call[2], call[3], call[9], call[10]);
  const Rows<T> kept = matrix_of<T>(call[11], rows, y.rows.rows);
  const Scratch<T> of_scale(rows);
  for (int64_t i = 0; i < rows; ++i) of_scale.data[i] = 0;
  const double of_curvature = differentiate<T>(
      Geometry{T(call.scalars[0])}, x.rows, y.rows, {kept.data, kept.rows, kept.cols, kept.stride}, call[12], call[13],
      call.threads, [&](int64_t first, int64_t from) {
        return ScoreGradients<T>{negative, positive, positives, by, first, from, of_scale.data + first};
      });
  const View &to_curvature = call[14], &to_scale = call[14 + kCurved];
  double of_scales = 0;
  for (int64_t i = 0; i < rows; ++i) of_scales += double(of_scale.data[i]);
  if (kCurved && to_curvature) *static_cast<T*>(to_curvature.data) = T(of_curvature);
  if (to_scale) *static_cast<T*>(to_scale.data) = T(Geometry::kSign * of_scales);
}

template <template <class> class Geometry, bool kCurved>
void run(const Call& call) {
  call[0].dtype == Dtype::float64 ? forward<double, Geometry<double>, kCurved>(call)
                                  : forward<float, Geometry<float>, kCurved>(call);
}
template <template <class> class Geometry, bool kCurved>
void run_backward(const Call& call) {
  call[4].dtype == Dtype::float64 ? backward<double, Geometry<double>, kCurved>(call)
                                  : backward<float, Geometry<float>, kCurved>(call);
}

}  // namespace contrastive
}  // namespace MMKERN_ISA
}  // namespace mmkern
