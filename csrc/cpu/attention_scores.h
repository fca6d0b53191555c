// Scores of a block of rows with a block of keys: a few rows at a time, read from where they lie, go from the product
// to the weights while their scores are in the first cache, and the next rows are asked for meanwhile.
#pragma once

#include "attention.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace attention {

constexpr int kRowsAtOnce = 6;   // more would find no place for their addresses
constexpr int kRowsInTurn = 54;  // that meet some columns before the next ones: the columns stay in the first cache
#if defined(MMKERN_AVX512) || defined(__aarch64__)
constexpr int kVectorsAtOnce = 4;  // 24 of 32 registers hold sums
#else
constexpr int kVectorsAtOnce = 2;  // 12 of 16 registers hold sums
#endif

// A tile of scores, whose rows are a block_stride apart; rows at once may reach beyond the last one of a block.
template <class T>
T* tile_of_scores(ThreadBuffer& buffer) {
  return buffer.reserve<T>((kBlockRows<T> + kRowsAtOnce) * TileShape<T>::block_stride);
}

// How a lane of a row and one of a column are multiplied.
struct Numbers {
  template <class V>
  static MMKERN_FN V multiply_add(V x, V y, V sum) {
    return fma(x, y, sum);
  }
};
#if defined(MMKERN_AVX512)
struct Pairs {
  template <class V>
  static MMKERN_FN V multiply_add(V x, V y, V sum) {
    return dot_pairs(x, y, sum);
  }
};
#endif

// Scalar: for (i < kRowsAtOnce) for (j < kVecs * W) to[i][j] = Σ_k rows[i][k] * columns[k][first * W + j], k in [k0,
// k1) or += if `adds`. Rows from n on are the last one. What lies `ahead` of each row is asked for.
template <class Product, class T, int kVecs>
MMKERN_FN void multiply_rows(const T* const* rows, int64_t n, int64_t ahead, const T* columns, int64_t width, int first,
                             int64_t k0, int64_t k1, bool adds, T* to) {
  constexpr int W = Vec<T>::size, C = TileShape<T>::cols, kStride = TileShape<T>::block_stride;
  constexpr int64_t kLine = 64 / sizeof(T);
  const T *x[kRowsAtOnce], *y[kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRowsAtOnce; ++i) x[i] = rows[smaller(i, n - 1)];
#pragma GCC unroll 16
  for (int v = 0; v < kVecs; ++v) y[v] = columns + (first + v) / 2 * width * C + (first + v) % 2 * W;
  const Into<T> into{to, kStride, adds};
  Vec<T> s[kRowsAtOnce][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRowsAtOnce; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) s[i][v] = Vec<T>(T(0));
  for (int64_t line = k0; line < k1; line += kLine) {
    if (ahead)
#pragma GCC unroll 16
      for (int i = 0; i < kRowsAtOnce; ++i) __builtin_prefetch(x[i] + ahead + line);
    for (int64_t k = line; k < smaller(line + kLine, k1); ++k) {
      Vec<T> yk[kVecs];
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) yk[v] = Vec<T>::load(y[v] + k * C);
#pragma GCC unroll 16
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const Vec<T> xi(x[i][k]);
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) s[i][v] = Product::multiply_add(xi, yk[v], s[i][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRowsAtOnce; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) into(i, v * W, s[i][v]);
}

// Scalar: for (i < kRowsAtOnce) for (j < W) to[i][j] = j < kKeys ? dot(rows[i], keys.row(j)) : 0
template <class Product, class T, int kKeys>
MMKERN_FN void dot_rows(const T* const* rows, int64_t n, const HeadColumns<T>& keys, T* to) {
  constexpr int W = Vec<T>::size;
  const T* x[kRowsAtOnce];
  Vec<T> sums[kRowsAtOnce][W];
#pragma GCC unroll 16
  for (int i = 0; i < kRowsAtOnce; ++i) {
    x[i] = rows[smaller(i, n - 1)];
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) sums[i][j] = Vec<T>(T(0));
  }
  for_each_vec<T>(keys.width, [&](auto at) __attribute__((always_inline)) {
    Vec<T> y[kKeys];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) y[j] = at.load(keys.row(j));
#pragma GCC unroll 16
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const Vec<T> xi = at.load(x[i]);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) sums[i][j] = Product::multiply_add(xi, y[j], sums[i][j]);
    }
  });
