// Attention backward: the weights again from the saved log-sums, then five products on the tiles.
//
// With w = exp(s − lse), of a row d = Σ w grad v − grad_lse: v' = wᵀ grad, s' = w (grad vᵀ − d), q' = s' k, k' = s'ᵀ q.
// A sweep goes over blocks of keys and, within, over blocks of rows, in this order for every number of threads.
#pragma once

#include <string.h>

#include "attention_results.h"
#include "attention_scores.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace attention {

inline thread_local ThreadBuffer value_columns, packed_grads, packed_outs, grad_tile, row_buffer, hidden_keys,
    query_sums, key_sums, value_sums;

template <class T>
struct BackwardCall {
  static constexpr int kGrads = 2, kOuts = kGrads + Problem<T>::kInputs;

  const Problem<T> p;
  const Factors weighed;  // grad and v
  const View &grad, &out, &grad_q, &grad_k, &grad_v;
  const T *const grad_lse, *const lse;
  const Broadcast grad_biases[Problem<T>::kBiases];

  explicit BackwardCall(const Call& call)
      : p(call, kGrads),
        weighed(call[0], p.v),
        grad(call[0]),
        out(call[kOuts]),
        grad_q(call[kOuts + 2]),
        grad_k(call[kOuts + 3]),
        grad_v(call[kOuts + 4]),
        grad_lse(static_cast<const T*>(call[1].data)),
        lse(static_cast<const T*>(call[kOuts + 1].data)),
        grad_biases{Broadcast(call[kOuts + 5]), Broadcast(call[kOuts + 6])} {}
};

template <class T>
T dot(const T* x, const T* y, int64_t n) {
  const auto add = [=](auto at, Vec<T>* sum) { *sum = fma(at.load(x), at.load(y), *sum); };
  return reduce_row<T, 1>(n, add).total(0);
}

// d of each row of a block, beside a tile of some keys.
//
// Where few keys carry the weight of a row, grad v of a key and d are nearly one number, and what is left of them has
// its digits only if d was added up of just these products. So it is for a row that sees no keys but the tile's. For
// others d is Σ grad·out, the same but for the rounding of each.
template <class T>
class Differences {
 public:
  // `unmasked` are the keys that the key mask lets through.
  Differences(const BackwardCall<T>& call, const RowBlock<T>& block, KeyRange unmasked, KeyRange tile,
              const BlockRows<T>& grads)
      : call_(call), block_(block) {
    bool all = true;
    for (int64_t r = 0; r < block.count; ++r) {
      const KeyRange seen = block.bands[r].within(unmasked);
      is_of_tile_[r] = seen.first >= tile.first && seen.last <= tile.last;
      all = all && is_of_tile_[r];
    }
    if (all) return;
    const BlockRows<T> outs(block, call.out, packed_outs);
    for (int64_t r = 0; r < block.count; ++r) of_outs_[r] = dot(grads.each()[r], outs.each()[r], call.p.value_width);
  }

  // `of_tile` is Σ w grad v over its keys.
  T of(int64_t r, T of_tile) const {
    return (is_of_tile_[r] ? of_tile : of_outs_[r]) - call_.grad_lse[call_.p.index(block_.rows[r])];
  }

 private:
  const BackwardCall<T>& call_;
  const RowBlock<T>& block_;
  bool is_of_tile_[kBlockRows<T>];
  T of_outs_[kBlockRows<T>];
};

// k and v of one unit, packed for the products that read them.
template <class T>
struct BackwardHead {
  const Seen<T> seen;
  const HeadColumns<T> key_columns, value_columns;
  const HeadRows<T> key_rows;

  // Of the keys in `range`.
  BackwardHead(const BackwardCall<T>& call, int64_t unit, KeyRange range, int threads)
      : seen(call.p, unit, range, hidden_keys),
        key_columns(call.p, call.p.scored, unit, seen.keys, threads, packed_columns),
        value_columns(call.p, call.weighed, unit, seen.keys, threads, attention::value_columns),
        key_rows(call.p.k, unit / call.p.groups, unit % call.p.groups, seen.keys, threads, attention::key_rows) {}
};

