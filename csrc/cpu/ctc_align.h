// The likeliest path of a labelling that is known: mmkern/reference/ctc_align.py.
//
// Blanks and targets have arrays of their own, so that each number depends on its neighbours in the other; which way
// each came is one byte. Numbers are kept beside that of the likeliest.
#pragma once

#include "ctc_greedy.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace ctc {

// One thread's room for rows of so many frames and targets.
template <class T>
class Aligner {
 public:
  Aligner(int64_t frames, int64_t targets)
      : width_(targets + 1),
        in_blank_(targets + 1),
        in_target_(targets + 1),
        next_blank_(targets + 1),
        next_target_(targets + 1),
        skips_(targets + 1),
        from_(2 * frames * (targets + 1)) {}

  // Of n frames and `count` targets: false where there is no path.
  template <class S>
  bool run(const S* rows, int64_t stride, int64_t n, int64_t labels, const int64_t* targets, int64_t count,
           int64_t blank) {
    for (int64_t k = 0; k < count; ++k) {
      if (targets[k] < 0 || targets[k] >= labels) return false;
      skips_.data[k] = k > 0 && targets[k] != targets[k - 1] ? T(0) : minus_infinity<T>();
    }
    for (int64_t k = 0; k <= count; ++k) in_blank_.data[k] = in_target_.data[k] = minus_infinity<T>();
    in_blank_.data[0] = T(0);  // before the first frame
    for (int64_t t = 0; t < n; ++t) {
      const S* const frame = rows + t * stride;
      if (best_of<T>(frame, labels).is_odd) return false;
      step(frame, targets, count, blank, t);
    }
    is_blank_ = count == 0 || in_blank_.data[count] >= in_target_.data[count - 1];
    place_ = is_blank_ ? count : count - 1;
    return (is_blank_ ? in_blank_ : in_target_).data[place_] > minus_infinity<T>();
  }

  // The path, its last frame first: f(t, place), -1 of blank.
  template <class F>
  void walk(int64_t n, F f) {
    for (int64_t t = n - 1; t >= 0; --t) {
      f(t, is_blank_ ? -1 : place_);
      const uint8_t way = from_.data[(2 * t + !is_blank_) * width_ + place_];
      place_ -= is_blank_ ? way : way == 2;
      is_blank_ = is_blank_ ? way == 0 : way == 1;
    }
  }

 private:
  template <class S>
  void step(const S* frame, const int64_t* targets, int64_t count, int64_t blank, int64_t t) {
    const T of_blank = T(element(frame, blank));
    uint8_t* const from_blank = from_.data + 2 * t * width_;
    uint8_t* const from_target = from_blank + width_;
    T top = minus_infinity<T>();
    for (int64_t k = 0; k <= count; ++k) {
      const T stay = in_blank_.data[k], before = k ? in_target_.data[k - 1] : minus_infinity<T>();
      from_blank[k] = before > stay;
      const T number = (before > stay ? before : stay) + of_blank;
      next_blank_.data[k] = number;
      top = number > top ? number : top;
    }
    for (int64_t k = 0; k < count; ++k) {
      const T stay = in_target_.data[k], neighbour = in_blank_.data[k];
      const T past = k ? in_target_.data[k - 1] + skips_.data[k] : minus_infinity<T>();
      T best = stay >= neighbour ? stay : neighbour;
      from_target[k] = past > best ? 2 : stay < neighbour;
      best = (past > best ? past : best) + T(element(frame, targets[k]));
      next_target_.data[k] = best;
      top = best > top ? best : top;
    }
    const T less = top > minus_infinity<T>() ? top : T(0);
    for (int64_t k = 0; k <= count; ++k) in_blank_.data[k] = next_blank_.data[k] - less;
    for (int64_t k = 0; k < count; ++k) in_target_.data[k] = next_target_.data[k] - less;
  }

  const int64_t width_;
  const Scratch<T> in_blank_, in_target_, next_blank_, next_target_;
  const Scratch<T> skips_;  // -inf of a target that only a blank may come before
  const Scratch<uint8_t> from_;
  bool is_blank_ = false;
  int64_t place_ = 0;
};

// Tensors: log-probabilities, targets, lengths, lengths of targets; scores, labels, places. Number: blank.
template <class S>
void run_align(const Call& call) {
  using T = accumulate_t<S>;
  const View& from = call[0];
  const int64_t frames = from.sizes[1], labels = from.sizes[2], blank = int64_t(call.scalars[0]);
  const Rows<const int64_t> targets = rows<const int64_t>(call[1]);
  const RowScalars<const int64_t> lengths = row_scalars<const int64_t>(call[2]);
  const RowScalars<const int64_t> target_lengths = row_scalars<const int64_t>(call[3]);
  const Rows<T> scores = rows<T>(call[4]);
  const Rows<int64_t> path = rows<int64_t>(call[5]), places = rows<int64_t>(call[6]);
  parallel_rows(from.sizes[0], frames * (labels + 8 * targets.cols), call.threads, [&](int64_t first, int64_t last) {
    Aligner<T> aligner(frames, targets.cols);
    for (int64_t b = first; b < last; ++b) {
      const S* const row = static_cast<const S*>(from.data) + b * from.strides[0];
      const int64_t n = frames_of(lengths, b, frames), count = frames_of(target_lengths, b, targets.cols);
      const bool is_found = aligner.run(row, from.strides[1], n, labels, targets[b], count, blank);
      for (int64_t t = is_found ? n : 0; t < frames; ++t) {
        path[b][t] = places[b][t] = -1;
        scores[b][t] = is_found ? T(0) : T(__builtin_nan(""));
      }
      if (!is_found) continue;
      aligner.walk(n, [&](int64_t t, int64_t place) {
        const int64_t label = place < 0 ? blank : targets[b][place];
        places[b][t] = place;
        path[b][t] = label;
        scores[b][t] = T(element(row + t * from.strides[1], label));
      });
    }
  });
}

}  // namespace ctc
}  // namespace MMKERN_ISA
}  // namespace mmkern