#pragma GCC unroll 16
  for (int i = 0; i < kRowsAtOnce; ++i) sum_of_each(sums[i]).store(to + i * TileShape<T>::block_stride);
}

template <class Product, class T, class F>
void score_rows_by(const T* const* rows, int64_t count, const HeadColumns<T>& columns, KeyRange keys, T* tile, F f) {
  constexpr int W = Vec<T>::size, kStride = TileShape<T>::block_stride;
  const int64_t width = columns.width, depth = depth_of<T>(width);
  const int64_t ahead = count > 1 ? kRowsInTurn * (rows[1] - rows[0]) : 0;
  const int few = columns.few_of(keys.last), vectors = int(blocks_of(keys.last - keys.first - few, W));
  const int groups = int(blocks_of(vectors, kVectorsAtOnce));
  for (int64_t begin = 0; begin < count; begin += kRowsInTurn) {
    const int64_t end = smaller(begin + kRowsInTurn, count);
    for (int g = 0; g < groups; ++g) {
      const int first = vectors * g / groups, last = vectors * (g + 1) / groups;
      with_count<kVectorsAtOnce>(last - first, [&](auto vecs) __attribute__((always_inline)) {
        int64_t k = 0;
        do {
          for (int64_t r = begin; r < end; r += kRowsAtOnce)
            multiply_rows<Product, T, decltype(vecs)::value>(
                rows + r, end - r, g == 0 ? ahead : 0, columns.from(keys.first), width, first, k,
                smaller(k + depth, width), k > 0, tile + r * kStride + first * W);
        } while ((k += depth) < width);
      });
    }
    for (int64_t r = begin; r < end; r += kRowsAtOnce) {
      if (few)
        with_count<HeadColumns<T>::kFew>(few, [&](auto n) __attribute__((always_inline)) {
          dot_rows<Product, T, decltype(n)::value>(rows + r, end - r, columns, tile + r * kStride + vectors * W);
        });
      f(r, smaller(kRowsAtOnce, end - r));
    }
  }
}

// f(r, n) when the tile holds the products of rows r to r + n - 1, at most kRowsAtOnce, with `keys` of the packed
// columns; further rows up to kRowsAtOnce are like the last.
template <class T, class F>
void score_rows(const T* const* rows, int64_t count, const HeadColumns<T>& columns, KeyRange keys, T* tile, F f) {
#if defined(MMKERN_AVX512)
  if constexpr (std::is_same_v<T, float>)
    if (columns.are_pairs) return score_rows_by<Pairs>(rows, count, columns, keys, tile, f);
#endif
  score_rows_by<Numbers>(rows, count, columns, keys, tile, f);
}