// Which gradients a sweep is after.
struct Wanted {
  bool queries, keys, biases[2];
};

// to[i][j] += Σ_r x[r][i] y[r][j], x a tile of scores.
template <class T>
MMKERN_FN void add_transposed_product(const T* x, const Rows<const T>& y, int64_t keys, T* to, int64_t ld) {
  register_tiles<T, 1, TileShape<T>::block_stride>(
      x, [&](int64_t j) { return y.data + j; }, y.stride, keys, y.cols, y.rows, Into<T>{to, ld, true});
}

// Rows [first_row, last_row) of a unit against a range of its keys.
template <class T>
class Sweep {
  using Shape = TileShape<T>;
  static constexpr int64_t ld = Shape::block_stride;

 public:
  Sweep(const BackwardCall<T>& call, const BackwardHead<T>& head, int64_t unit, Wanted wanted)
      : call_(call),
        p_(call.p),
        head_(head),
        unit_(unit),
        wanted_(wanted),
        width_(up_to(Vec<T>::size, p_.width)),
        value_width_(up_to(Vec<T>::size, std::max<int64_t>(p_.value_width, 1))) {}

  void run(int64_t first_row, int64_t last_row, KeyRange range) {
    const KeyBlocks<T> blocks(range.within(head_.seen.keys));
    const bool at_once = blocks.count() <= 1;  // a row's gradient is complete with the first block of keys
    const int64_t rows = last_row - first_row, size = rows_per_block(p_, rows);
    T* const queries = wanted_.queries && !at_once ? zeros(query_sums, (rows + Shape::rows) * width_) : nullptr;
    for (int64_t b = 0; b < blocks.count(); ++b) {
      const KeyRange keys = blocks[b];
      const int64_t padded_keys = up_to(Shape::rows, keys.last - keys.first);
      T* const k = wanted_.keys ? zeros(key_sums, padded_keys * width_) : nullptr;
      T* const v = wanted_.keys ? zeros(value_sums, padded_keys * value_width_) : nullptr;
      for (int64_t r = first_row; r < last_row; r += size) {
        const RowBlock<T> block(p_, unit_, r, smaller(size, last_row - r));
        const KeyRange met = in_vectors(block.keys.within(keys), keys.last);
        if (!met.is_empty())
          step(block, met, at_once ? nullptr : queries + (r - first_row) * width_, keys.first, k, v);
        else if (at_once)
          write_queries(block, nullptr);
      }
      if (wanted_.keys) write_keys(keys.first, keys, k, v);
    }
    if (wanted_.keys) write_unseen(range, blocks);
    if (at_once && blocks.count()) return;
    for (int64_t r = first_row; r < last_row; r += size)
      write_queries(RowBlock<T>(p_, unit_, r, smaller(size, last_row - r)),
                    queries ? queries + (r - first_row) * width_ : nullptr);
  }

 private:
  static T* zeros(ThreadBuffer& buffer, int64_t n) {
    T* const data = buffer.reserve<T>(n);
    memset(data, 0, size_t(n) * sizeof(T));
    return data;
  }

  // As far as whole vectors reach: a tile of the products with the keys writes no others.
  static KeyRange in_vectors(KeyRange keys, int64_t last) {
    if (keys.is_empty()) return keys;
    return {KeyBlocks<T>(keys).first, smaller(last, up_to(Vec<T>::size, keys.last))};
  }

