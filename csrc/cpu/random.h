// Random numbers by position: mmkern/reference/philox.py.
#pragma once

#include "row_ops.h"

#include "../philox.h"  // after what defines MMKERN_FN

namespace mmkern {
inline namespace MMKERN_ISA {

// The four words of as many counters at once, one counter after another. Of a 64-bit lane the low word counts: that
// of a product is the low one of the next round, and what is above it is never looked at.
struct PhiloxBlock {
  static constexpr int kCounters = 16;
  alignas(64) unsigned word[4 * kCounters];

  // counter(i) is the i-th counter.
  template <class F>
  MMKERN_FN void fill(uint64_t seed, F counter) {
    constexpr int N = kLanes<double>, R = 2;  // registers at once: two chains, and all that they need has room
    alignas(64) uint64_t counters[kCounters];
    for (int i = 0; i < kCounters; ++i) counters[i] = counter(i);
    for (int i = 0; i < kCounters; i += R * N) {
      NativeWide a[R], b[R], c[R], d[R];
      for (int r = 0; r < R; ++r) {
        load_native<uint64_t, N>(a[r], counters + i + r * N);
        b[r] = a[r] >> 32;
        c[r] = d[r] = NativeWide{};
      }
      PhiloxKey key(seed);
      for (int round = 0; round < kPhiloxRounds; ++round, key.next())
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) philox_round(key, a[r], b[r], c[r], d[r]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) put(a[r], b[r], c[r], d[r], word + 4 * (i + r * N), LaneList<__integer_pack(N)...>{});
    }
  }

 private:
  static MMKERN_FN void philox_round(PhiloxKey key, NativeWide& a, NativeWide& b, NativeWide& c, NativeWide& d) {
    const NativeWide first = multiply_low_words(a, NativeWide{} + kPhiloxFirst);
    const NativeWide second = multiply_low_words(c, NativeWide{} + kPhiloxSecond);
    a = (second >> 32) ^ b ^ uint64_t(key.low);
    c = (first >> 32) ^ d ^ uint64_t(key.high);
    b = second;
    d = first;
  }

  template <int... L>
  static MMKERN_FN void put(NativeWide a, NativeWide b, NativeWide c, NativeWide d, unsigned* to, LaneList<L...>) {
    constexpr int N = sizeof...(L);
    constexpr uint64_t kLow = 0xffffffff;
    const NativeWide ab = (a & kLow) | (b << 32), cd = (c & kLow) | (d << 32);
    const NativeWide low = __builtin_shufflevector(ab, cd, (L % 2 * N + L / 2)...);
    const NativeWide high = __builtin_shufflevector(ab, cd, (L % 2 * N + L / 2 + N / 2)...);
    store_native<uint64_t, N>(low, to);
    store_native<uint64_t, N>(high, to + 2 * N);
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
    constexpr int kPairs = 2 * kCounters;
    PhiloxBlock words;
    words.fill(uint64_t(seed_[0]), [&](int i) { return uint64_t(seed_[1] + from + i); });
    T u[kPairs], v[kPairs], cosines[kPairs], sines[kPairs];
    for (int i = 0; i < kPairs; ++i) {
      u[i] = T(float(words.word[2 * i]) * 0x1p-32f + 0x1p-32f);
      v[i] = T(words.word[2 * i + 1] >> 8) * T(0x1p-24);
    }
    for (int i = 0; i < kPairs; i += Vec<T>::size) {
      const Vec<T> radius = sqrt(log(Vec<T>::load(u + i)) * Vec<T>(T(-2)));
      Vec<T> sin, cos;
      sin_cos_of_turns(Vec<T>::load(v + i), sin, cos);
      (radius * cos).store(cosines + i);
      (radius * sin).store(sines + i);
    }
    for (int i = 0; i < 2 * count; ++i) {
      to[2 * i] = cosines[i];
      to[2 * i + 1] = sines[i];
    }
  }

  const int64_t* seed_;
};

}  // namespace MMKERN_ISA
}  // namespace mmkern
