// The nearest code of each row of x: nearest_code of mmkern/reference/quantization.py.
//
// A product in T gives a code its key, larger where the code is nearer: x.c - |c|^2 / 2, or x.c with codes brought to
// the length 1. Rounding moves a key by no more than a share of the lengths. Where the largest key is further than that
// above all others, which is nearly always, its code is the nearest one; else whatever may be nearest is told by
// distances in double. So the result does not depend on how keys are found.
//
// Keys never leave the registers in which they are made. Two vectors of codes, a pair, come at a time, and each lane
// keeps the larger of its two keys, if that is its largest so far, and where it was; the codes of the best pair are
// then told apart in double.
#pragma once

#include "row_ops.h"
#include "score_tiles.h"
#include "topk.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace nearest {

struct Product {
  template <class V>
  MMKERN_FN V operator()(V x, V y, V total) const {
    return fma(x, y, total);
  }
};
struct SquaredDifference {
  template <class V>
  MMKERN_FN V operator()(V x, V y, V total) const {
    return fma(x - y, x - y, total);
  }
};

// Scalar: for (k < n) total = term(a[k], b[k], total);  in double
template <class T, class Term, class A, class B>
double sum_in_double(const A* a, const B* b, int64_t n) {
  decltype(in_double(Vec<T>())) total = 0.0;
  for_each_vec<T>(n, [&](auto at) { total = Term{}(in_double(at.load(a)), in_double(at.load(b)), total); });
  return sum(total);
}

// The first code of the least rank; NaN is behind all.
struct Nearest {
  double rank = 0;
  int64_t code = -1;

  void offer(double other, int64_t at) {
    if (code >= 0 && !(other < rank) && (rank == rank || other != other)) return;
    rank = other;
    code = at;
  }
};

// What keys need of the codes: |c|^2, what is taken from products, and how far rounding moves a key.
template <class T>
class Squares {
 public:
  template <class S>
  Squares(const Rows<const S>& codes, double least, int threads)
      : of_codes(codes.rows), offsets(codes.rows + TileShape<T>::cols), cols_(codes.cols) {
    parallel_rows(codes.rows, 4 * codes.cols, threads, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const double found = sum_in_double<T, Product>(codes[j], codes[j], codes.cols);
        of_codes.data[j] = found < least ? least : found;
      }
    });
    double largest = 0;
    for (int64_t j = 0; j < codes.rows; ++j) {
      const double found = of_codes.data[j];
      if (found > largest || found != found) largest = found;
      offsets.data[j] = T(0);
    }
    longest_ = __builtin_sqrt(largest);
    for (int64_t j = codes.rows; j < codes.rows + TileShape<T>::cols; ++j) offsets.data[j] = -minus_infinity<T>();
  }

  // By how much one key may be above another without being above it for good: twice what n roundings of both lose, of
  // numbers that add up to `size`, and what products lose that are below all numbers. NaN where keys may overflow, or
  // numbers are none: they say nothing.
  T slack(double of_x, double size) const {
    if (!(of_x < kMost && longest_ < kMost)) return T(__builtin_nan(""));
    return T(double(cols_ + 8) * (2 * kEpsilon * size + kLeast));
  }
  double longest() const { return longest_; }

  const Scratch<double> of_codes;
  const Scratch<T> offsets;  // infinite behind the last code

 private:
  static constexpr bool kIsDouble = sizeof(T) == sizeof(double);
  static constexpr double kEpsilon = kIsDouble ? 0x1p-52 : 0x1p-23, kMost = kIsDouble ? 0x1p+511 : 0x1p+63;
  static constexpr double kLeast = kIsDouble ? 0x1p-1019 : 0x1p-123;
  const int64_t cols_;
  double longest_;
};

// A metric has the codes, and `factors` whose products with x, less the squares' offsets, are their keys. A sum of its
// terms makes a rank, which is less for a nearer code, and distance(rank, |x|) the result.

template <class S>
struct L2 {
  using T = accumulate_t<S>;
  using Term = SquaredDifference;
  const Rows<const S> codes;
  const Squares<T> squares;

  L2(const Rows<const S>& rows, int threads) : codes(rows), squares(rows, 0, threads) {
    for (int64_t j = 0; j < codes.rows; ++j) squares.offsets.data[j] = T(0.5 * squares.of_codes.data[j]);
  }
  const Rows<const S>& factors() const { return codes; }
  T slack(double of_x) const {
    const double longest = squares.longest();
    return squares.slack(of_x, (of_x + 0.5 * longest) * longest);
  }
  double rank(double sum, int64_t) const { return sum; }
  double distance(double rank, double) const { return __builtin_sqrt(rank); }
};

