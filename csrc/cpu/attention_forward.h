// Attention forward: score tiles, a softmax that goes along, and the product with v, a block of rows at a time.
#pragma once

#include "attention_results.h"
#include "attention_scores.h"
#include "attention_sources.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace attention {

struct HeadBuffers {
  ThreadBuffer hidden, columns, values;
};
inline thread_local HeadBuffers head_buffers[kMaxSources];

// A head of k packed as columns, and one of v as rows.
template <class T>
struct Head {
  const Seen<T> seen;
  const HeadColumns<T> columns;
  const HeadRows<T> values;
  const NextHead<T> next;

  Head(const Problem<T>& p, int64_t unit, int threads, HeadBuffers& buffers)
      : seen(p, unit, {0, p.keys}, buffers.hidden),
        columns(p, p.scored, unit, seen.keys, threads, buffers.columns),
        values(p.v, unit / p.groups, unit % p.groups, seen.keys, threads, buffers.values),
        next(p, unit) {}
};

// A block of rows on its way along the keys: a softmax each, and Σ weight·v in rows of `cols` columns.
template <class T>
class Walk {
 public:
  explicit Walk(int64_t value_width)
      : cols_(up_to(W, value_width)), sums_(sums_block.reserve<T>(kBlockRows<T> * cols_ + 1)) {}

  // Anew, along other keys.
  void begin() {
    for (Softmax<T>& row : softmax_) row = {};
    began_ = false;
  }

  // Goes on along the keys of `head`; the weights of row r are multiplied by gates[r]. Then, if they are given, puts
  // or adds the results.
  void follow(const Problem<T>& p, const Head<T>& head, const RowBlock<T>& block, const BlockRows<T>& queries,
              const T* gates, const Results<T>* results, bool adds) {
    T* const tile = tile_of_scores<T>(cache_block);
    const KeyBlocks<T> key_blocks(block.keys.within(head.seen.keys));
    for (int64_t b = 0; b < key_blocks.count(); ++b) {
      const KeyRange keys = key_blocks[b];
      const bool ends = results && b + 1 == key_blocks.count();
      const auto weigh_rows = [&](int64_t r, int64_t n) {
        head.next.ask(block.first + r, n);
        queries.ask_next(r, n);
        if (head.seen.is_same(block, r, n, keys))
          weigh_together(p, head.seen, keys, r, n, gates, tile);
        else
          for (int64_t i = r; i < r + n; ++i) weigh(p, head.seen, block, keys, i, gates[i], tile);
      };
      score_rows(queries.each(), block.count, head.columns, keys, tile, weigh_rows);
      if (ends) {
        results_of(block.count, *results, adds,
                   [&](auto put) { head.values.multiply(tile, keys, block.count, cols_, put); });
        results = nullptr;
      } else {
        head.values.multiply(tile, keys, block.count, cols_, Into<T>{sums_, cols_, began_});
      }
      began_ = true;
    }
    if (!results) return;
    results_of(block.count, *results, adds, [&](auto put) {
      for (int64_t r = 0; r < block.count; ++r)
        for (int64_t d = 0; d < cols_; d += W) put(r, d, Vec<T>(T(0)));
    });
  }

  const Softmax<T>* softmax() const { return softmax_; }

 private:
  static constexpr int W = Vec<T>::size, R = kRowsAtOnce;
  static constexpr int64_t kLd = TileShape<T>::block_stride;

  // Weights of a row with some keys, in the place of their products.
  void weigh(const Problem<T>& p, const Seen<T>& seen, const RowBlock<T>& block, KeyRange keys, int64_t r, T gate,
             T* tile) {
    T* const s = tile + r * kLd;
    const int64_t n = keys.last - keys.first;
    transform_scores(p, block.rows[r], block.bands[r].within(seen.keys), seen.holes, keys.first, n, s);
    lower(r, softmax_[r].weigh(s, n, gate));
    if (p.drops()) for_each_kept(p, block.rows[r], keys.first, n, [&](int64_t j, T kept) { s[j] *= kept; });
  }

  // The same of n rows from r0 on that see the same keys, side by side.
  void weigh_together(const Problem<T>& p, const Seen<T>& seen, KeyRange keys, int64_t r0, int64_t n, const T* gates,
                      T* tile) {
    const int64_t cols = keys.last - keys.first;
    T* const s = tile + r0 * kLd;
    Softmax<T>* const softmax = softmax_ + r0;
    seen.hide(keys, s);
    Vec<T> largest[R], sums[R], shifts[R];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) largest[i] = Vec<T>(minus_infinity<T>());
    for (int64_t j = 0; j < cols; j += W)
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) largest[i] = max(Vec<T>::load(s + i * kLd + j), largest[i]);
    for (int i = 0; i < n; ++i) lower(r0 + i, softmax[i].raise(p.scale * max_of(largest[i])));
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      sums[i] = Vec<T>(T(0));
      shifts[i] = Vec<T>(softmax[i].shift());
    }
    const Vec<T> scale(p.scale);
    for (int64_t j = 0; j < cols; j += W)
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        T* const at = s + i * kLd + j;
        const Vec<T> weight = exp_flushed(Vec<T>::load(at) * scale - shifts[i]);
        weight.store(at);
        sums[i] += weight;
      }
    for (int i = 0; i < n; ++i) {
      softmax[i].total += sum(sums[i]);
      if (gates[r0 + i] != 1) multiply(s + i * kLd, cols, gates[r0 + i]);
    }
  }

  void lower(int64_t r, T factor) {
    if (began_ && factor != 1) multiply(sums_ + r * cols_, cols_, factor);
  }

  // f(put), where put(r, d, sum) takes the last sums of row r.
  template <class F>
  void results_of(int64_t rows, const Results<T>& results, bool adds, F f) {
    T inverses[kBlockRows<T>];
    for (int64_t r = 0; r < rows; ++r) inverses[r] = softmax_[r].inverse();
    const T* const factors = inverses;
    const T* const before = began_ ? sums_ : nullptr;
    f([=, put = results.put(), cols = cols_](int64_t r, int64_t d, Vec<T> sum) __attribute__((always_inline)) {
      if (r < rows) put(r, d, Vec<T>(factors[r]) * (before ? sum + Vec<T>::load(before + r * cols + d) : sum), adds);
    });
  }

  const int64_t cols_;
  T* const sums_;
  Softmax<T> softmax_[kBlockRows<T> + R] = {};
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
  const Problem<T>& p = sources.first();
  const BlockRows<T> queries(blocks[0], p.scored.rows, packed_rows);
  const Results<T> results(blocks[0], out, p.value_width);
  T gates[kRows];
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
  const int64_t rows = sources.rows(), size = rows_per_block(sources.first(), rows), blocks = blocks_of(rows, size);
  const Sharing sharing(sources.units(), sources.work(), threads);
  parallel_blocks(sources.units(), sharing.units, [&](int64_t unit) {
    OfEach<Head<T>> heads;
    for (int i = 0; i < sources.count(); ++i)
      heads.make(i, sources[i], sources.place(i, unit).unit, sharing.blocks, head_buffers[i]);
    parallel_blocks(blocks, sharing.blocks, [&](int64_t b) {
      forward_block(sources, heads, unit, b * size, smaller(size, rows - b * size), out, lse);
    });
  });
}

}  // namespace attention
}  // namespace MMKERN_ISA
}  // namespace mmkern