  // `queries` is null where the gradients of the rows are complete with these keys; k and v are sums for those from
  // `origin` on.
  void step(const RowBlock<T>& block, KeyRange keys, T* queries, int64_t origin, T* k, T* v) {
    const int64_t n = keys.last - keys.first;
    T* const weights = tile_of_scores<T>(cache_block);
    T* const slopes = tile_of_scores<T>(grad_tile);
    const BlockRows<T> xs(block, p_.q, packed_rows), gs(block, call_.grad, packed_grads);
    const Differences<T> d(call_, block, head_.seen.unmasked, keys, gs);
    score(block, xs, keys, weights);
    const auto differentiate_rows = [&](int64_t r, int64_t rows) {
      if (head_.seen.is_same(block, r, rows, keys))
        differentiate_together(block, r, rows, keys, d, weights + r * ld, slopes + r * ld);
      else
        for (int64_t i = r; i < r + rows; ++i) differentiate(block, i, keys, d, weights + i * ld, slopes + i * ld);
    };
    multiply(call_.weighed, block, gs, head_.value_columns, keys, slopes, differentiate_rows);
    if (k) {
      const int64_t before = keys.first - origin;
      add_transposed_product(weights, gs.matrix(packed_grads), n, v + before * value_width_, value_width_);
      add_transposed_product(slopes, xs.matrix(packed_rows), n, k + before * width_, width_);
    }
    if (!wanted_.queries) return;
    if (queries) return head_.key_rows.multiply(slopes, keys, block.count, p_.width, Into<T>{queries, width_, true});
    const Results<T> results(block, call_.grad_q, p_.width);
    const auto put = [put = results.put(), rows = block.count](int64_t r, int64_t d, Vec<T> sum)
                         __attribute__((always_inline)) {
                           if (r < rows) put(r, d, sum, false);
                         };
    head_.key_rows.multiply(slopes, keys, block.count, p_.width, put);
    results.write();
  }

  // The products of the forward, added up in its order: where a row's largest weight is 1 but for one rounding of its
  // score, no other score will do.
  void score(const RowBlock<T>& block, const BlockRows<T>& queries, KeyRange keys, T* tile) const {
    const int64_t n = keys.last - keys.first;
    if (p_.rows_per_group() > kFewRows)
      return multiply(p_.scored, block, queries, head_.key_columns, keys, tile, [](int64_t, int64_t) {});
    p_.at(p_.k, unit_ / p_.groups, unit_ % p_.groups, keys.first).with([&](const auto* k) {
      for (int64_t r = 0; r < block.count; ++r)
        dot_each_key(queries.each()[r], k, p_.k.strides[2], n, p_.width, tile + r * ld);
    });
  }

  // score_rows of the first of two factors, whose `rows` are numbers.
  template <class F>
  static void multiply(const Factors& factors, const RowBlock<T>& block, const BlockRows<T>& rows,
                       const HeadColumns<T>& columns, KeyRange keys, T* tile, F f) {
    if (!factors.are_pairs) return score_rows(rows.each(), block.count, columns, keys, tile, f);
    const BlockRows<T> pairs(block, factors.rows, packed_rows);  // where they lie: the buffer is left alone
    score_rows(pairs.each(), block.count, columns, keys, tile, f);
  }

  // Gradients of queries from their sums, of none where that is null.
  void write_queries(const RowBlock<T>& block, const T* sums) const {
    if (!wanted_.queries) return;
    const T* const none = sums ? nullptr : zeros(row_buffer, width_);
    for (int64_t r = 0; r < block.count; ++r) {
      const Row& row = block.rows[r];
      p_.at(call_.grad_q, row.batch, row.head, row.query).write(p_.width, sums ? sums + r * width_ : none);
    }
  }

  // A row that sees no key has weights 0.
  T shift_of(int64_t index) const {
    const T lse = call_.lse[index];
    return lse == minus_infinity<T>() ? -lse : lse;
  }