// Cosines are ranked by their squares: those of codes that are multiples of each other are then equal.
template <class S>
struct Cosine {
  using T = accumulate_t<S>;
  using Term = Product;
  static constexpr double kShortest = 1e-12;
  const Rows<const S> codes;
  const Squares<T> squares;
  const Scratch<T> room;

  Cosine(const Rows<const S>& rows, int threads)
      : codes(rows), squares(rows, kShortest * kShortest, threads), room(rows.rows * rows.cols) {
    parallel_rows(codes.rows, codes.cols, threads, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const Vec<T> inverse(T(1 / __builtin_sqrt(squares.of_codes.data[j])));
        for_each_vec<T>(codes.cols, [&](auto at) { at.keep(room.data + j * codes.cols, at.load(codes[j]) * inverse); });
      }
    });
  }
  Rows<const T> factors() const { return {room.data, codes.rows, codes.cols, codes.cols}; }
  T slack(double of_x) const { return squares.slack(of_x, of_x); }
  double rank(double sum, int64_t j) const { return -sum * __builtin_fabs(sum) / squares.of_codes.data[j]; }
  double distance(double rank, double of_x) const {
    const double projection = __builtin_sqrt(__builtin_fabs(rank)) / (of_x < kShortest ? kShortest : of_x);
    const double found = rank < 0 ? 1 - projection : 1 + projection;
    return found < 0 ? 0 : found;
  }
};

// ---- Keys in registers
// -----------------------------------------------------------------------------------------------

// The best key, and the one behind it, of the pairs that a row has met; where the best one was.
template <class T>
struct Leader {
  T best = minus_infinity<T>(), second = minus_infinity<T>();
  int64_t code = 0;  // or that of the pair's other vector

  void meet(T other_best, T other_second, int64_t other_code) {
    const T behind = other_best > best ? best : other_best;
    second = second > behind ? second : behind;
    second = second > other_second ? second : other_second;
    if (!(other_best > best)) return;
    best = other_best;
    code = other_code;
  }
};

// The same of each lane; `place` is the column where a pair begins.
template <class T>
struct LaneLeaders {
  Vec<T> best, second, place;

  void clear() {
    best = second = Vec<T>(minus_infinity<T>());
    place = Vec<T>(T(0));
  }
  // Of all lanes; equal ones are not told apart.
  void add_to(Leader<T>& leader, int64_t first) const {
    const T top = max_of(best);
    const auto leads = best == Vec<T>(top);
    const bool is_alone = sum(select(leads, Vec<T>(T(1)), Vec<T>(T(0)))) == T(1);
    const T code = max_of(select(leads, place + lane_indices<T>(), Vec<T>(T(0))));
    leader.meet(top, is_alone ? max_of(select(leads, second, best)) : top, first + int64_t(code));
  }
};

// Takes the sums of columns from `first` on, and those of the depths before them where there are some.
template <class T>
struct LeadersOfRows {
  LaneLeaders<T>* rows;
  const T* offsets;
  int64_t first;
  const T* before;
  int64_t ld;

  template <int kVecs>
  MMKERN_FN void operator()(int64_t i, int64_t j, const Vec<T> (&sums)[kVecs]) const {
    constexpr int W = Vec<T>::size;
    Vec<T> key(minus_infinity<T>());
    for (int v = 0; v < kVecs; ++v) {
      const Vec<T> whole = before ? sums[v] + Vec<T>::load(before + i * ld + j + v * W) : sums[v];
      const Vec<T> each = whole - Vec<T>::load(offsets + first + j + v * W);
      key = v == 0 ? each : max(each, key);
    }
    LaneLeaders<T>& row = rows[i];
    row.second = max(row.second, min(row.best, key));
    row.place = select(key > row.best, Vec<T>(T(first + j)), row.place);
    row.best = max(row.best, key);
  }
};

}  // namespace nearest

template <class T>
inline constexpr bool takes_rows<nearest::LeadersOfRows<T>> = true;

