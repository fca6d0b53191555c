// Attention to few keys: the scores of some rows with all keys stay in registers from the product to the weights.
//
// A tile of scores in memory costs little by itself; but rows of a register tile as wide as all keys are read from
// where they lie, the softmax of several of them runs side by side, and the next rows are asked for while these are at
// work.
#pragma once

#include "attention_softmax.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace attention {

#if defined(MMKERN_AVX512) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int kMostVectors = kRegisters / 4;

// Rows whose scores fit in the registers, beside the vectors of keys and a number of a row; of more than kMostRows, the
// addresses would not.
constexpr int kMostRows = 8;
constexpr int rows_in_registers(int vectors) {
  const int rows = (kRegisters - 1 - vectors) / vectors;
  return rows < kMostRows ? rows : kMostRows;
}

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

 public:
  static constexpr int64_t kMost = kMostVectors * W;

  // Whether scores with up to `keys` keys can stay in registers.
  static bool suits(const Problem<T>& p, int64_t keys) {
    const bool deep = p.width > TileShape<T>::depth || p.value_width > TileShape<T>::depth;
    const bool plain = p.softcap <= 0 && !p.biases[0] && !p.biases[1] && !p.mask && p.left < 0 && p.right < 0;
    return keys <= kMost && plain && !p.drops() && !deep;
  }

  // Those in `seen` that the key mask lets through.
  FewKeys(const Problem<T>& p, int64_t batch, KeyRange seen) : first_(KeyBlocks<T>(seen).first) {
    const int64_t n = seen.is_empty() ? 0 : seen.last - first_;
    if (!suits(p, n)) return;
    vectors_ = blocks_of(n, W);
    const uint8_t* const bits = p.key_mask ? p.key_bits(batch) : nullptr;
    for (int64_t i = 0; i < vectors_ * W; ++i) {
      const int64_t j = first_ + i;
      const bool is_seen = j >= seen.first && j < seen.last && (!bits || bits[j]);
      hidden_[i] = is_seen ? T(0) : minus_infinity<T>();
    }
  }
  explicit operator bool() const { return vectors_ > 0; }

  // f(r, n, s) for n rows from r on of `rows`, of `width` numbers each: s[i][v] + hidden(v) are the scores of row r + i
  // with `columns`, in vectors; from n on they are those of some other row. n is at most kMostRows.
  template <class F>
  void for_each_row(const T* const* rows, int64_t count, const T* columns, int64_t width, F f) const {
    with_count<kMostVectors>(int(vectors_), [&](auto n) __attribute__((always_inline)) {
      constexpr int kVecs = decltype(n)::value, R = rows_in_registers(kVecs);
      for (int64_t r = 0; r < count; r += R) {
        Vec<T> s[R][kVecs];
        multiply(rows + r, count - r, count > 1 ? R * (rows[1] - rows[0]) : 0, columns + first_ * width, width, s);
        f(r, int(smaller(R, count - r)), s);
      }
    });
  }
  MMKERN_FN Vec<T> hidden(int v) const { return Vec<T>::load(hidden_ + v * W); }

 private:
  // Scalar: for (i < R) for (j < kVecs * W) s[i][j] = dot(rows[i], columns[j]);  rows from `count` on are the last one
  // What lies `ahead` of each row is asked for.
  template <int R, int kVecs>
  static MMKERN_FN void multiply(const T* const* rows, int64_t count, int64_t ahead, const T* columns, int64_t width,
                                 Vec<T> (&s)[R][kVecs]) {
    constexpr int C = TileShape<T>::cols, kSlivers = (kVecs + 1) / 2;
    constexpr int64_t kLine = 64 / sizeof(T);
    const T *x[R], *y[kSlivers];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) x[i] = rows[smaller(i, count - 1)];
#pragma GCC unroll 16
    for (int c = 0; c < kSlivers; ++c) y[c] = columns + c * width * C;
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) s[i][v] = Vec<T>(T(0));
    for (int64_t line = 0; line < width; line += kLine) {
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) __builtin_prefetch(x[i] + ahead + line);
      for (int64_t k = line; k < smaller(line + kLine, width); ++k) {
        Vec<T> yk[kVecs];
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) yk[v] = Vec<T>::load(y[v / 2] + k * C + v % 2 * W);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
          const Vec<T> xi(x[i][k]);
#pragma GCC unroll 16
          for (int v = 0; v < kVecs; ++v) s[i][v] = fma(xi, yk[v], s[i][v]);
        }
      }
    }
  }

  int64_t first_, vectors_ = 0;
  T hidden_[kMost];  // added to scores
};

}  // namespace attention
}  // namespace MMKERN_ISA
}  // namespace mmkern
