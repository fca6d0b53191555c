// How a log-sum-exp of all pairs is told which of them are positive, and which count at all: by a mask, by labels that
// rows share, or by rows that are to be forgotten. Each way is asked for a vector of pairs at a time, forward and
// backward; what it has no use for costs nothing.
#pragma once

#include "contrastive_pairs.h"
#include "softmax.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace contrastive {

// Sums over rows and over columns of what comes a vector at a time.
template <class T>
class PlainSums {
 public:
  PlainSums(int64_t rows, int64_t cols, int64_t most_blocks)
      : rows_(rows),
        cols_(cols),
        stride_(up_to(W, cols)),
        of_rows_(rows * W),
        of_cols_(stride_),
        of_blocks_(most_blocks * stride_) {
    clear(of_rows_.data, rows * W);
    clear(of_cols_.data, stride_);
    clear(of_blocks_.data, most_blocks * stride_);
  }

  // Of row i, which is in `block`, and columns j, ...
  MMKERN_FN void add(int64_t block, int64_t i, int64_t j, Vec<T> v) const {
    T *const row = of_rows_.data + i * W, *const col = of_blocks_.data + block * stride_ + j;
    (Vec<T>::load(row) + v).store(row);
    (Vec<T>::load(col) + v).store(col);
  }
  // Takes what the first `blocks` of them have left of the columns.
  void merge(int64_t blocks) const {
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t j = 0; j < stride_; j += W) {
        T *const total = of_cols_.data + j, *const part = of_blocks_.data + b * stride_ + j;
        (Vec<T>::load(total) + Vec<T>::load(part)).store(total);
        Vec<T>(T(0)).store(part);
      }
  }
  void write(const View& rows, const View& cols) const {
    const RowScalars<T> to_rows = row_scalars<T>(rows), to_cols = row_scalars<T>(cols);
    for (int64_t i = 0; i < rows_; ++i) to_rows.set(i, sum(Vec<T>::load(of_rows_.data + i * W)));
    for (int64_t j = 0; j < cols_; ++j) to_cols.set(j, of_cols_.data[j]);
  }

 private:
  static constexpr int W = Vec<T>::size;
  static void clear(T* data, int64_t n) {
    for (int64_t i = 0; i < n; ++i) data[i] = 0;
  }
  const int64_t rows_, cols_, stride_;
  const Scratch<T> of_rows_, of_cols_, of_blocks_;
};

// What is taken of scores one by one, beside the sums of exponentials.
template <class T>
struct Apart {
  const RowScalars<T> rows, cols;  // of the only positive pair of each
  const PlainSums<T> scores, counts;

  void alone(int64_t i, int64_t j, T score) const {
    rows.set(i, score);
    cols.set(j, score);
  }
};

// A number for each column, in whole vectors.
template <class T>
struct Columnwise {
  const Scratch<T> room;

  explicit Columnwise(const View& view) : room((view ? view.sizes[0] : 0) + Vec<T>::size) {
    const RowScalars<T> numbers = row_scalars<T>(view);
    for (int64_t j = 0; view && j < view.sizes[0]; ++j) room.data[j] = numbers.get(j, 0);
  }
  const T* from(int64_t j) const { return room.data + j; }
};

// A choice of pairs has of a call kTensors tensors and kNumbers numbers. `part` moves the positive of some scores, of
// row i and columns j, ..., from `others` to `chosen`; where there may be `several` in a row, these have log-sum-exps
// of their own. Of the others, a row's sum leaves out what `hide` hides, and a column's the rows that do not count.
// `slope`: d/ds of such scores, from what `given` knows of their row.

template <class T>
struct Masked {
  static constexpr int kTensors = 1, kNumbers = 1, kSums = 0, kCounts = 0;
  const Positives positives;

  Masked(const View* tensors, const double* numbers) : positives{tensors[0], numbers[0] != 0} {}
  bool several() const { return bool(positives.mask); }
  MMKERN_FN bool counts(int64_t) const { return true; }
  MMKERN_FN void hide(T*, int64_t, int) const {}

