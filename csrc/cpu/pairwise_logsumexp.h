// Log-sum-exps of the scores of all pairs, over rows and over columns: the ops called ..._logsumexp of
// mmkern/reference/contrastive.py. Scores live in tiles, forward and backward; no matrix of them is in memory unless
// the caller asks for one.
//
// Forward: a row's softmax goes along its tiles. A column's goes down the blocks of rows: each block leaves a largest
// score and a sum of each column, which are merged in the order of the blocks.
#pragma once

#include "contrastive_choices.h"

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
  template <class Pairs>
  void add(const Pairs& pairs, int64_t block, int64_t i, int64_t j, int rows, int cols, T* tile, int64_t ld) {
    columns_.add(block, j, rows, cols, tile, ld, [&](int64_t r) { return pairs.counts(i + r); });
    for (int r = 0; r < rows; ++r) {
      pairs.hide(tile + r * ld, j, cols);
      softmax_.data[i + r].weigh(tile + r * ld, cols);
    }
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

// Tensors: x, y, those of the choice of pairs; over rows and over columns, of pairs that are not positive, of those
// that are, and of a choice that has them plain sums and counts; the products. Scalars: of the geometry, if it has one;
// the scale, those of the choice.
template <class T, class Geometry, bool kCurved, class Pairs>
void forward(const Call& call) {
  constexpr int64_t kBlock = TileShape<T>::block_rows, kRows = 40 * kBlock;
  const InputRows<T> x_rows(call[0]), y_rows(call[1]);
  const auto &x = x_rows.rows, &y = y_rows.rows;
  const View* const outs = call.tensors + 2 + Pairs::kTensors;
  const Geometry geometry{T(call.scalars[0])};
  const Vec<T> by(Geometry::kSign * T(call.scalars[kCurved]));
  const Pairs pairs(call.tensors + 2, call.scalars + kCurved + 1);
  const bool several = pairs.several();  // else a row has one at most, whose score is its log-sum-exp
  const RowFacts<T> of_x(geometry, x), of_y(geometry, y);
  const Rows<T> kept = matrix_of<T>(outs[4 + Pairs::kSums + Pairs::kCounts], x.rows, y.rows);
  const int64_t blocks = blocks_of(smaller(kRows, x.rows), kBlock);
  const auto sums = [&](bool there) {
    return PlainSums<T>(there ? x.rows : 0, there ? y.rows : 0, there ? blocks : 0);
  };
  const Apart<T> apart{row_scalars<T>(outs[2]), row_scalars<T>(outs[3]), sums(Pairs::kSums), sums(Pairs::kCounts)};
  for (int64_t i = 0; i < x.rows; ++i) apart.rows.set(i, minus_infinity<T>());
  for (int64_t j = 0; j < y.rows; ++j) apart.cols.set(j, minus_infinity<T>());
  LogSums<T> negative(x.rows, y.rows, blocks), positive(x.rows, several ? y.rows : 0, several ? blocks : 0);
  const auto take = [&](int64_t block, int64_t i, int64_t j, int rows, int cols, T* tile, int64_t ld) {
    T* const positives = several ? positive_tile.reserve<T>(kBlock * TileShape<T>::block_stride) : nullptr;
    const auto put = [&](int r, int c, int lanes, Vec<T> value) {
      Vec<T> score = value * by, chosen(minus_infinity<T>());
      pairs.part(block, i + r, j + c, lanes, score, chosen, apart);
      score.store(tile + r * ld + c);
      if (several) chosen.store(positives + r * ld + c);
    };
    pairwise::for_each_value<T>(geometry, x, y, of_x, of_y, i, j, rows, cols, tile, ld, put);
    negative.add(pairs, block, i, j, rows, cols, tile, ld);
    if (several) positive.add(pairs, block, i, j, rows, cols, positives, ld);
  };
  for (int64_t first = 0; first < x.rows; first += kRows) {
    const auto some = x.part(first, smaller(kRows, x.rows - first));
    score_tiles<T>(some, y, call.threads, [&](int64_t i0, int64_t j0, int rows, int cols, T* tile, int64_t ld) {
      for (int r = 0; kept.data && r < rows; ++r)
        for_each_vec<T>(cols, [&](auto at) { at.keep(kept[first + i0 + r] + j0, at.load(tile + r * ld)); });
      take(i0 / kBlock, first + i0, j0, rows, cols, tile, ld);
    });
    const int64_t done = blocks_of(some.rows, kBlock);
    negative.merge(done);
    if (several) positive.merge(done);
    if (Pairs::kSums) apart.scores.merge(done);
    if (Pairs::kCounts) apart.counts.merge(done);
  }
  negative.write(outs[0], outs[1]);
  if (several) positive.write(outs[2], outs[3]);
  if (Pairs::kSums) apart.scores.write(outs[4], outs[5]);
  if (Pairs::kCounts) apart.counts.write(outs[6], outs[7]);
}

// ---- Backward ----

// Of pairs of one kind: the log-sum-exps, and their gradients.
template <class T>
struct LogGradients {
  const RowScalars<T> row_logs, row_grads;
  const Columnwise<T> col_logs, col_grads;

  LogGradients(const View* grads, const View* logs)
      : row_logs(row_scalars<T>(logs[0])),
        row_grads(row_scalars<T>(grads[0])),
        col_logs(logs[1]),
        col_grads(grads[1]) {}

  // d/ds of a score of row i: the softmax of its row and that of its column.
  struct Row {
    Vec<T> log, grad;
    const T *logs, *grads;
    MMKERN_FN Vec<T> at(int c, Vec<T> score) const {
      const Vec<T> of_row = exp_flushed(score - log), of_col = exp_flushed(score - Vec<T>::load(logs + c));
      return fma(grad, of_row, Vec<T>::load(grads + c) * of_col);
    }
    // Where it counts for its row, and where for its column: else it may outweigh them past all bounds.
    MMKERN_FN Vec<T> at(int c, Vec<T> score, Mask<T, 1> in_row, bool in_col) const {
      const Vec<T> zero(T(0)), of_row = select(in_row, exp_flushed(score - log), zero);
      const Vec<T> of_col = in_col ? exp_flushed(score - Vec<T>::load(logs + c)) : zero;
      return fma(grad, of_row, Vec<T>::load(grads + c) * of_col);
    }
  };
  Row row(int64_t i, int64_t j) const {
    return {Vec<T>(row_logs.get(i, 0)), Vec<T>(row_grads.get(i, 0)), col_logs.from(j), col_grads.from(j)};
  }
};

// The gradients of plain sums.
template <class T>
struct SumGradients {
  const RowScalars<T> rows;
  const Columnwise<T> cols;

  SumGradients(const View& of_rows, const View& of_cols) : rows(row_scalars<T>(of_rows)), cols(of_cols) {}
};

// The gradient of the values of a block of pairs, whose first is (first, from).
template <class T, class Pairs>
struct ScoreGradients {
  static constexpr bool kReadsValues = true;
  const LogGradients<T>&negative, &positive;
  const SumGradients<T>& sums;
  const Pairs& pairs;
  const T by;
  const int64_t first, from;
  T* const of_scale;  // of each row: the sum of gradient times value

  struct Row {
    const ScoreGradients& all;
    const int64_t i, j;
    const typename LogGradients<T>::Row negative, positive;
    Vec<T> total{T(0)};

    MMKERN_FN Vec<T> of_sums(int c) const {
      return Vec<T>(all.sums.rows.get(i, 0)) + Vec<T>::load(all.sums.cols.from(j) + c);
    }
    MMKERN_FN Vec<T> operator()(int c, int lanes, Vec<T> value) {
      Vec<T> g = all.pairs.slope(*this, c, lanes, value * Vec<T>(all.by));
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

// Tensors: the gradients of what forward finds, x, y, those of the choice of pairs, all that forward finds, x', y', c'
// if there is a curvature, scale'.
template <class T, class Geometry, bool kCurved, class Pairs>
void backward(const Call& call) {
  const View none{}, *const grads = call.tensors, *const given = grads + 4 + Pairs::kSums;
  const View *const outs = given + 2 + Pairs::kTensors, &products = outs[4 + Pairs::kSums + Pairs::kCounts];
  const View* const found = &products + 1;
  const InputRows<T> x(given[0]), y(given[1]);
  const int64_t rows = x.rows.rows;
  const T by = Geometry::kSign * T(call.scalars[kCurved]);
  const Pairs pairs(given + 2, call.scalars + kCurved + 1);
  const LogGradients<T> negative(grads, outs), positive(grads + 2, outs + 2);
  const SumGradients<T> sums(Pairs::kSums ? grads[4] : none, Pairs::kSums ? grads[5] : none);
  const Rows<T> kept = matrix_of<T>(products, rows, y.rows.rows);
  const Scratch<T> of_scale(rows);
  for (int64_t i = 0; i < rows; ++i) of_scale.data[i] = 0;
  const double of_curvature = differentiate<T>(
      Geometry{T(call.scalars[0])}, x.rows, y.rows, {kept.data, kept.rows, kept.cols, kept.stride}, found[0], found[1],
      call.threads, [&](int64_t first, int64_t from) {
        return ScoreGradients<T, Pairs>{negative, positive, sums, pairs, by, first, from, of_scale.data + first};
      });
  const View &to_curvature = found[2], &to_scale = found[2 + kCurved];
  double of_scales = 0;
  for (int64_t i = 0; i < rows; ++i) of_scales += double(of_scale.data[i]);
  if (kCurved && to_curvature) *static_cast<T*>(to_curvature.data) = T(of_curvature);
  if (to_scale) *static_cast<T*>(to_scale.data) = T(Geometry::kSign * of_scales);
}

template <template <class> class Geometry, bool kCurved, template <class> class Pairs>
void run(const Call& call) {
  call[0].dtype == Dtype::float64 ? forward<double, Geometry<double>, kCurved, Pairs<double>>(call)
                                  : forward<float, Geometry<float>, kCurved, Pairs<float>>(call);
}
template <template <class> class Geometry, bool kCurved, template <class> class Pairs>
void run_backward(const Call& call) {
  call[4 + Pairs<float>::kSums].dtype == Dtype::float64
      ? backward<double, Geometry<double>, kCurved, Pairs<double>>(call)
      : backward<float, Geometry<float>, kCurved, Pairs<float>>(call);
}

}  // namespace contrastive
}  // namespace MMKERN_ISA
}  // namespace mmkern