  // Of one row: products become weights (those that dropout kept), and gradients of weights those of products.
  void differentiate(const RowBlock<T>& block, int64_t r, KeyRange keys, const Differences<T>& d, T* s, T* slope) {
    const Row& row = block.rows[r];
    const int64_t n = keys.last - keys.first, index = p_.index(row);
    T* const cap_slope = row_buffer.reserve<T>(2 * ld);
    T* const kept = cap_slope + ld;
    if (p_.softcap > 0) {
      const Vec<T> inverse(p_.scale / p_.softcap), one(T(1));
      for_each_vec<T>(n, [&](auto at) {
        const Vec<T> t = tanh(at.load(s) * inverse);
        at.store(cap_slope, fma(-t, t, one));
      });
    }
    transform_scores(p_, row, block.bands[r].within(head_.seen.keys), head_.seen.holes, keys.first, n, s);
    const Vec<T> shift(shift_of(index));
    for_each_vec<T>(n, [&](auto at) { at.store(s, exp_flushed(at.load(s) - shift)); });
    if (p_.drops()) {
      for_each_kept(p_, row, keys.first, n, [&](int64_t j, T factor) { kept[j] = factor; });
      for_each_vec<T>(n, [&](auto at) { at.store(slope, at.load(slope) * at.load(kept)); });
    }
    const Vec<T> difference(d.of(r, dot(s, slope, n))), scale(p_.scale);
    for_each_vec<T>(n, [&](auto at) { at.store(slope, at.load(s) * (at.load(slope) - difference)); });
    if (p_.drops()) for_each_vec<T>(n, [&](auto at) { at.store(s, at.load(s) * at.load(kept)); });
    for (int i = 0; i < Problem<T>::kBiases; ++i)
      if (wanted_.biases[i]) add_to_bias(call_.grad_biases[i], row, keys.first, n, slope);
    if (p_.softcap > 0) for_each_vec<T>(n, [&](auto at) { at.store(slope, at.load(slope) * at.load(cap_slope)); });
    for_each_vec<T>(n, [&](auto at) { at.store(slope, at.load(slope) * scale); });
  }

  // The same of n rows from r on that see the same keys, side by side.
  void differentiate_together(const RowBlock<T>& block, int64_t r, int64_t n, KeyRange keys, const Differences<T>& d,
                              T* s, T* slopes) {
    constexpr int W = Vec<T>::size, R = kRowsAtOnce;
    const int64_t cols = keys.last - keys.first;
    const Vec<T> scale(p_.scale);
    Vec<T> shifts[R], differences[R];
    for (int i = 0; i < R; ++i) shifts[i] = Vec<T>(shift_of(p_.index(block.rows[r + smaller(i, n - 1)])));
    head_.seen.hide(keys, s);
    for (int64_t j = 0; j < cols; j += W)
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        T* const score = s + i * ld + j;
        exp_flushed(Vec<T>::load(score) * scale - shifts[i]).store(score);
      }
    for (int i = 0; i < R; ++i)
      differences[i] = Vec<T>(d.of(r + smaller(i, n - 1), dot(s + i * ld, slopes + i * ld, cols)));
    for (int64_t j = 0; j < cols; j += W)
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        T* const slope = slopes + i * ld + j;
        (scale * Vec<T>::load(s + i * ld + j) * (Vec<T>::load(slope) - differences[i])).store(slope);
      }
  }

  static void add_to_bias(const Broadcast& bias, const Row& row, int64_t j0, int64_t n, const T* slope) {
    T* const to = static_cast<T*>(bias.view.data) + bias.row(row.batch, row.head, row.query) + j0 * bias.strides[3];
    if (bias.strides[3]) return for_each_vec<T>(n, [&](auto at) { at.store(to, at.load(to) + at.load(slope)); });
    *to += reduce_row<T, 1>(n, [&](auto at, Vec<T>* acc) { acc[0] += at.load(slope); }).total(0);
  }

  void write_keys(int64_t origin, KeyRange keys, const T* k, const T* v) const {
    const int64_t batch = unit_ / p_.groups, group = unit_ % p_.groups;
    for (int64_t j = keys.first; j < keys.last; ++j) {
      if (call_.grad_k) p_.at(call_.grad_k, batch, group, j).write(p_.width, k + (j - origin) * width_);
      if (call_.grad_v) p_.at(call_.grad_v, batch, group, j).write(p_.value_width, v + (j - origin) * value_width_);
    }
  }

  // Keys that no block holds have gradients of 0.
  void write_unseen(KeyRange all, const KeyBlocks<T>& blocks) const {
    const T* const none = zeros(key_sums, width_ + value_width_);
    const KeyRange seen = blocks.count() ? KeyRange{blocks.first, blocks.last} : KeyRange{all.last, all.last};
    for (int64_t j = all.first; j < all.last; ++j)
      if (j < seen.first || j >= seen.last) write_keys(j, {j, j + 1}, none, none);
  }

  const BackwardCall<T>& call_;
  const Problem<T>& p_;
  const BackwardHead<T>& head_;
  const int64_t unit_;
  const Wanted wanted_;
  const int64_t width_, value_width_;
};