  MMKERN_FN void part(int64_t, int64_t i, int64_t j, int lanes, Vec<T>& others, Vec<T>& chosen,
                      const Apart<T>& apart) const {
    if (!positives.meet(i, j, lanes)) return;
    const bool alone = !several();
    positives.for_each(i, j, lanes, [&](int lane) {
      chosen.set(lane, others[lane]);
      others.set(lane, minus_infinity<T>());
      if (alone) apart.alone(i, j + lane, chosen[lane]);
    });
  }
  template <class Row>
  MMKERN_FN Vec<T> slope(const Row& given, int c, int lanes, Vec<T> score) const {
    Vec<T> g = given.negative.at(c, score);
    if (positives.meet(given.i, given.j + c, lanes)) {
      const Vec<T> chosen = given.positive.at(c, score);
      positives.for_each(given.i, given.j + c, lanes, [&](int lane) { g.set(lane, chosen[lane]); });
    }
    return g;
  }
};

// A truth value for each lane, as bits that are all set or not.
template <class T>
using LaneBits = typename SignedOf<T>::type;

template <class T>
MMKERN_FN Mask<T, 1> load_mask(const LaneBits<T>* from) {
  Mask<T, 1> mask;
  load_native<LaneBits<T>, kLanes<T>>(mask.r[0], from);
  return mask;
}

// Rows are positive that share a label of either kind. Labels are bits of words, those of one kind before those of the
// other. Words are cut to the width of a lane; of a row of x those are looked at that are not 0: few.
template <class T>
class Labelled {
 public:
  static constexpr int kTensors = 2, kNumbers = 2, kSums = 2, kCounts = 2;

  Labelled(const View* tensors, const double* numbers)
      : diagonal_{none_, numbers[1] != 0},
        words_(kParts * tensors[0].sizes[1]),
        stride_(up_to(Vec<T>::size, tensors[1].sizes[0])),
        columns_(words_ * stride_),
        found_(words_ * tensors[0].sizes[0]),
        ends_(2 * tensors[0].sizes[0] + 1) {
    const Rows<const int64_t> x = rows<const int64_t>(tensors[0]), y = rows<const int64_t>(tensors[1]);
    const int64_t first = kParts * int64_t(numbers[0]);
    for (int64_t w = 0; w < words_; ++w)
      for (int64_t j = 0; j < stride_; ++j) columns_.data[w * stride_ + j] = j < y.rows ? part_of(y[j], w) : 0;
    int64_t n = 0;
    ends_.data[0] = 0;
    const int64_t edges[] = {0, first, words_};
    for (int64_t end = 0; end < 2 * x.rows; ++end) {
      const int64_t *const row = x[end / 2], *const edge = edges + end % 2;
      for (int64_t w = edge[0]; w < edge[1]; ++w)
        if (const Bits bits = part_of(row, w)) found_.data[n++] = {bits, w * stride_};
      ends_.data[end + 1] = n;
    }
  }
  bool several() const { return true; }
  MMKERN_FN bool counts(int64_t) const { return true; }
  MMKERN_FN void hide(T*, int64_t, int) const {}

  MMKERN_FN void part(int64_t block, int64_t i, int64_t j, int lanes, Vec<T>& others, Vec<T>& chosen,
                      const Apart<T>& apart) const {
    const Mask<T, 1> positive = at(i, j, lanes);
    if (!any(positive)) return;
    const Vec<T> nothing(minus_infinity<T>()), zero(T(0));
    chosen = select(positive, others, nothing);
    apart.scores.add(block, i, j, select(positive, others, zero));
    apart.counts.add(block, i, j, select(positive, Vec<T>(T(1)), zero));
    others = select(positive, nothing, others);
  }
  template <class Row>
  MMKERN_FN Vec<T> slope(const Row& given, int c, int lanes, Vec<T> score) const {
    const Vec<T> g = given.negative.at(c, score);
    const Mask<T, 1> positive = at(given.i, given.j + c, lanes);
    return any(positive) ? select(positive, given.positive.at(c, score) + given.of_sums(c), g) : g;
  }

 private:
  using Bits = LaneBits<T>;
  static constexpr int kParts = int(sizeof(int64_t) / sizeof(Bits));
  struct Found {
    Bits bits;
    int64_t column;
  };

