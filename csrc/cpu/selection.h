// The largest numbers of a row, as many as are asked for or as have the mass that is asked for, without a sort.
#pragma once

#include "row_ops.h"

namespace mmkern {
inline namespace MMKERN_ISA {

// Where they end: what is above `key` is among them, and of what equals it the first `ties`.
template <class T>
struct Boundary {
  T key;
  int64_t ties;
};

// Room for rows of up to so many numbers.
//
// Numbers are held against the mean of those among which the boundary is, and those on its side go on: after the k-th
// time about n / 2^k. Masses are summed in double, so that where the boundary lies does not hang on the order.
template <class T>
class Selection {
 public:
  explicit Selection(int64_t most) : keys_(most + Vec<T>::size), weights_(most + Vec<T>::size) {}

  // The fewest of keys[0, n), the largest first and of equal ones the first, whose weights come to `least`; one at
  // least. Where weights are null, each is 1. Keys of -inf, and those without weight, are none of them; one is.
  Boundary<T> find(const T* keys, const T* weights, int64_t n, double least) const {
    n = weights ? gather<true>(keys, weights, n) : gather<false>(keys, weights, n);
    double before = 0;
    while (n > kFew) {
      const Range range = range_of(n);
      if (range.least == range.most) break;
      const T pivot = range.pivot(n);
      const double above = before + mass_above(pivot, n);
      const bool in_upper = above >= least;
      if (!in_upper) before = above;
      n = keep(n, pivot, in_upper);
    }
    if (n > kFew) return {keys_.data[0], ties(n, before, least)};
    sort(n);
    int64_t last = 0;
    for (; last + 1 < n && before + weights_.data[last] < least; ++last) before += weights_.data[last];
    Boundary<T> found{keys_.data[last], 1};
    for (; last >= found.ties && keys_.data[last - found.ties] == found.key;) ++found.ties;
    return found;
  }

 private:
  static constexpr int W = Vec<T>::size;
  static constexpr int64_t kFew = 32;

  struct Range {
    T least, most, sum;

    // A number from the least on and below the most.
    T pivot(int64_t n) const {
      const T mean = sum / T(n), middle = least / 2 + most / 2;
      if (mean >= least && mean < most) return mean;
      return middle >= least && middle < most ? middle : least;
    }
  };

  // Scalar: for (i < n) if (keys[i] > -inf && weights[i] > 0) take(keys[i], weights[i]);
  template <bool kWeighted>
  int64_t gather(const T* keys, const T* weights, int64_t n) const {
    const Vec<T> none(T(-__builtin_inf())), zero(T(0)), one(T(1));
    int64_t found = 0;
    for_each_vec<T>(n, [&](auto at) {
      const Vec<T> key = at.load(keys), weight = at.only(kWeighted ? at.load(weights) : one);
      const auto taken = (key > none) & (weight > zero);
      compress(weight, taken, weights_.data + found);
      found += compress(key, taken, keys_.data + found);
    });
    return found;
  }

  Range range_of(int64_t n) const {
    Vec<T> least(keys_.data[0]), most = least, total(T(0));
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      const Vec<T> key = Vec<T>::load(keys_.data + i);
      least = min(key, least);
      most = max(key, most);
      total += key;
    }
    Range range{-max_of(-least), max_of(most), sum(total)};
    for (; i < n; ++i) {
      const T key = keys_.data[i];
      range.least = key < range.least ? key : range.least;
      range.most = key > range.most ? key : range.most;
      range.sum += key;
    }
    return range;
  }

  double mass_above(T pivot, int64_t n) const {
    WideSum<T> mass;
    for_each_vec<T>(n, [&](auto at) {
      const Vec<T> key = at.load(keys_.data), weight = at.load(weights_.data);
      mass.add(at.only(select(key > Vec<T>(pivot), weight, Vec<T>(T(0)))));
    });
    return mass.total();
  }

  // Of the first n those above the pivot, or the others.
  int64_t keep(int64_t n, T pivot, bool above) const {
    int64_t kept = 0, i = 0;
    for (; i + W <= n; i += W) {
      const Vec<T> key = Vec<T>::load(keys_.data + i), weight = Vec<T>::load(weights_.data + i);
      const auto is_above = key > Vec<T>(pivot), taken = above ? is_above : !is_above;
      compress(weight, taken, weights_.data + kept);
      kept += compress(key, taken, keys_.data + kept);
    }
    for (; i < n; ++i) {
      if ((keys_.data[i] > pivot) != above) continue;
      weights_.data[kept] = weights_.data[i];
      keys_.data[kept++] = keys_.data[i];
    }
    return kept;
  }

  // Of n equal ones.
  int64_t ties(int64_t n, double before, double least) const {
    int64_t found = 1;
    for (; found < n && before + weights_.data[found - 1] < least; ++found) before += weights_.data[found - 1];
    return found;
  }

  // The largest first; equal ones stay in their order.
  void sort(int64_t n) const {
    for (int64_t i = 1; i < n; ++i) {
      const T key = keys_.data[i], weight = weights_.data[i];
      int64_t at = i;
      for (; at > 0 && keys_.data[at - 1] < key; --at) {
        keys_.data[at] = keys_.data[at - 1];
        weights_.data[at] = weights_.data[at - 1];
      }
      keys_.data[at] = key;
      weights_.data[at] = weight;
    }
  }

  const Scratch<T> keys_, weights_;
};

}  // namespace MMKERN_ISA
}  // namespace mmkern
