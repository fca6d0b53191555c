// What one call of cross_attention is about: where everything lies, and which keys a query sees.
//
// The queries that share a head of k and v are one matrix: row r is query r % L of the group's head r / L.
#pragma once

#include <type_traits>

#include "../call.h"
#include "softmax.h"
#include "stored.h"

#include "../philox.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace attention {

// As numbered in mmkern/reference/attention.py.
enum class Alignment { top_left, bottom_right, resample };

// Keys first, first + 1, ..., last - 1.
struct KeyRange {
  int64_t first, last;

  bool is_empty() const { return first >= last; }
  void widen(KeyRange other) {
    first = smaller(first, other.first);
    last = last > other.last ? last : other.last;
  }
  KeyRange within(KeyRange other) const {
    return {first > other.first ? first : other.first, smaller(last, other.last)};
  }
};

// [B, H, L, S] in which any axis may have the size 1; its stride then is 0.
struct Broadcast {
  View view;
  int64_t strides[4] = {};

  explicit Broadcast(const View& of) : view(of) {
    if (!view) return;
    for (int axis = 0; axis < 4; ++axis) strides[axis] = view.sizes[axis] == 1 ? 0 : view.strides[axis];
  }
  explicit operator bool() const { return bool(view); }
  int64_t row(int64_t b, int64_t h, int64_t i) const { return b * strides[0] + h * strides[1] + i * strides[2]; }
};

struct Row {
  int64_t batch, head, query, group;
};

// Two tensors of rows whose products are wanted: as they are or, of bf16 where the machine multiplies pairs of these,
// as pairs of columns, a float of bits each.
struct Factors {
  View rows, columns;
  bool are_pairs;

  Factors(const View& x, const View& y, bool may_pair = true)
      : rows(x), columns(y), are_pairs(may_pair && has_dot_pairs() && pairs_up(x) && pairs_up(y)) {
    if (!are_pairs) return;
    View* const both[] = {&rows, &columns};
    for (View* view : both) {
      view->dtype = Dtype::float32;
      view->sizes[3] /= 2;
      for (int axis = 0; axis < 3; ++axis) view->strides[axis] /= 2;
    }
  }

 private:
  static bool pairs_up(const View& x) {
    const bool even = (x.strides[0] | x.strides[1] | x.strides[2] | x.sizes[3]) % 2 == 0;
    return x.dtype == Dtype::bfloat16 && even && reinterpret_cast<uintptr_t>(x.data) % sizeof(float) == 0;
  }
};

// Tensors: q, k, v, key_mask, attn_mask, attn_bias, bias, prefix_lengths, seed, from `at` on in the call. Scalars:
// scale, softcap, left, right, alignment, dropout_p.
template <class T>
struct Problem {
  static constexpr int kBiases = 2;
  static constexpr int kInputs = 9;

  View q, k, v;
  Factors scored;  // q and k
  int64_t batches, heads, groups, queries, keys, width, value_width;
  const View key_mask;
  const Broadcast mask;
  const Broadcast biases[kBiases];
  const int64_t* const prefixes;
  const int64_t* const seed;
  int64_t first_counter;  // of Philox, for the first weight
  T scale, softcap;
  int64_t left, right;
  Alignment alignment;
  uint64_t dropped_below;
  T kept_scale;

  Problem(const Call& call, int at)
      : q(call[at]),
        k(call[at + 1]),
        v(call[at + 2]),
        scored(q, k),
        batches(q.sizes[0]),
        heads(q.sizes[1]),
        groups(k.sizes[1]),
        queries(q.sizes[2]),
        keys(k.sizes[2]),
        width(q.sizes[3]),
        value_width(v.sizes[3]),
        key_mask(call[at + 3]),
        mask(call[at + 4]),
        biases{Broadcast(call[at + 5]), Broadcast(call[at + 6])},
        prefixes(static_cast<const int64_t*>(call[at + 7].data)),
        seed(static_cast<const int64_t*>(call[at + 8].data)),
        first_counter(seed ? seed[1] : 0),
        scale(T(call.scalars[0])),
        softcap(T(call.scalars[1])),
        left(bound(call.scalars[2], queries + keys)),
        right(bound(call.scalars[3], queries + keys)),
        alignment(Alignment(int(call.scalars[4]))),
        dropped_below(least_word(call.scalars[5])),
        kept_scale(T(1 / (1 - call.scalars[5]))) {}