  static Bits part_of(const int64_t* row, int64_t w) {
    return Bits(uint64_t(row[w / kParts]) >> (8 * int(sizeof(Bits)) * int(w % kParts)));
  }
  MMKERN_FN typename Mask<T, 1>::Native shared(int64_t begin, int64_t end, int64_t j) const {
    typename Mask<T, 1>::Native some = {};
    for (int64_t k = begin; k < end; ++k) {
      const Found& found = found_.data[k];
      some |= load_mask<T>(columns_.data + found.column + j).r[0] & found.bits;
    }
    return some != 0;
  }
  // Row i and columns j, ...
  MMKERN_FN Mask<T, 1> at(int64_t i, int64_t j, int lanes) const {
    const int64_t* const ends = ends_.data + 2 * i;
    Mask<T, 1> positive;
    positive.r[0] = shared(ends[0], ends[1], j) & shared(ends[1], ends[2], j);
    if (diagonal_.meet(i, j, lanes)) positive.r[0][i - j] = -1;
    return positive;
  }

  const View none_{};
  const Positives diagonal_;
  const int64_t words_, stride_;
  const Scratch<Bits> columns_;  // [words, columns]
  const Scratch<Found> found_;
  const Scratch<int64_t> ends_;
};

// Rows of x and of y that are to be forgotten count for no sum of exponentials, which all have; their scores with each
// other are summed up as they are.
template <class T>
class Retained {
 public:
  static constexpr int kTensors = 2, kNumbers = 1, kSums = 2, kCounts = 0;

  Retained(const View* tensors, const double* numbers)
      : diagonal_{none_, numbers[0] != 0},
        rows_(row_scalars<const uint8_t>(tensors[0])),
        columns_(up_to(Vec<T>::size, tensors[1].sizes[0])) {
    const int64_t n = tensors[1].sizes[0];
    const auto columns = row_scalars<const uint8_t>(tensors[1]);
    for (int64_t j = 0; j < up_to(Vec<T>::size, n); ++j) columns_.data[j] = j < n && columns.get(j, 0) ? -1 : 0;
  }
  bool several() const { return false; }
  MMKERN_FN bool counts(int64_t i) const { return !rows_.get(i, 0); }
  MMKERN_FN void hide(T* scores, int64_t j, int cols) const {
    for (int c = 0; c < cols; c += Vec<T>::size)
      select(forgotten(j + c), Vec<T>(minus_infinity<T>()), Vec<T>::load(scores + c)).store(scores + c);
  }

  MMKERN_FN void part(int64_t block, int64_t i, int64_t j, int lanes, Vec<T>& others, Vec<T>&,
                      const Apart<T>& apart) const {
    Vec<T> plain = select(forgotten(j), others, Vec<T>(T(0)));
    if (diagonal_.meet(i, j, lanes)) {
      const int lane = int(i - j);
      apart.alone(i, i, others[lane]);
      others.set(lane, minus_infinity<T>());
      plain.set(lane, T(0));
    }
    if (!counts(i)) apart.scores.add(block, i, j, plain);
  }
  template <class Row>
  MMKERN_FN Vec<T> slope(const Row& given, int c, int lanes, Vec<T> score) const {
    const Mask<T, 1> forgotten = this->forgotten(given.j + c);
    const bool counts = this->counts(given.i);
    Vec<T> g = given.negative.at(c, score, !forgotten, counts);
    if (!counts) g = select(forgotten, given.of_sums(c), g);
    if (diagonal_.meet(given.i, given.j + c, lanes)) {
      const int lane = int(given.i - given.j) - c;
      g.set(lane, given.positive.at(c, score)[lane]);
    }
    return g;
  }

 private:
  MMKERN_FN Mask<T, 1> forgotten(int64_t j) const { return load_mask<T>(columns_.data + j); }

  const View none_{};
  const Positives diagonal_;
  const RowScalars<const uint8_t> rows_;
  const Scratch<LaneBits<T>> columns_;
};

}  // namespace contrastive
}  // namespace MMKERN_ISA
}  // namespace mmkern