// The rows of `from` that a block is about.
template <class T>
class BlockRows {
 public:
  BlockRows(const RowBlock<T>& block, const View& from, ThreadBuffer& buffer)
      : width_(from.sizes[3]), stride_(up_to(Vec<T>::size, width_)), block_(block) {
    Stored<T>(from).with([&](const auto* data) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
      T* const packed = std::is_same_v<S, T> ? nullptr : buffer.reserve<T>(kBlockRows<T> * stride_ + 1);
      if (packed && block.count > 0) {
        const Row& last = block.rows[block.count - 1];
        next_ = RowsAhead(from, Problem<T>::place(from, last.batch, last.head, last.query + 1));
      }
      block.for_each_run(from, [&](int64_t r, int64_t n, int64_t place) {
        if constexpr (std::is_same_v<S, T>) {
          for (int64_t i = 0; i < n; ++i) rows_[r + i] = data + place + i * width_;
        } else {
          for (int64_t i = 0; i < n; ++i) rows_[r + i] = packed + (r + i) * stride_;
          copy(data + place, n, packed + r * stride_);
        }
      });
    });
  }
  const T* const* each() const { return rows_; }
  // For the share of rows [first, first + n) of what the next block has to pack; else multiply_rows asks for them.
  void ask_next(int64_t first, int64_t n) const { next_.ask(first, first + n); }

  // The same a stride apart in whole vectors, near enough to each other to stay in the first cache.
  Rows<const T> matrix(ThreadBuffer& buffer) const {
    bool dense = true;
    for (int64_t r = 1; r < block_.count; ++r) dense = dense && rows_[r] - rows_[r - 1] == stride_;
    if (dense && width_ == stride_) return {rows_[0], block_.count, width_, stride_};
    T* const packed = buffer.reserve<T>(kBlockRows<T> * stride_ + 1);
    for (int64_t r = 0; rows_[0] != packed && r < block_.count; ++r) copy(rows_[r], 1, packed + r * stride_);
    return {packed, block_.count, width_, stride_};
  }

 private:
  // n rows one behind the other.
  template <class S>
  void copy(const S* from, int64_t n, T* to) const {
    constexpr int W = Vec<T>::size;
    const int64_t whole = width_ / W * W;
    if (whole == width_) {
      for (int64_t d = 0; d < n * width_; d += W) Vec<T>::load(from + d).store(to + d);
      return;
    }
    for (; n > 0; --n, from += width_, to += stride_) {
      for (int64_t d = 0; d < whole; d += W) Vec<T>::load(from + d).store(to + d);
      Vec<T>::load(from + whole, int(width_ - whole)).store(to + whole);
    }
  }

  const int64_t width_, stride_;
  const RowBlock<T>& block_;
  RowsAhead next_;
  const T* rows_[kBlockRows<T>];
};

// kVecs vectors of a row, from `first` on; of the last one `lanes` are of the row, the others are zeros.
template <class T, int kVecs>
struct Run {
  const int64_t first;
  const int lanes;

  template <class S>
  MMKERN_FN Vec<T> load(const S* row, int i) const {
    constexpr int W = Vec<T>::size;
    const S* const at = row + first + i * W;
    return i + 1 < kVecs || lanes == W ? Vec<T>::load(at) : Vec<T>::load(at, lanes);
  }
  MMKERN_FN void store(T* row, int i, Vec<T> v) const {
    constexpr int W = Vec<T>::size;
    v.store(row + first + i * W, i + 1 < kVecs ? W : lanes);
  }
};

// f(Run) for all of a row, at most kMost vectors at once.
template <class T, int kMost, class F>
MMKERN_FN void for_each_run(int64_t width, F f) {
  constexpr int W = Vec<T>::size;
  for (int64_t first = 0; first < width; first += kMost * W) {
    const int64_t cols = smaller(kMost * W, width - first);
    with_count<kMost>(int(blocks_of(cols, W)), [&](auto count) __attribute__((always_inline)) {
      constexpr int kVecs = decltype(count)::value;
      f(Run<T, kVecs>{first, int(cols - (kVecs - 1) * W)}, count);
    });
  }
}

// Products of few queries with keys where they lie. Each is added up in one order, wherever its key stands: so the
// backward has the scores of the forward.

constexpr int64_t kFewRows = 8;  // of a group; above, packing k pays

// Scalar: for (j < W) scores[j] = dot(q, k[j]), keys a stride apart
// Keys are read as they lie, one behind the other: memory serves that up to 1.1 times as fast as W rows in turns.
template <class T, class S>
MMKERN_FN void dot_keys(const T* q, const S* k, int64_t stride, int64_t width, T* scores) {
  constexpr int W = Vec<T>::size;
  Vec<T> sums[W];
#pragma GCC unroll 16
  for (int j = 0; j < W; ++j) sums[j] = Vec<T>(T(0));
  for_each_run<T, W / 2>(width, [&](auto run, auto count) __attribute__((always_inline)) {
    constexpr int kVecs = decltype(count)::value;
    Vec<T> x[kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) x[i] = run.load(q, i);
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j)
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) sums[j] = fma(x[i], run.load(k + j * stride, i), sums[j]);
  });
  sum_of_each(sums).store(scores);
}

