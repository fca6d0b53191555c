// The k best of each row of scores that live in tiles.
//
// A tile row is compared, a vector at a time, with the k-th best that its row has so far; after the first tiles hardly
// a score passes. One that does goes into a heap that lies where the results will: k numbers and k places a row are all
// that is kept. Columns come in their order, so of equal scores the first ones are there first.
//
// A metric says what becomes of a score s of row i of x and row j of y:
//   keys(i) is a function of (s, j, lanes): their keys, larger ones better; no smaller than what they rank by;
//   rank(i, j, key) is what the pair ranks by, bar(rank) a key that no worse one has;
//   value(rank) is the result; kNanFirst: NaN ranks before all else, or behind.
// Many rows of x meet packed rows of y on the tile loop. Packing pays for itself only then: few rows meet those of y
// where they lie, of which each thread has a range, and its best ones.
#pragma once

#include "softmax.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace topk {

// Room for the best ones of `rows` rows.
template <class T>
struct Results {
  int64_t k;
  T* values;
  int64_t* indices;
};

// The best pairs of a row so far: a heap, the worst on top.
template <class T, bool kNanFirst>
class Best {
 public:
  Best(const Results<T>& all, int64_t row, int64_t size)
      : values_(all.values + row * all.k), indices_(all.indices + row * all.k), k_(all.k), size_(size) {}

  // What another has to rank before: NaN, which is above and below nothing, while there is room.
  template <class Metric>
  T bar(const Metric& metric) const {
    return size_ == k_ && k_ > 0 ? metric.bar(values_[0]) : T(__builtin_nan(""));
  }

  void offer(T value, int64_t index) {
    if (size_ < k_) {
      int64_t at = size_++;
      for (; at > 0 && is_before(parent(at), value, index); at = parent(at)) move(parent(at), at);
      put(at, value, index);
    } else if (k_ > 0 && !is_before(0, value, index)) {
      sink(value, index, k_);
    }
  }
  // Best first.
  void sort() {
    for (int64_t last = size_ - 1; last > 0; --last) {
      const T value = values_[last];
      const int64_t index = indices_[last];
      move(0, last);
      sink(value, index, last);
    }
  }

 private:
  static int64_t parent(int64_t at) { return (at - 1) / 2; }
  void put(int64_t at, T value, int64_t index) {
    values_[at] = value;
    indices_[at] = index;
  }
  void move(int64_t from, int64_t to) { put(to, values_[from], indices_[from]); }
  bool is_before(int64_t at, T value, int64_t index) const {
    const T mine = values_[at];
    if (mine > value || mine < value) return mine > value;
    const bool nan = mine != mine;
    return nan == (value != value) ? indices_[at] < index : nan == kNanFirst;
  }
  // In place of the top of a heap of n.
  void sink(T value, int64_t index, int64_t n) {
    int64_t at = 0;
    for (int64_t child = 1; child < n; child = 2 * at + 1) {
      if (child + 1 < n && is_before(child, values_[child + 1], indices_[child + 1])) ++child;
      if (is_before(child, value, index)) {
        put(at, value, index);
        return;
      }
      move(child, at);
      at = child;
    }
    put(at, value, index);
  }

  T* const values_;
  int64_t* const indices_;
  const int64_t k_;
  int64_t size_;
};

template <class T, class Metric>
using BestOf = Best<T, Metric::kNanFirst>;

// Offers scores s[0, cols) of row i with rows j, ... of y; s, in whole vectors, becomes their keys.
template <class T, class Metric>
void offer_row(const Metric& metric, int64_t i, int64_t j, int cols, T* s, BestOf<T, Metric>& best) {
  constexpr int W = Vec<T>::size;
  const auto keys_of = metric.keys(i);
  T bar = best.bar(metric);
  for (int c = 0; c < cols; c += W) {
    const int lanes = cols - c < W ? cols - c : W;
    const Vec<T> keys = keys_of(Vec<T>::load(s + c), j + c, lanes);
    keys.store(s + c);
    if (all(keys <= Vec<T>(bar))) continue;  // NaN is not
    for (int lane = 0; lane < lanes; ++lane) {
      const T key = s[c + lane];
      if (key <= bar) continue;
      best.offer(metric.rank(i, j + c + lane, key), j + c + lane);
      bar = best.bar(metric);
    }
  }
}

