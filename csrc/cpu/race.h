// The race that draws one of many: who has the largest weight / E, E an exponential number of each, wins as often as
// its weight says. E is made of words of Philox by position: `exponential` of mmkern/reference/decoding.py.
#pragma once

#include "random.h"

namespace mmkern {
inline namespace MMKERN_ISA {

// v = (w + 1/2) 2^-32, below 1; E is -log(1 - v).
MMKERN_FN float uniform_of(unsigned word) {
  const float v = float(word) * 0x1p-32f + 0x1p-33f;
  return v < 1 - 0x1p-24f ? v : 1 - 0x1p-24f;
}

// The words of a row: word i is of counter first + i / 4.
struct RandomRow {
  uint64_t key, first;

  float uniform(int64_t i) const { return uniform_of(philox(key, first + uint64_t(i / 4)).word[i % 4]); }
};

template <class T>
class Race {
 public:
  static constexpr int64_t kBlock = 4 * PhiloxBlock::kCounters;

  // Those of kBlock in a row, of which the first is number `begin`.
  static MMKERN_FN void make_words(const RandomRow& row, int64_t begin, PhiloxBlock& words) {
    words.fill(row.key, [&](int i) { return row.first + uint64_t(begin / 4 + i); });
  }

  // Who is ahead before the first block comes, with a score that is to be beaten.
  explicit Race(int64_t winner = 0, T best = T(-1)) : winner_(winner), best_(best) {}

  int64_t winner() const { return winner_; }

  // kBlock weights, of which the first is number `begin`; make(words) makes their words, if there is a weight at all.
  // Of equal scores the first counts.
  template <class F>
  MMKERN_FN void enter(const T* weights, int64_t begin, F make) {
    if (!(largest(weights) > 0)) return;
    PhiloxBlock words;
    make(words);
    if (!may_win(weights, words.word)) return;
    alignas(64) T v[kBlock], scores[kBlock];
    for (int i = 0; i < kBlock; ++i) v[i] = T(uniform_of(words.word[i]));
    for (int64_t i = 0; i < kBlock; i += W)
      (Vec<T>::load(weights + i) / -log1p(-Vec<T>::load(v + i))).store(scores + i);
    const T top = largest(scores);
    if (!(top > best_)) return;
    best_ = top;
    for (winner_ = begin; !(scores[winner_ - begin] == best_);) ++winner_;
  }

 private:
  static constexpr int W = Vec<T>::size;

  static MMKERN_FN T largest(const T* numbers) {
    Vec<T> most = Vec<T>::load(numbers);
    for (int64_t i = W; i < kBlock; i += W) most = max(most, Vec<T>::load(numbers + i));
    return max_of(most);
  }

  // Whether any may be better than the best: E is at least the uniform number that it is made of, and that at least
  // 2^-31 times half the word, rounded down.
  MMKERN_FN bool may_win(const T* weights, const unsigned* words) const {
    const Vec<T> bar(best_ * (T(1) - T(0x1p-20)) * T(0x1p-31));  // less what rounding takes
    auto hopeful = bar < bar;
    for (int64_t i = 0; i < kBlock; i += W)
      hopeful = hopeful | (Vec<T>::load(weights + i) > bar * halves_of(words + i));
    return any(hopeful);
  }

  static MMKERN_FN Vec<T> halves_of(const unsigned* words) {
    if constexpr (sizeof(T) == sizeof(float)) {
      const Bits<1> all(Vec<float>::load(reinterpret_cast<const float*>(words)));
      return ((all >> 1) & 0x7fffffff).to_float();
    } else {
      Vec<T> halves;
      for (int i = 0; i < W; ++i) halves.set(i, T(words[i] >> 1));
      return halves;
    }
  }

  int64_t winner_;
  T best_;
};

}  // namespace MMKERN_ISA
}  // namespace mmkern