  int64_t heads_per_group() const { return heads / groups; }
  int64_t rows_per_group() const { return heads_per_group() * queries; }
  int64_t units() const { return batches * groups; }  // a group of one of the batch
  Row row(int64_t unit, int64_t r) const {
    const int64_t group = unit % groups;
    return {unit / groups, group * heads_per_group() + r / queries, r % queries, group};
  }
  // The next one of the unit; counted, since a division takes as long as twenty products.
  Row after(Row row) const {
    if (++row.query < queries) return row;
    row.query = 0;
    ++row.head;
    return row;
  }
  // Its place among all rows of [B, H, L].
  int64_t index(const Row& row) const { return (row.batch * heads + row.head) * queries + row.query; }

  static int64_t place(const View& view, int64_t batch, int64_t head, int64_t i) {
    return batch * view.strides[0] + head * view.strides[1] + i * view.strides[2];
  }
  static Stored<T> at(const View& view, int64_t batch, int64_t head, int64_t i) {
    return Stored<T>(view) + place(view, batch, head, i);
  }
  Stored<T> query(const Row& row) const { return at(q, row.batch, row.head, row.query); }

  // What a row sees for its place alone.
  KeyRange band(const Row& row) const {
    KeyRange range{0, keys};
    if (left < 0 && right < 0) return range;
    const int64_t scale = alignment == Alignment::resample ? queries : 1;
    const int64_t centre = alignment == Alignment::resample       ? row.query * keys
                           : alignment == Alignment::bottom_right ? row.query + keys - queries
                                                                  : row.query;
    if (right >= 0) range.last = smaller(keys, floor_div(centre + right * scale, scale) + 1);
    if (right >= 0 && prefixes && prefixes[row.batch] > range.last) range.last = smaller(keys, prefixes[row.batch]);
    if (left >= 0) {
      const int64_t first = -floor_div(left * scale - centre, scale);
      range.first = first > 0 ? first : 0;
    }
    return range;
  }

  // The keys between the first and the last one that the key mask lets through.
  KeyRange unmasked(int64_t batch) const {
    KeyRange range{0, keys};
    if (!key_mask) return range;
    while (!range.is_empty() && !key_bits(batch)[range.last - 1]) --range.last;
    while (!range.is_empty() && !key_bits(batch)[range.first]) ++range.first;
    return range;
  }
  const uint8_t* key_bits(int64_t batch) const {
    return static_cast<const uint8_t*>(key_mask.data) + batch * key_mask.strides[0];
  }
  bool has_holes(int64_t batch, KeyRange range) const {
    if (!key_mask) return false;
    for (int64_t j = range.first; j < range.last; ++j)
      if (!key_bits(batch)[j]) return true;
    return false;
  }

  bool drops() const { return seed && dropped_below; }

 private:
  static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

  // The least word of Philox whose uniform number is at least `probability`, 2^32 where there is none: see
  // mmkern/reference/philox.py.
  static uint64_t least_word(double probability) {
    const double steps = probability * 0x1p24;
    const uint64_t whole = uint64_t(steps);
    return (whole + (double(whole) < steps)) << 8;
  }
  // A bound of a window: one beyond all keys is as good as none, and does not overflow.
  static int64_t bound(double keys_away, int64_t farthest) {
    return keys_away < double(farthest) ? int64_t(keys_away) : farthest;
  }
};