namespace nearest {

// Those of a block of rows among a panel of codes.
template <class T>
void find_leaders(const PackedBlock<T>& block, int64_t D, const T* offsets, LaneLeaders<T>* leaders) {
  using Shape = TileShape<T>;
  const int64_t depth = depth_of<T>(D);
  T* const sums = D > depth ? cache_block.reserve<T>(Shape::block_rows * Shape::block_stride) : nullptr;
  constexpr int64_t ld = Shape::block_stride;
  for (int64_t i = 0; i < block.padded_rows; ++i) leaders[i].clear();
  for (int64_t j = 0; j < block.cols; j += Shape::block_cols) {
    const int64_t width = smaller(Shape::block_cols, block.cols - j);
    const T* xs = block.xs;
    for (int64_t k = 0; k < D; k += depth, xs += block.padded_rows * Shape::depth) {
      const auto ys = [&](int64_t c) { return block.ys + (j + c) * D + k * Shape::cols; };
      const auto multiply = [&](const auto& into) {
        register_tiles<T, Shape::depth, 1>(xs, ys, Shape::cols, block.padded_rows, width, smaller(depth, D - k), into);
      };
      if (k + depth < D)
        multiply(Into<T>{sums, ld, k != 0});
      else
        multiply(LeadersOfRows<T>{leaders, offsets, j, k ? sums : nullptr, ld});
    }
  }
}

// ---- Distances in double
// ---------------------------------------------------------------------------------------------

template <class Metric, class X>
double rank_of(const Metric& metric, const X* x, int64_t j) {
  using T = accumulate_t<X>;
  return metric.rank(sum_in_double<T, typename Metric::Term>(x, metric.codes[j], metric.codes.cols), j);
}

// |x|^2, and the sums of two codes.
struct SumsOfPair {
  double of_x, first, second;
};
template <class Metric, class X>
SumsOfPair sums_of_pair(const Metric& metric, const X* x, int64_t first, int64_t second) {
  using T = accumulate_t<X>;
  const auto *a = metric.codes[first], *b = metric.codes[second];
  decltype(in_double(Vec<T>())) of_x = 0.0, of_a = 0.0, of_b = 0.0;
  for_each_vec<T>(metric.codes.cols, [&](auto at) {
    const auto wide = in_double(at.load(x));
    of_x = fma(wide, wide, of_x);
    of_a = typename Metric::Term{}(wide, in_double(at.load(a)), of_a);
    of_b = typename Metric::Term{}(wide, in_double(at.load(b)), of_b);
  });
  return {sum(of_x), sum(of_a), sum(of_b)};
}

// A row that is held against the codes in double, as far as their keys do not rule it out.
template <class T>
struct Searched {
  T slack, top = minus_infinity<T>();
  Nearest nearest{};

  // Scores s[0, cols) with codes j, ... of row x.
  template <class Metric, class X>
  void take(const Metric& metric, const X* x, int64_t j, int cols, const T* s) {
    constexpr int W = Vec<T>::size;
    const auto key_at = [&](int c) { return Vec<T>::load(s + c) - Vec<T>::load(metric.squares.offsets.data + j + c); };
    Vec<T> largest(top);
    for (int c = 0; c < cols; c += W) largest = max(key_at(c), largest);
    top = max_of(largest);
    const Vec<T> bar(top - slack);
    for (int c = 0; c < cols; c += W) {
      const Vec<T> keys = key_at(c);
      if (all(keys < bar)) continue;
      for (int lane = 0; lane < W && c + lane < cols; ++lane)
        if (!(keys[lane] < bar[0])) nearest.offer(rank_of(metric, x, j + c + lane), j + c + lane);
    }
  }
};

// Whether the codes of the best pair are ahead of all others for good; `nearest` is then the nearer one. Tells |x|,
// too.
template <class Metric, class X, class T>
bool settles(const Metric& metric, const X* x, const Leader<T>& leader, Nearest& nearest, double& of_x) {
  const int64_t first = leader.code, other = first + Vec<T>::size, second = other < metric.codes.rows ? other : first;
  const SumsOfPair sums = sums_of_pair(metric, x, first, second);
  of_x = __builtin_sqrt(sums.of_x);
  nearest.offer(metric.rank(sums.first, first), first);
  nearest.offer(metric.rank(sums.second, second), second);
  return leader.best - leader.second > metric.slack(of_x);
}

// Of one row, among all codes.
template <class Metric, class X>
Nearest search(const Metric& metric, const X* x, double of_x) {
  using T = accumulate_t<X>;
  const auto factors = metric.factors();
  const Scratch<T> scores(up_to(Vec<T>::size, factors.rows));
  topk::FewRows<T>(Rows<const X>{x, 1, factors.cols, factors.cols}).multiply(factors, scores.data, factors.rows);
  Searched<T> row{metric.slack(of_x)};
  row.take(metric, x, 0, int(factors.rows), scores.data);
  return row.nearest;
}

template <class Metric, class S>
class Finder {
 public:
  using T = accumulate_t<S>;