// Scalar: for (q < Q) for (j < W / Q) sums[q][j] = dot(queries[q], y[j]), of `width` terms
// What lies `ahead` in y is asked for.
template <class T, int Q, class S>
MMKERN_FN Vec<T> dot_few(const T* queries, int64_t query_stride, const S* y, int64_t stride, int64_t width,
                         int64_t ahead) {
  constexpr int W = Vec<T>::size, kRows = W / Q;
  Vec<T> sums[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) sums[i] = Vec<T>(T(0));
  for_each_vec<T>(width, [&](auto at) __attribute__((always_inline)) {
    Vec<T> rows[kRows];
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j) {
      at.prefetch(y + j * stride + ahead);
      rows[j] = at.load(y + j * stride);
    }
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
      const Vec<T> x = at.load(queries + q * query_stride);
#pragma GCC unroll 16
      for (int j = 0; j < kRows; ++j) sums[q * kRows + j] = fma(x, rows[j], sums[q * kRows + j]);
    }
  });
  return sum_of_each(sums);
}

// Few rows, whose products with rows of y are taken from where these lie. Each is added up in one order, wherever it
// stands.
template <class T>
class FewRows {
 public:
  // So many at once share what is loaded.
  static constexpr int kMost = Vec<T>::size < 8 ? Vec<T>::size : 8;

  template <class S>
  explicit FewRows(const Rows<const S>& x)
      : stride_(x.cols + 64 / int(sizeof(T))),
        room_((x.rows + kMost) * stride_),
        queries_{room_.data, x.rows, x.cols, stride_} {
    for (int64_t i = 0; i < (x.rows + kMost) * stride_; ++i) room_.data[i] = 0;
    for (int64_t i = 0; i < x.rows; ++i)
      for_each_vec<T>(x.cols, [&](auto at) { at.keep(room_.data + i * stride_, at.load(x[i])); });
  }

  // Scalar: for (i < x.rows) for (j < y.rows) scores[i * ld + j] = dot(x[i], y[j])
  template <class S>
  void multiply(const Rows<const S>& y, T* scores, int64_t ld) const {
    for (int64_t i = 0; i < queries_.rows; i += kMost) some<kMost>(i, y, scores, ld);
  }

 private:
  // With rows from i on, at once as few as hold those that are left.
  template <int Q, class S>
  void some(int64_t i, const Rows<const S>& y, T* scores, int64_t ld) const {
    if constexpr (Q > 1)
      if (queries_.rows - i <= Q / 2) return some<Q / 2>(i, y, scores, ld);
    constexpr int kRows = Vec<T>::size / Q;
    alignas(64) T sums[Vec<T>::size];
    const int64_t count = smaller(Q, queries_.rows - i), width = queries_.cols;
    const int64_t step = y.rows < kRows ? 1 : kRows, stride = y.rows < kRows ? 0 : y.stride;
    for (int64_t k = 0; k == 0 || k < width; k += kDepth) {
      for (int64_t j = 0; j < y.rows; j += step) {
        const int64_t from = smaller(j, y.rows - step);  // the last ones are among those before
        dot_few<T, Q>(queries_[i] + k, queries_.stride, y[from] + k, stride, smaller(kDepth, width - k), step * stride)
            .store(sums);
        for (int64_t q = 0; q < count; ++q)
          for (int64_t r = j - from; r < step; ++r) {
            T* const to = scores + (i + q) * ld + from + r;
            *to = k == 0 ? sums[q * kRows + r] : *to + sums[q * kRows + r];
          }
      }
    }
  }

  static constexpr int64_t kDepth = 512;  // kMost of such rows stay in the first cache
  const int64_t stride_;                  // rows of a power of two lie in one set of the first cache
  const Scratch<T> room_;
  const Rows<const T> queries_;  // and zeros, so that as many as are taken at once are there
};

// What is wanted of the scores of all pairs.
template <class T, class Metric>
class TopK {
 public:
  // logs may be null, or room for the log-sum-exps of the keys of each row.
  TopK(const Metric& metric, const Results<T>& results, T* logs, int threads)
      : metric_(metric), results_(results), logs_(logs), threads_(threads) {}

