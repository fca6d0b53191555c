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

// Scalar: for (i < n) if (keys[i] is below the boundary) to[i] = dropped;  with room for whole vectors
template <class T>
void drop_below(Boundary<T> boundary, const T* keys, int64_t n, T* to, T dropped) {
  constexpr int W = Vec<T>::size;
  const Vec<T> bound(boundary.key), none(dropped);
  for (int64_t i = 0; i < n; i += W) {
    const Vec<T> key = Vec<T>::load(keys + i);
    if (any(key == bound)) {
      for (int lane = 0; lane < W; ++lane) {
        const bool is_tie = key[lane] == boundary.key;
        if (!(key[lane] > boundary.key) && !(is_tie && boundary.ties > 0)) to[i + lane] = dropped;
        boundary.ties -= is_tie;
      }
    } else {
      select(key > bound, Vec<T>::load(to + i), none).store(to + i);
    }
  }
}

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
    Range range;
    n = weights ? gather<true>(keys, weights, n, range) : gather<false>(keys, weights, n, range);
    double before = 0;
    while (n > kFew && range.least() < range.most()) {
      const T pivot = range.pivot(n);
      const double above = before + mass_above(pivot, n);
      const bool in_upper = above >= least;
      if (!in_upper) before = above;
      n = keep(n, pivot, in_upper, range);
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

  // Of numbers that go on.
  struct Range {
    Vec<T> low = T(__builtin_inf()), high = T(-__builtin_inf()), sums = T(0);

    MMKERN_FN void add(Vec<T> key, Mask<T, 1> taken) {
      low = min(select(taken, key, low), low);
      high = max(select(taken, key, high), high);
      sums += select(taken, key, Vec<T>(T(0)));
    }
    T least() const { return -max_of(-low); }
    T most() const { return max_of(high); }
    // A number from the least on and below the most.
    T pivot(int64_t n) const {
      const T a = least(), b = most(), mean = sum(sums) / T(n), middle = a / 2 + b / 2;
      if (mean >= a && mean < b) return mean;
      return middle >= a && middle < b ? middle : a;
    }
  };

  // Scalar: for (i < n) if (keys[i] > -inf && weights[i] > 0) take(keys[i], weights[i]);
  template <bool kWeighted>
  int64_t gather(const T* keys, const T* weights, int64_t n, Range& range) const {
    const Vec<T> none(T(-__builtin_inf())), zero(T(0)), one(T(1));
    int64_t found = 0;
    for_each_vec<T>(n, [&](auto at) {
      const Vec<T> key = at.load(keys), weight = at.only(kWeighted ? at.load(weights) : one);
      const auto taken = (key > none) & (weight > zero);
      range.add(key, taken);
      compress(weight, taken, weights_.data + found);
      found += compress(key, taken, keys_.data + found);
    });
    return found;
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
  int64_t keep(int64_t n, T pivot, bool above, Range& range) const {
    const Vec<T> bound(pivot), none(T(-__builtin_inf()));
    range = Range();
    for (int64_t i = n; i < n + W; ++i) keys_.data[i] = none[0];  // no number, on either side
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i += W) {
      const Vec<T> key = Vec<T>::load(keys_.data + i), weight = Vec<T>::load(weights_.data + i);
      const auto is_above = key > bound, taken = above ? is_above : (!is_above) & (key > none);
      range.add(key, taken);
      compress(weight, taken, weights_.data + kept);
      kept += compress(key, taken, keys_.data + kept);
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
