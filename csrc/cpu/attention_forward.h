// Attention forward: score tiles, a softmax that goes along, and the product with v, a block of rows at a time.
#pragma once

#include "attention_sources.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace attention {

// The largest score of a row so far, and the sum of the exponentials below it.
template <class T>
struct Softmax {
  T top = minus_infinity<T>(), total = 0;

  // Turns scores into exp(s − top), in whole vectors; returns what earlier sums are to be multiplied by.
  T weigh(T* s, int64_t n) {
    constexpr int W = Vec<T>::size;
    const int64_t whole = blocks_of(n, 2 * W) * 2 * W;
    for (int64_t j = n; j < whole; ++j) s[j] = minus_infinity<T>();
    Vec<T, 2> largest(minus_infinity<T>());
    for (int64_t j = 0; j < whole; j += 2 * W) largest = max(Vec<T, 2>::load(s + j), largest);
    const T before = top, here = max_of(largest);
    top = here > top ? here : top;
    const T shift = top == minus_infinity<T>() ? T(0) : top;
    Vec<T, 2> sums(T(0));
    for (int64_t j = 0; j < whole; j += 2 * W) {
      const Vec<T, 2> weights = exp_flushed(Vec<T, 2>::load(s + j) - Vec<T, 2>(shift));
      weights.store(s + j);
      sums += weights;
    }
    const T factor = weight_of(before);
    total = total * factor + sum(sums);
    return factor;
  }

  // What the sums of both are to be multiplied by.
  struct Factors {
    T here, other;
  };
  Factors merge(const Softmax& other) {
    const T before = top;
    top = other.top > top ? other.top : top;
    const Factors factors{weight_of(before), weight_of(other.top)};
    total = total * factors.here + other.total * factors.other;
    return factors;
  }
  T weight_of(T score) const {
    if (score == top) return 1;
    return score == minus_infinity<T>() ? T(0) : exp(Vec<T>(score - top))[0];
  }
  T log_of_sum() const { return top + log(Vec<T>(total))[0]; }
};

// A head of k packed as columns, and one of v as rows.
template <class T>
struct Head {
  const KeyRange keys;  // what the key mask leaves
  const bool holes;
  const T* const columns;
  const HeadRows<T> values;

  Head(const Problem<T>& p, int64_t unit, int threads, ThreadBuffer& key_columns, ThreadBuffer& value_rows)
      : keys(p.unmasked(unit / p.groups)),
        holes(p.has_holes(unit / p.groups, keys)),
        columns(pack(p, unit, threads, key_columns)),
        values(p.v, unit / p.groups, unit % p.groups, keys, threads, value_rows) {}

 private:
  const T* pack(const Problem<T>& p, int64_t unit, int threads, ThreadBuffer& buffer) {
    T* const packed = buffer.reserve<T>(blocks_of(p.keys, TileShape<T>::cols) * TileShape<T>::cols * p.width);
    pack_head_columns(p.k, unit / p.groups, unit % p.groups, keys, threads, packed);
    return packed;
  }
};

inline thread_local ThreadBuffer head_columns[kMaxSources], head_values[kMaxSources], source_sums;

// A block of rows on its way along the keys: a softmax each, and Σ weight·v in rows of `cols` columns.
template <class T>
struct Walk {
  T* const sums;
  const int64_t cols;
  Softmax<T> softmax[TileShape<T>::block_rows] = {};
  bool began = false;  // else sums are yet to be written

  // Goes on along the keys of `head`; the weights of row r are multiplied by gates[r].
  void follow(const Problem<T>& p, const Head<T>& head, const RowBlock<T>& block, const T* queries, const T* gates) {
    constexpr int64_t ld = TileShape<T>::block_cols;
    T* const tile = cache_block.reserve<T>(TileShape<T>::block_rows * ld);
    const KeyBlocks<T> key_blocks(block.keys.within(head.keys));
    for (int64_t b = 0; b < key_blocks.count(); ++b) {
      const KeyRange keys = key_blocks[b];
      const int64_t n = keys.last - keys.first;
      fill_block(queries, block.padded, head.columns + keys.first * p.width, n, p.width, tile);
      for (int64_t r = 0; r < block.count; ++r) {
        T* const s = tile + r * ld;
        const KeyRange band = block.bands[r].within(head.keys);
        transform_scores(p, block.rows[r], band, head.holes, keys.first, n, s);
        const T factor = softmax[r].weigh(s, n);
        if (began && factor != 1) multiply(sums + r * cols, cols, factor);
        if (p.drops()) for_each_kept(p, block.rows[r], keys.first, n, [&](int64_t j, T kept) { s[j] *= kept; });
        if (gates[r] != 1) multiply(s, n, gates[r]);
      }
      head.values.multiply(tile, keys, block.padded, cols, began ? Into::add : Into::set, sums, cols);
      began = true;
    }
  }

  // sums[r] becomes the result of row r, times gates[r].
  void normalise(int64_t rows, const T* gates) {
    for (int64_t i = 0; !began && i < rows * cols; ++i) sums[i] = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const T total = softmax[r].total;
      multiply(sums + r * cols, cols, total == 0 ? T(0) : gates[r] / total);
    }
  }
};

// n rows of a unit; lse may be null.
template <class T>
void forward_block(const Sources<T>& sources, const OfEach<Head<T>>& heads, int64_t unit, int64_t first, int64_t n,
                   const View& out, T* lse) {
  constexpr int64_t kRows = TileShape<T>::block_rows;
  const Problem<T>& p = sources.first();
  const int64_t cols = blocks_of(p.value_width, Vec<T>::size) * Vec<T>::size;
  T* const queries =
      packed_rows.reserve<T>(packed_size<T>(blocks_of(n, TileShape<T>::rows) * TileShape<T>::rows, p.width));
  T* const sums = sums_block.reserve<T>(kRows * cols + 1);
  T* const others = sources.joint ? sums : source_sums.reserve<T>(kRows * cols + 1);
  T ones[kRows], gates[kRows];
  for (T& one : ones) one = 1;
  Walk<T> all{sums, cols};
  for (int i = 0; i < sources.count(); ++i) {
    const auto place = sources.place(i, unit);
    const RowBlock<T> block(sources[i], place.unit, place.row + first, n);
    for (int64_t r = 0; r < n; ++r) gates[r] = sources.gate(i, block.rows[r]);
    if (i == 0) pack_block<T>(block, p.width, p.scale, queries, [&](const Row& row) { return p.query(row); });
    if (sources.joint) {
      all.follow(sources[i], heads[i], block, queries, gates);
      continue;
    }
    Walk<T> own{i == 0 ? sums : others, cols};
    own.follow(sources[i], heads[i], block, queries, ones);
    own.normalise(n, gates);
    if (i > 0) for_each_vec<T>(n * cols, [&](auto at) { at.store(sums, at.load(sums) + at.load(others)); });
  }
  if (sources.joint) all.normalise(n, ones);
  const auto place = sources.place(0, unit);
  Row row = p.row(place.unit, place.row + first);
  for (int64_t r = 0; r < n; ++r, row = p.after(row)) {
    Problem<T>::at(out, row.batch, row.head, row.query).write(p.value_width, sums + r * cols);
    if (lse) lse[p.index(row)] = all.softmax[r].log_of_sum();
  }
}

template <class T>
void forward_blocks(const Sources<T>& sources, const View& out, T* lse, int threads) {
  const int64_t rows = sources.rows(), blocks = RowBlock<T>::blocks(rows), size = TileShape<T>::block_rows;
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