  template <class S>
  void of_all(const Rows<const S>& x, const Rows<const S>& y) const {
    if (x.rows <= kFewRows)
      of_few(x, y);
    else
      of_tiles(x, y);
    parallel_rows(x.rows, results_.k * 16, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        BestOf<T, Metric>(results_, i, results_.k).sort();
        T* const values = results_.values + i * results_.k;
        for (int64_t at = 0; at < results_.k; ++at) values[at] = metric_.value(values[at]);
      }
    });
  }

 private:
  static constexpr int64_t kFewRows = 12;

  // Takes a tile row, which it overwrites; `first` is the column with which `results` began.
  void take(int64_t i, int64_t j, int64_t first, int cols, T* s, const Results<T>& results, Softmax<T>* softmax) const {
    BestOf<T, Metric> best(results, i, smaller(results.k, j - first));
    if (results.k > 0 || softmax) offer_row(metric_, i, j, cols, s, best);
    if (softmax) softmax->weigh(s, cols);
  }

  template <class S>
  void of_tiles(const Rows<const S>& x, const Rows<const S>& y) const {
    const Scratch<Softmax<T>> softmax(logs_ ? x.rows : 0);
    for (int64_t i = 0; logs_ && i < x.rows; ++i) softmax.data[i] = {};
    score_tiles<T>(x, y, threads_, [&](int64_t i0, int64_t j0, int rows, int cols, T* tile, int64_t ld) {
      for (int r = 0; r < rows; ++r)
        take(i0 + r, j0, 0, cols, tile + r * ld, results_, logs_ ? softmax.data + i0 + r : nullptr);
    });
    if (logs_) logs_of_sums(softmax.data, x.rows, logs_);
  }

  // Rows of y in blocks, whose sums of exponentials are merged in their order: the bits are the same for any threads.
  template <class S>
  void of_few(const Rows<const S>& x, const Rows<const S>& y) const {
    constexpr int64_t kMost = 512, kBytes = int64_t(1) << 18;
    const int64_t fit = kBytes / (int64_t(sizeof(S)) * (x.cols + 1));
    const int64_t block = fit < 16 ? 16 : smaller(fit, kMost);  // rows of y that stay in the second cache
    const int64_t blocks = blocks_of(y.rows, block), work = x.rows * y.rows * x.cols / Vec<T>::size;
    const int64_t ranges = is_parallel(work, threads_) ? smaller(threads_, blocks) : 1;
    const FewRows<T> queries(x);
    const Scratch<Softmax<T>> softmax(logs_ ? blocks * x.rows : 0);
    // The first range has the results for its own.
    const int64_t others = (ranges - 1) * x.rows * results_.k;
    const Scratch<T> values(others);
    const Scratch<int64_t> indices(others);
    const auto results_of = [&](int64_t range) {
      const int64_t at = (range - 1) * x.rows * results_.k;
      return range == 0 ? results_ : Results<T>{results_.k, values.data + at, indices.data + at};
    };
    const auto first_of = [&](int64_t range) { return smaller(blocks * range / ranges * block, y.rows); };
    parallel_blocks(ranges, threads_, [&](int64_t range) {
      const Results<T> results = results_of(range);
      T* const scores = cache_block.reserve<T>(x.rows * block);
      const int64_t first = first_of(range), last = first_of(range + 1);
      for (int64_t j0 = first; j0 < last; j0 += block) {
        const int64_t n = smaller(block, last - j0);
        queries.multiply(y.part(j0, n), scores, block);
        for (int64_t i = 0; i < x.rows; ++i) {
          Softmax<T>* const part = logs_ ? softmax.data + j0 / block * x.rows + i : nullptr;
          if (part) *part = {};
          take(i, j0, first, int(n), scores + i * block, results, part);
        }
      }
    });
    for (int64_t range = 1; range < ranges; ++range)
      for (int64_t i = 0; i < x.rows; ++i) {
        const int64_t before = first_of(range), here = first_of(range + 1) - before;
        merge(i, smaller(results_.k, before), results_of(range), smaller(results_.k, here));
      }
    for (int64_t i = 0; logs_ && i < x.rows; ++i) {
      Softmax<T> all;
      for (int64_t b = 0; b < blocks; ++b) all.merge(softmax.data[b * x.rows + i]);
      logs_of_sums(&all, 1, logs_ + i);
    }
  }

  // Takes n more of another range, where there are `size`.
  void merge(int64_t i, int64_t size, const Results<T>& others, int64_t n) const {
    BestOf<T, Metric> best(results_, i, size);
    for (int64_t at = i * others.k; at < i * others.k + n; ++at) best.offer(others.values[at], others.indices[at]);
  }

  const Metric& metric_;
  const Results<T> results_;
  T* const logs_;
  const int threads_;
};

}  // namespace topk
}  // namespace MMKERN_ISA
}  // namespace mmkern