// Gradients of biases that are shared among the batch or the heads: a task for each of their own rows and key blocks,
// which goes over everything that shares it.
template <class T>
void sum_bias(const BackwardCall<T>& call, int which, int threads) {
  const Problem<T>& p = call.p;
  const View& view = call.grad_biases[which].view;
  const int64_t size = KeyBlocks<T>::most_of(p.keys);
  const int64_t key_blocks = view.sizes[3] == 1 ? 1 : blocks_of(p.keys, size);
  Wanted wanted{};
  wanted.biases[which] = true;
  parallel_blocks(view.sizes[0] * view.sizes[1] * key_blocks, threads, [&](int64_t task) {
    const int64_t b = task % key_blocks, owner = task / key_blocks;
    const KeyRange keys = key_blocks == 1 ? KeyRange{0, p.keys} : KeyRange{b * size, smaller((b + 1) * size, p.keys)};
    for (int64_t batch = 0; batch < p.batches; ++batch)
      for (int64_t head = 0; head < p.heads; ++head) {
        if ((view.sizes[0] > 1 && batch != owner / view.sizes[1]) ||
            (view.sizes[1] > 1 && head != owner % view.sizes[1]))
          continue;
        const int64_t unit = batch * p.groups + head / p.heads_per_group(), within = head % p.heads_per_group();
        const BackwardHead<T> packed(call, unit, keys, 1);
        Sweep<T>(call, packed, unit, wanted).run(within * p.queries, (within + 1) * p.queries, keys);
      }
  });
}

// Tensors: grad, grad_lse, the problem's, out, lse, and the gradients of q, k, v and the biases.
template <class T>
void backward(const Call& tensors) {
  const BackwardCall<T> call(tensors);
  const Problem<T>& p = call.p;
  const int64_t rows = p.rows_per_group(), size = rows_per_block(p, rows);
  const Sharing sharing(p.units(), p.units() * rows * p.keys * (p.width + p.value_width) / Vec<T>::size,
                        tensors.threads);
  Wanted wanted{bool(call.grad_q), call.grad_k || call.grad_v, {}};
  bool shared[Problem<T>::kBiases] = {};
  for (int i = 0; i < Problem<T>::kBiases; ++i) {
    const View& view = call.grad_biases[i].view;
    if (!view) continue;
    memset(view.data, 0, size_t(count(view, 4)) * sizeof(T));
    shared[i] = view.sizes[0] < p.batches || view.sizes[1] < p.heads || view.sizes[3] < p.keys;
    wanted.biases[i] = !shared[i];
  }
  const bool sweeps = wanted.queries || wanted.keys || wanted.biases[0] || wanted.biases[1];
  parallel_blocks(sweeps ? p.units() : 0, sharing.units, [&](int64_t unit) {
    const BackwardHead<T> head(call, unit, {0, p.keys}, sharing.blocks);
    if (sharing.blocks == 1) return Sweep<T>(call, head, unit, wanted).run(0, rows, {0, p.keys});
    const Wanted by_rows{wanted.queries, false, {}}, by_keys{false, wanted.keys, {wanted.biases[0], wanted.biases[1]}};
    const KeyBlocks<T> blocks(head.seen.keys);
    parallel_blocks(blocks.count() ? blocks.count() : 1, sharing.blocks, [&](int64_t b) {
      Sweep<T>(call, head, unit, by_keys).run(0, rows, blocks.with_unseen(b, p.keys));
    });
    parallel_blocks(wanted.queries ? blocks_of(rows, size) : 0, sharing.blocks, [&](int64_t b) {
      Sweep<T>(call, head, unit, by_rows).run(b * size, smaller((b + 1) * size, rows), {0, p.keys});
    });
  });
  for (int i = 0; i < Problem<T>::kBiases; ++i)
    if (shared[i]) sum_bias(call, i, sharing.units > sharing.blocks ? sharing.units : sharing.blocks);
}

}  // namespace attention
}  // namespace MMKERN_ISA
}  // namespace mmkern
