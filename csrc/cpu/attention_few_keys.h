// Attention to few keys: rows meet all of them in one tile, so that their softmax is no running one.
//
// A few rows at a time go from the product to the weights while their scores are in the first cache, several rows side
// by side. They are read from where they lie, and the next ones are asked for meanwhile.
#pragma once

#include "attention_softmax.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace attention {

// f(Count<n>{}) for 1 <= n <= kMost.
template <int kMost, class F>
MMKERN_FN void with_count(int n, F f) {
  if (n == kMost) return f(Count<kMost>{});
  if constexpr (kMost > 1) with_count<kMost - 1>(n, f);
}

// The keys of one head that a call sees, where they are so few and nothing but a key mask hides any.
template <class T>
class FewKeys {
  static constexpr int W = Vec<T>::size;
  static constexpr int64_t kStride = TileShape<T>::block_stride;

 public:
  static constexpr int kRows = 6;            // side by side; more have no place for their addresses
  static constexpr int kTogether = 4 * kRows;
  static constexpr int64_t kMost = kStride;  // keys

  // Whether up to `keys` keys are few.
  static bool suits(const Problem<T>& p, int64_t keys) {
    const bool deep = p.width > TileShape<T>::depth || p.value_width > TileShape<T>::depth;
    const bool plain = p.softcap <= 0 && !p.biases[0] && !p.biases[1] && !p.mask && p.left < 0 && p.right < 0;
    return keys <= kMost && plain && !p.drops() && !deep;
  }

  // Those in `seen` that the key mask lets through.
  FewKeys(const Problem<T>& p, int64_t batch, KeyRange seen) : first_(KeyBlocks<T>(seen).first) {
    const int64_t n = seen.is_empty() ? 0 : seen.last - first_;
    if (!suits(p, n)) return;
    vectors_ = int(blocks_of(n, W));
    const uint8_t* const bits = p.key_mask ? p.key_bits(batch) : nullptr;
    for (int64_t i = 0; i < vectors_ * W; ++i) {
      const int64_t j = first_ + i;
      const bool is_seen = j >= seen.first && j < seen.last && (!bits || bits[j]);
      hidden_[i] = is_seen ? T(0) : minus_infinity<T>();
    }
  }
  explicit operator bool() const { return vectors_ > 0; }
  int vectors() const { return vectors_; }
  MMKERN_FN Vec<T> hidden(int v) const { return Vec<T>::load(hidden_ + v * W); }

  // f(r, n) when a tile of scores holds the products of n rows from r on, at most kRows, with `columns`; the rest up to
  // kRows are those of row r + n - 1. Rows have `width` numbers; scores are yet to be scaled, and hidden(v) to be
  // added.
  template <class F>
  void for_each_rows(const T* const* rows, int64_t count, const T* columns, int64_t width, T* tile, F f) const {
    const int64_t ahead = count > 1 ? kTogether * (rows[1] - rows[0]) : 0;
    const int groups = int(blocks_of(vectors_, kVecs));
    for (int64_t begin = 0; begin < count; begin += kTogether) {
      const int64_t end = smaller(begin + kTogether, count);
      for (int g = 0; g < groups; ++g) {
        const int first = vectors_ * g / groups, last = vectors_ * (g + 1) / groups;
        with_count<kVecs>(last - first, [&](auto c) __attribute__((always_inline)) {
          for (int64_t r = begin; r < end; r += kRows)
            multiply<decltype(c)::value>(rows + r, smaller(kRows, end - r), g == 0 ? ahead : 0,
                                         columns + first_ * width, first, width, tile + r * kStride + first * W);
        });
      }
      for (int64_t r = begin; r < end; r += kRows) f(r, smaller(kRows, end - r));
    }
  }

 private:
#if defined(MMKERN_AVX512) || defined(__aarch64__)
  static constexpr int kVecs = 4;  // 24 of 32 registers hold sums
#else
  static constexpr int kVecs = 2;  // 12 of 16 registers hold sums
#endif

  // Scalar: for (i < kRows) for (j < kCount * W) to[i][j] = dot(rows[i], columns[first * W + j])
  // Rows from n on are the last one. What lies `ahead` of each row is asked for.
  template <int kCount>
  static MMKERN_FN void multiply(const T* const* rows, int64_t n, int64_t ahead, const T* columns, int first,
                                 int64_t width, T* to) {
    constexpr int C = TileShape<T>::cols;
    constexpr int64_t kLine = 64 / sizeof(T);
    const T *x[kRows], *y[kCount];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) x[i] = rows[smaller(i, n - 1)];
#pragma GCC unroll 16
    for (int v = 0; v < kCount; ++v) y[v] = columns + (first + v) / 2 * width * C + (first + v) % 2 * W;
    Vec<T> s[kRows][kCount];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < kCount; ++v) s[i][v] = Vec<T>(T(0));
    for (int64_t line = 0; line < width; line += kLine) {
      if (ahead)
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) __builtin_prefetch(x[i] + ahead + line);
      for (int64_t k = line; k < smaller(line + kLine, width); ++k) {
        Vec<T> yk[kCount];
#pragma GCC unroll 16
        for (int v = 0; v < kCount; ++v) yk[v] = Vec<T>::load(y[v] + k * C);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const Vec<T> xi(x[i][k]);
#pragma GCC unroll 16
          for (int v = 0; v < kCount; ++v) s[i][v] = fma(xi, yk[v], s[i][v]);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < kCount; ++v) s[i][v].store(to + i * kStride + v * W);
  }

  int64_t first_;
  int vectors_ = 0;
  T hidden_[kMost];  // added to scores
};

}  // namespace attention
}  // namespace MMKERN_ISA
}  // namespace mmkern
