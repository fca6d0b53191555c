// Attention forward: score tiles, a softmax that goes along, and the product with v, a block of rows at a time.
#pragma once

#include "attention_few_keys.h"
#include "attention_results.h"
#include "attention_sources.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace attention {

// A head of k packed as columns, and one of v as rows.
template <class T>
struct Head {
  const KeyRange keys;  // what the key mask leaves
  const bool holes;
  const T* const columns;
  const HeadRows<T> values;
  const FewKeys<T> few;

  Head(const Problem<T>& p, int64_t unit, int threads, ThreadBuffer& key_columns, ThreadBuffer& value_rows)
      : keys(p.unmasked(unit / p.groups)),
        holes(p.has_holes(unit / p.groups, keys)),
        columns(pack(p, unit, threads, key_columns)),
        values(p.v, unit / p.groups, unit % p.groups, keys, threads, value_rows),
        few(p, unit / p.groups, keys) {}

 private:
  const T* pack(const Problem<T>& p, int64_t unit, int threads, ThreadBuffer& buffer) {
    T* const packed = buffer.reserve<T>(blocks_of(p.keys, TileShape<T>::cols) * TileShape<T>::cols * p.width);
    pack_head_columns(p.k, unit / p.groups, unit % p.groups, keys, threads, packed);
    return packed;
  }
};

inline thread_local ThreadBuffer head_columns[kMaxSources], head_values[kMaxSources];

// A block of queries as products read them.
template <class T>
struct Queries {
  const T* packed = nullptr;  // times the scale; null where no product needs it
  const T* rows[kBlockRows<T>];
  T scale = 1;  // what the scores of `rows` are yet to be multiplied by
  int64_t width;

  Queries(const Problem<T>& p, const RowBlock<T>& block, bool by_rows) : width(p.width) {
    if (by_rows && p.query(block.rows[0]).as_they_are()) {
      for (int64_t r = 0; r < block.count; ++r) rows[r] = p.query(block.rows[r]).as_they_are();
      scale = p.scale;
      return;
    }
    T* const to = packed_rows.reserve<T>(packed_size<T>(block.padded, p.width));
    pack_block<T>(block, p.width, p.scale, to, [&](const Row& row) { return p.query(row); });
    for (int64_t r = 0; r < block.count; ++r) rows[r] = to + r * TileShape<T>::depth;
    packed = to;
  }
};

// A block of rows on its way along the keys: a softmax each, and Σ weight·v in rows of `cols` columns.
template <class T>
class Walk {
 public:
  explicit Walk(int64_t value_width)
      : cols_(blocks_of(value_width, Vec<T>::size) * Vec<T>::size),
        sums_(sums_block.reserve<T>(kBlockRows<T> * cols_ + 1)) {}

  // Anew, along other keys.
  void begin() {
    for (Softmax<T>& row : softmax_) row = {};
    began_ = false;
  }

  // Goes on along the keys of `head`; the weights of row r are multiplied by gates[r]. Then, if they are given, puts
  // or adds the results.
  void follow(const Problem<T>& p, const Head<T>& head, const RowBlock<T>& block, const Queries<T>& queries,
              const T* gates, const Results<T>* results, bool adds) {
    T* const tile = cache_block.reserve<T>(kRows * kLd);
    const KeyBlocks<T> key_blocks(block.keys.within(head.keys));
    for (int64_t b = 0; b < key_blocks.count(); ++b) {
      const KeyRange keys = key_blocks[b];
      const bool ends = results && b + 1 == key_blocks.count();
      const auto weighed = [&](int64_t r) {
        if (ends) results->prefetch(r);
      };
      head.few ? weigh_few(head, block.count, queries, gates, tile, weighed)
               : weigh(p, head, block, queries, keys, gates, tile, weighed);
      if (ends) {
        results_of(block.count, *results, adds,
                   [&](auto put) { head.values.multiply(tile, keys, block.padded, cols_, put); });
        results = nullptr;
      } else {
        head.values.multiply(tile, keys, block.padded, cols_, Into<T>{sums_, cols_, began_});
      }
      began_ = true;
    }
    if (!results) return;
    results_of(block.count, *results, adds, [&](auto put) {
      for (int64_t r = 0; r < block.count; ++r)
        for (int64_t d = 0; d < cols_; d += Vec<T>::size) put(r, d, Vec<T>(T(0)));
    });
  }

  const Softmax<T>* softmax() const { return softmax_; }

 private:
  // Rows in registers reach beyond the last one of a block.
  static constexpr int64_t kLd = TileShape<T>::block_stride, kRows = kBlockRows<T> + FewKeys<T>::kRows;

  // Weights of the rows with some keys, in the place of their scores; f(r) after row r.
  template <class F>
  void weigh(const Problem<T>& p, const Head<T>& head, const RowBlock<T>& block, const Queries<T>& queries,
             KeyRange keys, const T* gates, T* tile, F f) {
    const int64_t n = keys.last - keys.first;
    fill_block(queries.packed, block.padded, head.columns + keys.first * p.width, n, p.width, tile);
    for (int64_t r = 0; r < block.count; ++r) {
      T* const s = tile + r * kLd;
      const KeyRange band = block.bands[r].within(head.keys);
      transform_scores(p, block.rows[r], band, head.holes, keys.first, n, s);
      lower(r, softmax_[r].weigh(s, n, gates[r]));
      if (p.drops()) for_each_kept(p, block.rows[r], keys.first, n, [&](int64_t j, T kept) { s[j] *= kept; });
      f(r);
    }
  }

