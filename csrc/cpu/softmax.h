// The softmax of a row whose scores come block by block.
#pragma once

#include "row_ops.h"
#include "score_tiles.h"

namespace mmkern {
inline namespace MMKERN_ISA {

template <class T>
MMKERN_FN T minus_infinity() {
  return T(-__builtin_inf());
}

// The largest score of a row so far, and the sum of the exponentials below it.
template <class T>
struct Softmax {
  T top = minus_infinity<T>(), total = 0;

  // Turns scores into gate·exp(s − top), in whole vectors; returns what earlier sums are to be multiplied by.
  T weigh(T* s, int64_t n, T gate = T(1)) {
    constexpr int W = Vec<T>::size;
    const int64_t whole = up_to(W, n), pairs = whole / (2 * W) * 2 * W;
    for (int64_t j = n; j < whole; ++j) s[j] = minus_infinity<T>();
    Vec<T, 2> largest(minus_infinity<T>());
    Vec<T> last(minus_infinity<T>());
    for (int64_t j = 0; j < pairs; j += 2 * W) largest = max(Vec<T, 2>::load(s + j), largest);
    if (pairs < whole) last = max(Vec<T>::load(s + pairs), last);
    const T here = max_of(largest), there = max_of(last);
    const T factor = raise(there > here ? there : here);
    const T shift = this->shift();
    Vec<T, 2> sums(T(0));
    for (int64_t j = 0; j < pairs; j += 2 * W) sums += weigh_at<2>(s + j, shift, gate);
    total += sum(sums);
    if (pairs < whole) total += sum(weigh_at<1>(s + pairs, shift, gate));
    return factor;
  }

  // Takes the largest of some more scores; returns what earlier sums, the total among them, have been multiplied by.
  T raise(T score) {
    const T before = top;
    top = score > top ? score : top;
    const T factor = weight_of(before);
    total *= factor;
    return factor;
  }
  // What scores are lowered by: finite where no key is seen.
  T shift() const { return top == minus_infinity<T>() ? T(0) : top; }

  // What the sums of both are to be multiplied by.
  struct Factors {
    T here, other;
  };
  Factors merge(const Softmax& other) {
    const T here = raise(other.top), there = weight_of(other.top);
    total += other.total * there;
    return {here, there};
  }
  T weight_of(T score) const {
    if (score == top) return 1;
    return score == minus_infinity<T>() ? T(0) : exp(Vec<T>(score - top))[0];
  }
  template <int R>
  static MMKERN_FN Vec<T, R> weigh_at(T* s, T shift, T gate) {
    const Vec<T, R> weight = exp_flushed(Vec<T, R>::load(s) - Vec<T, R>(shift));
    (weight * Vec<T, R>(gate)).store(s);
    return weight;
  }
  // What turns Σ weight·v into the result; 0 where no key is seen.
  T inverse() const { return total == 0 ? T(0) : 1 / total; }
};

// Scalar: for (r < n) logs[r] = log Σ exp(s) of row r
template <class T>
void logs_of_sums(const Softmax<T>* rows, int64_t n, T* logs) {
  for (int64_t r = 0; r < n; ++r) logs[r] = rows[r].total;
  for (int64_t r = 0; r < n; r += Vec<T>::size) {
    const int count = int(smaller(Vec<T>::size, n - r));
    log(Vec<T>::load(logs + r, count)).store(logs + r, count);
  }
  for (int64_t r = 0; r < n; ++r) logs[r] += rows[r].top;
}

// Log-sum-exps of columns whose scores come in tiles, down the rows: a block of rows leaves a largest score and a sum
// of each column, which are merged in the order of the blocks, whoever computed them.
template <class T>
class ColumnSoftmax {
 public:
  const int64_t stride;  // the number of columns, in whole vectors

  ColumnSoftmax(int64_t cols, int64_t most_blocks)
      : stride(up_to(W, cols)),
        tops_(stride),
        totals_(stride),
        block_tops_(most_blocks * stride),
        block_totals_(most_blocks * stride) {
    reset();
  }

  void reset() {
    for (int64_t j = 0; j < stride; ++j) {
      tops_.data[j] = minus_infinity<T>();
      totals_.data[j] = 0;
    }
  }

  // Takes a tile of columns j, ..., in whole vectors; the rows, of which those that `counts` names count, are a whole
  // `block`.
  template <class Counts>
  void add(int64_t block, int64_t j, int64_t rows, int64_t cols, const T* tile, int64_t ld, const Counts& counts) {
    T *const tops = block_tops_.data + block * stride + j, *const totals = block_totals_.data + block * stride + j;
    for (int64_t c = 0; c < cols; c += W) {
      Vec<T> top(minus_infinity<T>()), total(T(0));
      for (int64_t r = 0; r < rows; ++r)
        if (counts(r)) top = max(Vec<T>::load(tile + r * ld + c), top);
      for (int64_t r = 0; r < rows; ++r)
        if (counts(r)) total += weight(Vec<T>::load(tile + r * ld + c), top);
      top.store(tops + c);
      total.store(totals + c);
    }
  }

  // Takes what the first `blocks` of them have left.
  void merge(int64_t blocks) {
    for (int64_t j = 0; j < stride; j += W) {
      Vec<T> top = Vec<T>::load(tops_.data + j), total = Vec<T>::load(totals_.data + j);
      for (int64_t b = 0; b < blocks; ++b) {
        const Vec<T> other = Vec<T>::load(block_tops_.data + b * stride + j), before = top;
        top = max(other, top);
        total = total * weight(before, top) + Vec<T>::load(block_totals_.data + b * stride + j) * weight(other, top);
      }
      top.store(tops_.data + j);
      total.store(totals_.data + j);
    }
  }

  // Scalar: for (j < stride) logs[j] = log Σ exp(s) of column j
  void logs(T* to) const {
    for (int64_t j = 0; j < stride; j += W)
      (Vec<T>::load(tops_.data + j) + log(Vec<T>::load(totals_.data + j))).store(to + j);
  }

 private:
  static constexpr int W = Vec<T>::size;

  // Infinity below infinity, of either sign, has the weight 1.
  static MMKERN_FN Vec<T> weight(Vec<T> score, Vec<T> top) {
    return exp_flushed(select(score == top, Vec<T>(T(0)), score - top));
  }

  const Scratch<T> tops_, totals_, block_tops_, block_totals_;  // [cols], [cols], [blocks, cols], [blocks, cols]
};

}  // namespace MMKERN_ISA
}  // namespace mmkern