// Products s[0, n) with keys j0, j0 + 1, ... become scores: scaled, soft-capped, biased, −∞ where the row does not see
// the key.
// `band` is what it sees for its place; `holes`: the key mask has some inside.
template <class T>
void transform_scores(const Problem<T>& p, const Row& row, KeyRange band, bool holes, int64_t j0, int64_t n, T* s) {
  const Vec<T> scale(p.scale);
  if (p.softcap > 0) {
    const Vec<T> cap(p.softcap), inverse(1 / p.softcap);
    for_each_vec<T>(n, [&](auto at) { at.store(s, cap * tanh(at.load(s) * scale * inverse)); });
  } else {
    for_each_vec<T>(n, [&](auto at) { at.store(s, at.load(s) * scale); });
  }
  for (const Broadcast& bias : p.biases) {
    if (!bias) continue;
    const Stored<T> from = Stored<T>(bias.view) + (bias.row(row.batch, row.head, row.query) + j0 * bias.strides[3]);
    from.with([&](const auto* b) {
      if (bias.strides[3]) return for_each_vec<T>(n, [&](auto at) { at.store(s, at.load(s) + at.load(b)); });
      const Vec<T> same(T(element(b, 0)));
      for_each_vec<T>(n, [&](auto at) { at.store(s, at.load(s) + same); });
    });
  }
  const T hidden = minus_infinity<T>();
  if (holes) {
    const uint8_t* bits = p.key_bits(row.batch) + j0;
    for (int64_t j = 0; j < n; ++j) s[j] = bits[j] ? s[j] : hidden;
  }
  if (p.mask) {
    const uint8_t* bits = static_cast<const uint8_t*>(p.mask.view.data) + p.mask.row(row.batch, row.head, row.query);
    if (p.mask.strides[3])
      for (int64_t j = 0; j < n; ++j) s[j] = bits[j0 + j] ? s[j] : hidden;
    else if (!*bits)
      for (int64_t j = 0; j < n; ++j) s[j] = hidden;
  }
  for (int64_t j = 0; j < n && j0 + j < band.first; ++j) s[j] = hidden;
  for (int64_t j = band.last > j0 ? band.last - j0 : 0; j < n; ++j) s[j] = hidden;
}

// f(j, factor) for keys j0 + j, j in [0, n): 0 where dropout drops the weight, else 1 / (1 - dropout_p).
template <class T, class F>
void for_each_kept(const Problem<T>& p, const Row& row, int64_t j0, int64_t n, F f) {
  const int64_t fours = (p.keys + 3) / 4, first = p.first_counter + p.index(row) * fours;
  for (int64_t four = j0 / 4; four * 4 < j0 + n; ++four) {
    const PhiloxWords drawn = philox(uint64_t(p.seed[0]), uint64_t(first + four));
    for (int lane = 0; lane < 4; ++lane) {
      const int64_t j = four * 4 + lane - j0;
      if (j >= 0 && j < n) f(j, drawn.word[lane] >= p.dropped_below ? p.kept_scale : T(0));
    }
  }
}

// ---- A block of rows and the keys that it meets ----

// Enough rows that the keys, which every block reads again, come from the second cache at little cost.
template <class T>
constexpr int64_t kBlockRows = 9 * TileShape<T>::rows;

// How many of `rows` to a block: blocks are of about one size, and of fewer rows where each sees a short band of keys,
// since a block meets those that any of its rows sees.
template <class T>
int64_t rows_per_block(const Problem<T>& p, int64_t rows) {
  constexpr int64_t kRows = TileShape<T>::rows;
  if (p.left < 0 && p.right < 0) return rows ? up_to(kRows, blocks_of(rows, blocks_of(rows, kBlockRows<T>))) : kRows;
  if (p.left < 0 || p.right < 0) return up_to(kRows, kBlockRows<T> / 2);
  const int64_t band = p.left + p.right + 1;
  const int64_t seeing = p.alignment == Alignment::resample && p.keys ? band * p.queries / p.keys : band;
  return smaller(up_to(kRows, seeing / 4 + 1), kBlockRows<T>);
}

// At most kBlockRows<T> rows of a unit.
template <class T>
struct RowBlock {
  Row rows[kBlockRows<T>];
  KeyRange bands[kBlockRows<T>];
  KeyRange keys;  // that any of them sees
  const int64_t first, count;

  RowBlock(const Problem<T>& p, int64_t unit, int64_t first, int64_t n) : keys{p.keys, 0}, first(first), count(n) {
    for (int64_t r = 0; r < n; ++r) {
      rows[r] = r == 0 ? p.row(unit, first) : p.after(rows[r - 1]);
      bands[r] = p.band(rows[r]);
      if (!bands[r].is_empty()) keys.widen(bands[r]);
    }
  }