// Scalar: for (j < n) scores[j] = dot(q, k[j]), n < W
template <class T, class S>
void dot_last_keys(const T* q, const S* k, int64_t stride, int64_t n, int64_t width, T* scores) {
  Vec<T> sums[Vec<T>::size];
  for (Vec<T>& sum : sums) sum = Vec<T>(T(0));
  for_each_vec<T>(width, [&](auto at) {
    const Vec<T> x = at.load(q);
    for (int64_t j = 0; j < n; ++j) sums[j] = fma(x, at.load(k + j * stride), sums[j]);
  });
  sum_of_each(sums).store(scores, int(n));
}

// The same of any n.
template <class T, class S>
void dot_each_key(const T* q, const S* k, int64_t stride, int64_t n, int64_t width, T* scores) {
  constexpr int W = Vec<T>::size;
  int64_t j = 0;
  for (; j + W <= n; j += W) dot_keys(q, k + j * stride, stride, width, scores + j);
  if (j < n) dot_last_keys(q, k + j * stride, stride, n - j, width, scores + j);
}

// The keys of a head that are seen at all, and what else decides whether a row sees one.
template <class T>
class Seen {
 public:
  const KeyRange unmasked, keys;
  const bool holes;  // the key mask has some inside

  // `keys` of those in `range`, `unmasked` of all.
  Seen(const Problem<T>& p, int64_t unit, KeyRange range, ThreadBuffer& buffer)
      : unmasked(p.unmasked(unit / p.groups)),
        keys(unmasked.within(range)),
        holes(p.has_holes(unit / p.groups, keys)),
        plain_(p.scale > 0 && p.softcap <= 0 && !p.biases[0] && !p.biases[1] && !p.mask && !p.drops()),
        hidden_(plain_ && !keys.is_empty() ? lanes(p, unit, buffer) : nullptr) {}

  // Whether rows r to r + n - 1 of the block see the same of some keys, and their scores are products times the scale.
  bool is_same(const RowBlock<T>& block, int64_t r, int64_t n, KeyRange some) const {
    const KeyRange inner = some.within(keys);
    for (int64_t i = r; plain_ && i < r + n; ++i)
      if (block.bands[i].first > inner.first || block.bands[i].last < inner.last) return false;
    return plain_;
  }
  // Then products of kRowsAtOnce rows with those keys, in whole vectors, become −∞ where they are hidden.
  void hide(KeyRange some, T* products) const {
    constexpr int W = Vec<T>::size;
    constexpr int64_t kStride = TileShape<T>::block_stride;
    const bool cut = some.last < keys.last;  // else the lanes beyond are hidden as they are
    for (int64_t j = some.first; j < some.last; j += W) {
      if (!holes && j >= keys.first && j + W <= smaller(keys.last, some.last)) continue;
      const Vec<T> hidden = Vec<T>::load(hidden_ + j);
      for (int i = 0; i < kRowsAtOnce; ++i) {
        T* const at = products + i * kStride + j - some.first;
        select(hidden == Vec<T>(T(0)), Vec<T>::load(at), hidden).store(at);
        for (int64_t lane = some.last - j; cut && lane < W; ++lane) at[lane] = minus_infinity<T>();
      }
    }
  }

 private:
  const T* lanes(const Problem<T>& p, int64_t unit, ThreadBuffer& buffer) const {
    constexpr int64_t kCols = TileShape<T>::cols;
    T* const hidden = buffer.reserve<T>(p.keys + 2 * kCols);
    const uint8_t* const bits = holes ? p.key_bits(unit / p.groups) : nullptr;
    for (int64_t j = keys.first / kCols * kCols; j < blocks_of(keys.last, kCols) * kCols; ++j) {
      const bool is_seen = j >= keys.first && j < keys.last && (!bits || bits[j]);
      hidden[j] = is_seen ? T(0) : minus_infinity<T>();
    }
    return hidden;
  }

  const bool plain_;
  const T* const hidden_;  // for each key: 0, or −∞ where it is hidden
};

}  // namespace attention
}  // namespace MMKERN_ISA
}  // namespace mmkern