  Finder(const Metric& metric, const Rows<const S>& x, T* distances, int64_t* codes, int threads)
      : metric_(metric), x_(x), distances_(distances), codes_(codes), threads_(threads) {}

  void run() const { x_.rows <= kFewRows ? run_few() : run_many(); }

 private:
  static constexpr int64_t kFewRows = 12;  // packing pays for itself from more on

  static constexpr int64_t kUnknown = -1;

  double length_of(int64_t i) const { return __builtin_sqrt(sum_in_double<T, Product>(x_[i], x_[i], x_.cols)); }
  void put(int64_t i, const Nearest& nearest, double of_x) const {
    codes_[i] = nearest.code;
    distances_[i] = T(metric_.distance(nearest.rank, of_x));
  }

  void run_many() const {
    const Scratch<Leader<T>> leaders(x_.rows);
    for (int64_t i = 0; i < x_.rows; ++i) leaders.data[i] = {};
    packed_blocks<T>(x_, metric_.factors(), threads_, [&](const PackedBlock<T>& block) {
      LaneLeaders<T> lanes[TileShape<T>::block_rows];
      find_leaders(block, x_.cols, metric_.squares.offsets.data + block.j0, lanes);
      for (int64_t r = 0; r < block.rows; ++r) lanes[r].add_to(leaders.data[block.i0 + r], block.j0);
    });
    parallel_rows(x_.rows, 8 * x_.cols, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Nearest nearest;
        double of_x;
        codes_[i] = kUnknown;
        if (settles(metric_, x_[i], leaders.data[i], nearest, of_x)) put(i, nearest, of_x);
      }
    });
    search_unknown();
  }

  void search_unknown() const {
    int64_t count = 0;
    for (int64_t i = 0; i < x_.rows; ++i) count += codes_[i] == kUnknown;
    if (count == 0) return;
    const Scratch<int64_t> places(count);
    const Scratch<Searched<T>> searched(count);
    const Scratch<T> room(count * x_.cols);
    const Rows<const T> rows{room.data, count, x_.cols, x_.cols};
    for (int64_t i = 0, at = 0; i < x_.rows; ++i) {
      if (codes_[i] != kUnknown) continue;
      for_each_vec<T>(x_.cols, [&](auto to) { to.keep(room.data + at * x_.cols, to.load(x_[i])); });
      searched.data[at] = {metric_.slack(length_of(i))};
      places.data[at++] = i;
    }
    score_tiles<T>(rows, metric_.factors(), threads_,
                   [&](int64_t i0, int64_t j0, int tile_rows, int cols, const T* tile, int64_t ld) {
                     for (int64_t r = 0; r < tile_rows; ++r)
                       searched.data[i0 + r].take(metric_, rows[i0 + r], j0, cols, tile + r * ld);
                   });
    for (int64_t at = 0; at < count; ++at) put(places.data[at], searched.data[at].nearest, length_of(places.data[at]));
  }

  // Codes in blocks, each searched for itself.
  void run_few() const {
    constexpr int64_t kBlock = 512;
    const auto factors = metric_.factors();
    const int64_t blocks = blocks_of(factors.rows, kBlock);
    const topk::FewRows<T> queries(x_);
    const Scratch<Searched<T>> searched(blocks * x_.rows);
    const bool shares = is_parallel(x_.rows * factors.rows * x_.cols / Vec<T>::size, threads_);
    parallel_blocks(blocks, shares ? threads_ : 1, [&](int64_t b) {
      const int64_t j0 = b * kBlock, cols = smaller(kBlock, factors.rows - j0);
      T* const scores = cache_block.reserve<T>(x_.rows * kBlock);
      queries.multiply(factors.part(j0, cols), scores, kBlock);
      for (int64_t i = 0; i < x_.rows; ++i) {
        Searched<T>& row = searched.data[b * x_.rows + i];
        row = {metric_.slack(length_of(i))};
        row.take(metric_, x_[i], j0, int(cols), scores + i * kBlock);
      }
    });
    for (int64_t i = 0; i < x_.rows; ++i) {
      Nearest nearest;
      for (int64_t b = 0; b < blocks; ++b) {
        const Nearest& other = searched.data[b * x_.rows + i].nearest;
        nearest.offer(other.rank, other.code);
      }
      put(i, nearest, length_of(i));
    }
  }

  const Metric& metric_;
  const Rows<const S> x_;
  T* const distances_;
  int64_t* const codes_;
  const int threads_;
};

}  // namespace nearest
}  // namespace MMKERN_ISA
}  // namespace mmkern