  template <class F>
  void weigh_few(const Head<T>& head, int64_t rows, const Queries<T>& queries, const T* gates, T* tile, F f) {
    constexpr int W = Vec<T>::size, R = FewKeys<T>::kRows;
    const Vec<T> scale(queries.scale);
    const auto weigh_rows = [&](int64_t r0, int64_t n) {
      T* const s = tile + r0 * kLd;
      Softmax<T>* const softmax = softmax_ + r0;
      Vec<T> largest[R], sums[R], shifts[R], gate[R];
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) largest[i] = Vec<T>(minus_infinity<T>());
      for (int v = 0; v < head.few.vectors(); ++v)
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
          const Vec<T> score = fma(Vec<T>::load(s + i * kLd + v * W), scale, head.few.hidden(v));
          score.store(s + i * kLd + v * W);
          largest[i] = max(score, largest[i]);
        }
      for (int i = 0; i < n; ++i) lower(r0 + i, softmax[i].raise(max_of(largest[i])));
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        sums[i] = Vec<T>(T(0));
        shifts[i] = Vec<T>(softmax[i].shift());
        gate[i] = Vec<T>(gates[r0 + i]);
      }
      for (int v = 0; v < head.few.vectors(); ++v)
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
          const Vec<T> weight = exp_flushed(Vec<T>::load(s + i * kLd + v * W) - shifts[i]);
          (gate[i] * weight).store(s + i * kLd + v * W);
          sums[i] += weight;
        }
      for (int i = 0; i < n; ++i) {
        softmax[i].total += sum(sums[i]);
        f(r0 + i);
      }
    };
    head.few.for_each_rows(queries.rows, rows, head.columns, queries.width, tile, weigh_rows);
  }

  void lower(int64_t r, T factor) {
    if (began_ && factor != 1) multiply(sums_ + r * cols_, cols_, factor);
  }

  // f(put), where put(r, d, sum) takes the last sums of row r.
  template <class F>
  void results_of(int64_t rows, const Results<T>& results, bool adds, F f) {
    T factors[kBlockRows<T>];
    for (int64_t r = 0; r < rows; ++r) factors[r] = softmax_[r].inverse();
    const T* const before = began_ ? sums_ : nullptr;
    f([&](int64_t r, int64_t d, Vec<T> sum) __attribute__((always_inline)) {
      if (r >= rows) return;
      results.put(r, d, Vec<T>(factors[r]), before ? sum + Vec<T>::load(before + r * cols_ + d) : sum, adds);
    });
  }

  const int64_t cols_;
  T* const sums_;
  Softmax<T> softmax_[kRows] = {};
  bool began_ = false;  // else sums are yet to be written
};

// n rows of a unit; lse may be null.
template <class T>
void forward_block(const Sources<T>& sources, const OfEach<Head<T>>& heads, int64_t unit, int64_t first, int64_t n,
                   const View& out, T* lse) {
  constexpr int64_t kRows = kBlockRows<T>;
  OfEach<RowBlock<T>> blocks;
  for (int i = 0; i < sources.count(); ++i) {
    const auto place = sources.place(i, unit);
    blocks.make(i, sources[i], place.unit, place.row + first, n);
  }
  bool by_rows = true;
  for (int i = 0; i < sources.count(); ++i) by_rows = by_rows && heads[i].few;
  const Problem<T>& p = sources.first();
  const Queries<T> queries(p, blocks[0], by_rows);
  const Results<T> results(blocks[0], out, p.value_width);
  T gates[kRows + FewKeys<T>::kRows] = {};
  Walk<T> all(p.value_width);
  for (int i = 0; i < sources.count(); ++i) {
    for (int64_t r = 0; r < n; ++r) gates[r] = sources.gate(i, blocks[i].rows[r]);
    const bool ends = !sources.joint || i + 1 == sources.count();
    if (!sources.joint) all.begin();
    all.follow(sources[i], heads[i], blocks[i], queries, gates, ends ? &results : nullptr, !sources.joint && i > 0);
  }
  results.write();
  if (!lse) return;
  T logs[kRows];
  logs_of_sums(all.softmax(), n, logs);
  for (int64_t r = 0; r < n; ++r) lse[p.index(blocks[0].rows[r])] = logs[r];
}

template <class T>
void forward_blocks(const Sources<T>& sources, const View& out, T* lse, int threads) {
  const int64_t rows = sources.rows(), blocks = RowBlock<T>::blocks(rows), size = kBlockRows<T>;
  const Sharing sharing(sources.units(), sources.work(), threads);
  parallel_blocks(sources.units(), sharing.units, [&](int64_t unit) {
    OfEach<Head<T>> heads;
    for (int i = 0; i < sources.count(); ++i)
      heads.make(i, sources[i], sources.place(i, unit).unit, sharing.blocks, head_columns[i], head_values[i]);
    parallel_blocks(blocks, sharing.blocks, [&](int64_t b) {
      forward_block(sources, heads, unit, b * size, smaller(size, rows - b * size), out, lse);
    });
  });
}

}  // namespace attention
}  // namespace MMKERN_ISA
}  // namespace mmkern
