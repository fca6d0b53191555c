// Random numbers by position: mmkern/reference/philox.py.
#pragma once

#include "row_ops.h"

#include "../philox.h"  // after what defines MMKERN_FN

namespace mmkern {
inline namespace MMKERN_ISA {

// The words of as many counters at once: word[j][i] is word j of counter i.
struct PhiloxBlock {
  static constexpr int kCounters = 16;
  alignas(64) unsigned word[4][kCounters];

  // counter(i) is the i-th counter.
  template <class F>
  MMKERN_FN void fill(uint64_t seed, F counter) {
    unsigned *const a = word[0], *const b = word[1], *const c = word[2], *const d = word[3];
    for (int i = 0; i < kCounters; ++i) {
      a[i] = unsigned(counter(i));
      b[i] = unsigned(counter(i) >> 32);
      c[i] = d[i] = 0;
    }
    PhiloxKey key(seed);
    for (int round = 0; round < kPhiloxRounds; ++round, key.next())
      for (int i = 0; i < kCounters; ++i) philox_round(key, a[i], b[i], c[i], d[i]);
  }
};

// Normal numbers first, ..., first + n - 1 of a seed, by the transform of Box and Muller.
template <class T>
class Normals {
 public:
  explicit Normals(const View& seed) : seed_(static_cast<const int64_t*>(seed.data)) {}

  explicit operator bool() const { return seed_ != nullptr; }

  // To room for n + 6 numbers; returns the place of the first.
  const T* fill(int64_t first, int64_t n, T* room) const {
    for (int64_t from = first / 4; from * 4 < first + n; from += kCounters) {
      const int64_t left = (first + n - from * 4 + 3) / 4;
      fill_counters(from, int(left < kCounters ? left : kCounters), room + (from - first / 4) * 4);
    }
    return room + first % 4;
  }

 private:
  static constexpr int kCounters = PhiloxBlock::kCounters;

  // Scalar: for (i < count) four normals of words = philox(seed, offset + from + i);
  void fill_counters(int64_t from, int count, T* to) const {
    PhiloxBlock words;
    words.fill(uint64_t(seed_[0]), [&](int i) { return uint64_t(seed_[1] + from + i); });
    T normals[4][kCounters];
    for (int j = 0; j < 4; j += 2) transform(words.word[j], words.word[j + 1], normals[j], normals[j + 1]);
    for (int i = 0; i < count; ++i)
      for (int j = 0; j < 4; ++j) to[4 * i + j] = normals[j][i];
  }

  static void transform(const unsigned* a, const unsigned* b, T* cosines, T* sines) {
    T u[kCounters], v[kCounters];
    for (int i = 0; i < kCounters; ++i) {
      u[i] = T(float(a[i]) * 0x1p-32f + 0x1p-32f);
      v[i] = T(b[i] >> 8) * T(0x1p-24);
    }
    for (int i = 0; i < kCounters; i += Vec<T>::size) {
      const Vec<T> radius = sqrt(log(Vec<T>::load(u + i)) * Vec<T>(T(-2)));
      Vec<T> sin, cos;
      sin_cos_of_turns(Vec<T>::load(v + i), sin, cos);
      (radius * cos).store(cosines + i);
      (radius * sin).store(sines + i);
    }
  }

  const int64_t* seed_;
};

}  // namespace MMKERN_ISA
}  // namespace mmkern