  // f(r, n, place) for runs of rows: r, ..., r + n - 1 lie one behind the other in `view`, a tensor of queries.
  template <class F>
  void for_each_run(const View& view, F f) const {
    const bool dense = view.strides[2] == view.sizes[3];
    for (int64_t r = 0, n; r < count; r += n) {
      const Row& row = rows[r];
      n = dense ? smaller(count - r, view.sizes[2] - row.query) : 1;
      f(r, n, Problem<T>::place(view, row.batch, row.head, row.query));
    }
  }
};

// Keys in one block of at most kMost or in several of at most block_cols, of about one size, which begin at whole
// slivers.
template <class T>
struct KeyBlocks {
  static constexpr int64_t kMost = TileShape<T>::block_stride;
  int64_t first, last, size;

  explicit KeyBlocks(KeyRange range)
      : first(range.first / TileShape<T>::cols * TileShape<T>::cols), last(range.last), size(0) {
    if (range.is_empty()) return;
    const int64_t n = last - first, blocks = blocks_of(n, most_of(n));
    size = up_to(TileShape<T>::cols, blocks_of(n, blocks));
  }
  // The size of a block of n keys.
  static int64_t most_of(int64_t n) { return n <= kMost ? kMost : TileShape<T>::block_cols; }
  int64_t count() const { return size ? blocks_of(last - first, size) : 0; }
  KeyRange operator[](int64_t i) const { return {first + i * size, smaller(first + (i + 1) * size, last)}; }
  // Block i and, with the first and the last one, those of all keys that lie in none.
  KeyRange with_unseen(int64_t i, int64_t keys) const {
    return {i == 0 ? 0 : first + i * size, i + 1 >= count() ? keys : first + (i + 1) * size};
  }
};

// The rows of k or v that a unit meets, packed as columns of the score tiles: those in `range`.
//
// One or two behind whole vectors, as of a class token beside its patches, stay rows: their products, added up along
// the width, take a fraction of what a vector of columns takes.
template <class T>
class HeadColumns {
 public:
  static constexpr int kFew = 2;
  const int64_t width;
  const bool are_pairs;

  HeadColumns(const Problem<T>& p, const Factors& of, int64_t unit, KeyRange range, int threads, ThreadBuffer& buffer)
      : width(of.columns.sizes[3]), are_pairs(of.are_pairs), end_(range.last), stride_(up_to(W, width)) {
    const View& view = of.columns;
    if (end_ % W <= kFew) end_ -= end_ % W;
    T* const packed = buffer.reserve<T>(up_to(kCols, p.keys) * width + kFew * stride_ + 1);
    T* const last = packed + up_to(kCols, p.keys) * width;
    data_ = packed;
    last_ = last;
    p.at(view, unit / p.groups, unit % p.groups, 0).with([&](auto* data) {
      using S = std::remove_pointer_t<decltype(data)>;
      const Rows<const S> rows{data, view.sizes[2], width, view.strides[2]};
      const int64_t begin = range.first / kCols, end = blocks_of(end_, kCols);
      parallel_rows(end - begin, kCols * width, threads, [&](int64_t from, int64_t to) {
        for (int64_t half = 2 * (begin + from); half < 2 * (begin + to); ++half)
          pack_columns(rows, half * W, packed + half / 2 * kCols * width + half % 2 * W);
      });
      for (int64_t j = end_; j < range.last; ++j)
        for_each_vec<T>(width, [&](auto at) { at.store(last + (j - end_) * stride_, at.load(rows[j])); });
    });
  }

  // Columns from key j on, a multiple of a sliver's.
  const T* from(int64_t j) const { return data_ + j * width; }
  // Keys up to `last` that are not among the columns, and key i of these.
  int few_of(int64_t last) const { return last > end_ ? int(last - end_) : 0; }
  const T* row(int i) const { return last_ + i * stride_; }

 private:
  static constexpr int64_t kCols = TileShape<T>::cols, W = Vec<T>::size;
  int64_t end_;  // of the columns
  const int64_t stride_;
  const T *data_, *last_;
};

