// Attention forward: score tiles, a softmax that goes along, and the product with v, a block of rows at a time.
#pragma once

#include "attention.h"

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

// k packed as columns, v as rows, of one unit.
template <class T>
struct Head {
  const KeyRange keys;  // what the key mask leaves
  const bool holes;
  const T* const columns;
  const HeadRows<T> values;

  Head(const Problem<T>& p, int64_t unit, int threads)
      : keys(p.unmasked(unit / p.groups)),
        holes(p.has_holes(unit / p.groups, keys)),
        columns(pack(p, unit, threads)),
        values(p.v, unit / p.groups, unit % p.groups, keys, threads, value_rows) {}

 private:
  const T* pack(const Problem<T>& p, int64_t unit, int threads) {
    T* const packed = packed_columns.reserve<T>(blocks_of(p.keys, TileShape<T>::cols) * TileShape<T>::cols * p.width);
    pack_head_columns(p.k, unit / p.groups, unit % p.groups, keys, threads, packed);
    return packed;
  }
};

template <class T>
void forward_block(const Problem<T>& p, const Head<T>& head, const RowBlock<T>& block, const View& out, T* lse) {
  using Shape = TileShape<T>;
  constexpr int64_t ld = Shape::block_cols;
  const int64_t value_cols = blocks_of(p.value_width, Vec<T>::size) * Vec<T>::size;
  T* const queries = packed_rows.reserve<T>(packed_size<T>(block.padded, p.width));
  T* const tile = cache_block.reserve<T>(Shape::block_rows * ld);
  T* const sums = sums_block.reserve<T>(Shape::block_rows * (value_cols ? value_cols : 1));
  Softmax<T> softmax[Shape::block_rows];
  pack_block<T>(block, p.width, p.scale, queries, [&](const Row& row) { return p.query(row); });
  const KeyBlocks<T> key_blocks(block.keys.within(head.keys));
  for (int64_t i = 0; !key_blocks.count() && i < block.count * value_cols; ++i) sums[i] = 0;
  for (int64_t b = 0; b < key_blocks.count(); ++b) {
    const KeyRange keys = key_blocks[b];
    const int64_t n = keys.last - keys.first;
    fill_block(queries, block.padded, head.columns + keys.first * p.width, n, p.width, tile);
    for (int64_t r = 0; r < block.count; ++r) {
      T* const s = tile + r * ld;
      const KeyRange band = block.bands[r].within(head.keys);
      transform_scores(p, block.rows[r], band, head.holes, keys.first, n, s);
      const T factor = softmax[r].weigh(s, n);
      if (b > 0 && factor != 1) multiply(sums + r * value_cols, value_cols, factor);
      if (p.drops()) for_each_kept(p, block.rows[r], keys.first, n, [&](int64_t j, T kept) { s[j] *= kept; });
    }
    head.values.multiply(tile, keys, block.padded, value_cols, b == 0 ? Into::set : Into::add, sums, value_cols);
  }
  for (int64_t r = 0; r < block.count; ++r) {
    const Row& row = block.rows[r];
    const T total = softmax[r].total;
    multiply(sums + r * value_cols, value_cols, total == 0 ? T(0) : 1 / total);
    Problem<T>::at(out, row.batch, row.head, row.query).write(p.value_width, sums + r * value_cols);
    lse[p.index(row)] = softmax[r].log_of_sum();
  }
}

template <class T>
void forward_blocks(const Problem<T>& p, const View& out, T* lse, int threads) {
  const int64_t rows = p.rows_per_group(), blocks = RowBlock<T>::blocks(rows), size = TileShape<T>::block_rows;
  const Sharing sharing(p.units(), p.units() * rows * p.keys * (p.width + p.value_width) / Vec<T>::size, threads);
  parallel_blocks(p.units(), sharing.units, [&](int64_t unit) {
    const Head<T> head(p, unit, sharing.blocks);
    parallel_blocks(blocks, sharing.blocks, [&](int64_t b) {
      forward_block(p, head, RowBlock<T>(p, unit, b * size, smaller(size, rows - b * size)), out, lse);
    });
  });
}

}  // namespace attention
}  // namespace MMKERN_ISA
}  // namespace mmkern
