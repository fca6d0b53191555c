// The likeliest path of CTC, and what is left of a path without repeats and blanks: mmkern/reference/ctc.py.
#pragma once

#include "softmax.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace ctc {

// Where a row's result goes.
struct Collapsed {
  int64_t* tokens;
  int64_t* times;
  int64_t width, count;

  MMKERN_FN void add(int64_t token, int64_t time, bool is_kept) {
    tokens[count] = token;
    times[count] = time;
    count += is_kept;
  }
  void pad() const {
    for (int64_t i = count; i < width; ++i) tokens[i] = times[i] = -1;
  }
};

// token(t) of n frames; there is room for the last one where it is not kept, since it is not the first then.
template <class F>
inline void collapse(int64_t n, int64_t blank, Collapsed& to, F token) {
  int64_t before = 0;
  for (int64_t t = 0; t < n; ++t) {
    const int64_t here = token(t);
    to.add(here, t, here != blank && (t == 0 || here != before));
    before = here;
  }
}

inline int64_t frames_of(const RowScalars<const int64_t>& lengths, int64_t row, int64_t most) {
  const int64_t n = lengths.get(row, most);
  return n < 0 ? 0 : smaller(n, most);
}

// Tensors: tokens, lengths; tokens, lengths, times. Number: blank.
inline void run_collapse(const Call& call) {
  const Rows<const int64_t> from = rows<const int64_t>(call[0]);
  const RowScalars<const int64_t> lengths = row_scalars<const int64_t>(call[1]);
  const Rows<int64_t> tokens = rows<int64_t>(call[2]), times = rows<int64_t>(call[4]);
  const RowScalars<int64_t> counts = row_scalars<int64_t>(call[3]);
  parallel_rows(from.rows, 4 * from.cols, call.threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      Collapsed to{tokens[row], times[row], from.cols, 0};
      const int64_t* const path = from[row];
      collapse(frames_of(lengths, row, from.cols), int64_t(call.scalars[0]), to, [=](int64_t t) { return path[t]; });
      to.pad();
      counts.set(row, to.count);
    }
  });
}

template <class T>
struct Best {
  T value;
  int64_t label;
  bool is_odd;  // NaN or +inf is among them
};

template <class T, class S>
MMKERN_FN Best<T> best_of_few(const S* numbers, int64_t n) {
  Best<T> best{minus_infinity<T>(), 0, false};
  for (int64_t i = 0; i < n; ++i) {
    const T x = T(element(numbers, i));
    best.is_odd |= !(x < -minus_infinity<T>());
    if (x > best.value) best = {x, i, best.is_odd};
  }
  return best;
}

// The first of the largest of n numbers.
template <class T, class S>
MMKERN_FN Best<T> best_of(const S* numbers, int64_t n) {
  constexpr int W = Vec<T>::size;
  if (n < W) return best_of_few<T>(numbers, n);
  const auto at = [=](int64_t i) { return Vec<T>::load(numbers + smaller(i, n - W)); };  // the last ones overlap
  const Vec<T> infinity(-minus_infinity<T>());
  Vec<T> most(minus_infinity<T>());
  auto odd = most == infinity;
  for (int64_t i = 0; i < n; i += W) {
    const Vec<T> x = at(i);
    odd = odd | !(x < infinity);
    most = max(x, most);
  }
  const T value = max_of(most);
  if (any(odd)) return {value, 0, true};
  int64_t i = 0;
  uint64_t found = 0;
  for (; !(found = bits_of(at(i) == Vec<T>(value)));) i += W;
  return {value, smaller(i, n - W) + __builtin_ctzll(found), false};
}

// Tensors: log-probabilities, lengths; scores, tokens, lengths, times. Number: blank.
template <class S>
void run_greedy(const Call& call) {
  using T = accumulate_t<S>;
  const View& from = call[0];
  const int64_t batch = from.sizes[0], frames = from.sizes[1], labels = from.sizes[2];
  const RowScalars<const int64_t> lengths = row_scalars<const int64_t>(call[1]);
  const RowScalars<T> scores = row_scalars<T>(call[2]);
  const Rows<int64_t> tokens = rows<int64_t>(call[3]), times = rows<int64_t>(call[5]);
  const RowScalars<int64_t> counts = row_scalars<int64_t>(call[4]);
  parallel_rows(batch, frames * labels, call.threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const S* const row = static_cast<const S*>(from.data) + b * from.strides[0];
      Collapsed to{tokens[b], times[b], frames, 0};
      double score = 0;
      bool is_odd = false;
      collapse(frames_of(lengths, b, frames), int64_t(call.scalars[0]), to, [&](int64_t t) {
        const Best<T> best = best_of<T>(row + t * from.strides[1], labels);
        score += double(best.value);
        is_odd |= best.is_odd;
        return best.label;
      });
      if (is_odd) to.count = 0;
      to.pad();
      counts.set(b, to.count);
      scores.set(b, is_odd ? T(__builtin_nan("")) : T(score));
    }
  });
}

}  // namespace ctc
}  // namespace MMKERN_ISA
}  // namespace mmkern