// The same rows as they stand, in slivers [width][key][cols]: read one after another by a tile, and once by the
// packing. In place, a tile's column of v would meet itself in a quarter of the first cache, or less.
template <class T>
class HeadRows {
 public:
  HeadRows(const View& view, int64_t batch, int64_t head, KeyRange range, int threads, ThreadBuffer& buffer)
      : keys_(view.sizes[2]) {
    constexpr int W = Vec<T>::size;
    const int64_t D = view.sizes[3], first = range.first / kCols * kCols;  // where the key blocks begin
    T* const packed = buffer.reserve<T>(keys_ * blocks_of(D, kCols) * kCols);
    data_ = packed;
    Problem<T>::at(view, batch, head, 0).with([&](const auto* data) {
      parallel_rows(range.last - first, D, threads, [&](int64_t begin, int64_t end) {
        for (int64_t j = first + begin; j < first + end; ++j) {
          const auto* const row = data + j * view.strides[2];
          T* const to = packed + j * kCols;
          int64_t d = 0;
          for (; d + W <= D; d += W) Vec<T>::load(row + d).store(to + d / kCols * kCols * keys_ + d % kCols);
          if (d < D) Vec<T>::load(row + d, int(D - d)).store(to + d / kCols * kCols * keys_ + d % kCols);
        }
      });
    });
  }

  // into(i, d, Σ x[i][j] row_j[d]) over `keys`; x as a tile of scores.
  template <class Sink>
  MMKERN_FN void multiply(const T* x, KeyRange keys, int64_t rows, int64_t width, const Sink& into) const {
    register_tiles<T, TileShape<T>::block_stride, 1>(
        x, [&](int64_t d) { return data_ + d * keys_ + keys.first * kCols; }, kCols, rows, width,
        keys.last - keys.first, into);
  }

 private:
  static constexpr int64_t kCols = TileShape<T>::cols;
  const int64_t keys_;
  const T* data_;
};

// Rows of a tensor that are asked for before they are read.
struct RowsAhead {
  const char* data = nullptr;
  int64_t stride = 0, bytes = 0;

  RowsAhead() = default;
  // Those from element `place` of `view` on.
  RowsAhead(const View& view, int64_t place)
      : data(static_cast<const char*>(view.data) + place * bytes_of(view.dtype)),
        stride(view.strides[2] * bytes_of(view.dtype)),
        bytes(view.sizes[3] * bytes_of(view.dtype)) {}

  void ask(int64_t first, int64_t last) const {
    for (int64_t j = first; j < last; ++j)
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(data + j * stride + byte);
  }
};

// The rows of k and v that the unit after this one meets. They are asked for a few at a time while this one's are at
// work: packing only reads them, and would wait. Not where
// keys are more than a tile: each of their tiles would ask again.
template <class T>
class NextHead {
 public:
  NextHead(const Problem<T>& p, int64_t unit) : rows_(p.rows_per_group()) {
    const int64_t next = unit + 1;
    if (next >= p.units() || p.keys > KeyBlocks<T>::kMost) return;
    keys_ = p.keys;
    const auto ahead = [&](const View& view) {
      return RowsAhead(view, p.place(view, next / p.groups, next % p.groups, 0));
    };
    k_ = ahead(p.k);
    v_ = ahead(p.v);
  }

  // The share of rows [first, first + n) of this unit.
  void ask(int64_t first, int64_t n) const {
    const int64_t begin = first * keys_ / rows_, end = (first + n) * keys_ / rows_;
    k_.ask(begin, end);
    v_.ask(begin, end);
  }

 private:
  const int64_t rows_;
  int64_t keys_ = 0;
  RowsAhead k_, v_;
};

// Whether whole units, or the blocks of one unit after another, are shared among the threads.
struct Sharing {
  int units, blocks;

  Sharing(int64_t unit_count, int64_t work, int threads) {
    if (!is_parallel(work, threads)) threads = 1;
    const bool by_units = unit_count >= 4 * threads || unit_count % threads == 0;
    units = by_units ? threads : 1;
    blocks = by_units ? 1 : threads;
  }
};

// Scalar: for (i < n) to[i] *= factor
template <class T>
MMKERN_FN void multiply(T* to, int64_t n, T factor) {
  for_each_vec<T>(n, [&](auto at) { at.store(to, at.load(to) * Vec<T>(factor)); });
}

inline thread_local ThreadBuffer key_rows, sums_block;

}  // namespace attention
}  // namespace MMKERN_ISA
}  // namespace mmkern
