// Logits of a vocabulary in tiles, and their log-sum-exps: linear_logsumexp of mmkern/reference/vocabulary.py.
//
// A tile has 48 tokens as its rows, and rows of the input as its columns: then what these sum up lies in lanes, and of
// the two matrices the small one is transposed as it is packed, while tokens are only copied.
//
// Tokens go by in panels, whose blocks of 48 are shared among the threads. What a block adds up it adds up alone, and
// blocks are merged in their order: the panel's size, which grows with the number of threads, leaves no trace.
#pragma once

#include "softmax.h"
#include "stored.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace vocabulary {

// Rows at a time, where their logits are not kept: packed, they stay in the last cache.
constexpr int64_t kMostRows = 512;

// Memory for one call, aligned to a page.
template <class T>
class Room {
 public:
  explicit Room(int64_t n) : data(buffer_.reserve<T>(n > 0 ? n : 1)) {}

 private:
  ThreadBuffer buffer_;

 public:
  T* const data;
};

// What is asked, and of which rows.
template <class T>
struct Problem {
  using Shape = TileShape<T>;

  const View &input, &linear_weight;
  const Stored<T> bias;
  const T* const token_weights;  // null for ones
  const int64_t* const target;
  const int64_t all_rows, width, tokens;
  const T softcap, scale;  // softcap is 0 where there is none
  const int64_t ignored;
  const Scratch<int64_t> row;  // those that have a target
  const int64_t rows;
  const int threads;

  // Tensors from `first` on: input, linear_weight, linear_bias, weight, target. `inverse_temperature`: of logits.
  Problem(const Call& call, int first, double softcap, double inverse_temperature, double ignore_index)
      : input(call[first]),
        linear_weight(call[first + 1]),
        bias(call[first + 2]),
        token_weights(static_cast<const T*>(call[first + 3].data)),
        target(static_cast<const int64_t*>(call[first + 4].data)),
        all_rows(input.sizes[0]),
        width(input.sizes[1]),
        tokens(linear_weight.sizes[0]),
        softcap(T(softcap)),
        scale(T(inverse_temperature)),
        ignored(int64_t(ignore_index)),
        row(all_rows),
        rows(find_rows()),
        threads(is_parallel(rows * tokens * (width + 1) / Vec<T>::size, call.threads) ? call.threads : 1) {}

  bool has_target(int64_t i) const { return target[i] != ignored; }
  bool caps() const { return softcap > 0; }
  T token_weight(int64_t token) const { return token_weights ? token_weights[token] : T(1); }

  // Blocks of a panel: a multiple of 4, which are a depth of the products with them.
  int64_t panel_blocks() const { return threads < 2 ? 8 : threads < 16 ? 4 * threads : 64; }
  int64_t panel_tokens() const { return panel_blocks() * Shape::block_rows; }

  // f(tokens as rows of what they are stored as)
  template <class F>
  void with_tokens(F f) const {
    Stored<T>(linear_weight).with([&](const auto* data) { f(as_rows(data)); });
  }

  // Products of n tokens become logits, in whole vectors.
  void finish_logits(int64_t token, int64_t n, int64_t cols, T* tile, int64_t ld) const {
    if (!bias && !caps() && scale == 1) return;
    T biases[Shape::block_rows] = {};
    if (bias) (bias + token).read(n, biases);
    const Vec<T> inverse(caps() ? 1 / softcap : T(0)), factor(caps() ? softcap * scale : scale);
    for (int64_t r = 0; r < n; ++r) {
      const Vec<T> b(biases[r]);
      for (int64_t c = r * ld; c < r * ld + cols; c += Vec<T>::size) {
        const Vec<T> z = Vec<T>::load(tile + c) + b;
        ((caps() ? tanh(z * inverse) : z) * factor).store(tile + c);
      }
    }
  }
  // d logit / d product
  Vec<T> slope(Vec<T> logit) const {
    if (!caps()) return Vec<T>(scale);
    const Vec<T> t = logit / Vec<T>(softcap * scale);  // the tanh that it was made of, as 1 - t^2 wants it
    return Vec<T>(scale) * fma(-t, t, Vec<T>(T(1)));
  }

 private:
  template <class S>
  Rows<const S> as_rows(const S* data) const {
    return {data, tokens, width, collapsed_stride(linear_weight, 1, width)};
  }
  int64_t find_rows() const {
    int64_t n = 0;
    for (int64_t i = 0; i < all_rows; ++i)
      if (has_target(i)) row.data[n++] = i;
    return n;
  }
};

// Y as the columns of tiles: [slivers][depth][cols].
template <class T, class Y>
void pack_all_columns(const Y& y, int threads, T* packed) {
  constexpr int W = Vec<T>::size, C = TileShape<T>::cols;
  parallel_rows(blocks_of(y.rows, C), C * y.cols, threads, [&](int64_t begin, int64_t end) {
    for (int64_t half = 2 * begin; half < 2 * end; ++half)
      pack_columns(y, half * W, packed + half / 2 * C * y.cols + half % 2 * W);
  });
}

// Some of the rows that have a target, one beside the other.
template <class T>
class Chunk {
  using Shape = TileShape<T>;

 public:
  Chunk(const Problem<T>& p, int64_t most_rows)
      : p_(p),
        most_(smaller(most_rows, p.rows)),
        rows_(most_ * p.width),
        columns_(up_to(Shape::cols, most_) * p.width) {}

  int64_t most() const { return most_; }
  int64_t chunks() const { return most_ ? blocks_of(p_.rows, most_) : 0; }

  void take(int64_t index) {
    first = index * most_;
    count = smaller(most_, p_.rows - first);
    const Stored<T> input(p_.input);
    const int64_t stride = collapsed_stride(p_.input, 1, p_.width);
    parallel_rows(count, p_.width, p_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) (input + row(i) * stride).read(p_.width, rows_.data + i * p_.width);
    });
    pack_all_columns(matrix(), p_.threads, columns_.data);
  }

  Rows<const T> matrix() const { return {rows_.data, count, p_.width, p_.width}; }
  // The place of a row among all.
  int64_t row(int64_t i) const { return p_.row.data[first + i]; }

  // Logits of rows from i0 on with n tokens from `token` on, of which `packed` are the rows.
  // Meanwhile others are asked for from memory: `ahead`.
  void fill(const T* packed, int64_t token, int64_t n, int64_t i0, int64_t cols, T* tile, int64_t ld,
            const Ahead& ahead = {}) const {
    fill_block(packed, up_to(Shape::row_step, n), columns_.data + i0 * p_.width, cols, p_.width, tile, ld, ahead);
    p_.finish_logits(token, n, cols, tile, ld);
  }
  // f(r, c) for the targets among these, by their places in the tile.
  template <class F>
  void for_each_target(int64_t token, int64_t n, int64_t i0, int64_t cols, F f) const {
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t r = p_.target[row(i0 + c)] - token;
      if (r >= 0 && r < n) f(r, c);
    }
  }

  int64_t first = 0, count = 0;

 private:
  const Problem<T>& p_;
  const int64_t most_;
  const Room<T> rows_, columns_;
};

// f(block, token, n): the blocks of a panel of tokens.
template <class T, class F>
void for_each_block(const Problem<T>& p, int64_t panel, F f) {
  constexpr int64_t kRows = TileShape<T>::block_rows;
  const int64_t end = smaller(panel + p.panel_tokens(), p.tokens);
  parallel_blocks(blocks_of(end - panel, kRows), p.threads, [&](int64_t b) {
    const int64_t token = panel + b * kRows;
    f(b, token, smaller(kRows, end - token));
  });
}

// The block that a thread has next, or nearly that: packing goes through it by columns, which no hardware foresees.
template <class S>
Ahead next_block(const Rows<S>& all, int64_t row, int threads) {
  constexpr int64_t kRows = TileShape<accumulate_t<S>>::block_rows;
  const int64_t first = row + threads * kRows, n = smaller(kRows, all.rows - first);
  if (n <= 0 || all.stride != all.cols) return {};
  return {reinterpret_cast<const char*>(all[first]), reinterpret_cast<const char*>(all[first + n])};
}

// The rows of n tokens from `token` on, as fill_block wants them.
template <class T, class S>
const T* packed_tokens(const Rows<const S>& tokens, int64_t token, int64_t n) {
  const int64_t padded = up_to(TileShape<T>::row_step, n);
  T* const packed = packed_rows.reserve<T>(padded * up_to(TileShape<T>::depth, tokens.cols));
  pack_rows(tokens, token, padded, packed);
  return packed;
}

// Σ w·l of each row, block by block of tokens, added up in their order.
template <class T>
class LogitSums {
 public:
  LogitSums(const Problem<T>& p, int64_t rows, bool asked)
      : p_(p), stride_(asked ? rows : 0), totals_(stride_), parts_(p.panel_blocks() * stride_) {}

  void reset() const {
    for (int64_t i = 0; i < stride_; ++i) totals_.data[i] = 0;
  }
  void add(int64_t block, int64_t token, int64_t n, int64_t i0, int64_t cols, const T* tile, int64_t ld) const {
    if (!stride_) return;
    for (int64_t c = 0; c < cols; c += Vec<T>::size) {
      Vec<T> total(T(0));
      for (int64_t r = 0; r < n; ++r)
        total = fma(Vec<T>(p_.token_weight(token + r)), Vec<T>::load(tile + r * ld + c), total);
      total.store(parts_.data + block * stride_ + i0 + c);
    }
  }
  void merge(int64_t blocks) const {
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t i = 0; i < stride_; ++i) totals_.data[i] += double(parts_.data[b * stride_ + i]);
  }
  T of(int64_t i) const { return stride_ ? T(totals_.data[i]) : T(0); }

 private:
  const Problem<T>& p_;
  const int64_t stride_;
  const Scratch<double> totals_;  // [rows]
  const Scratch<T> parts_;        // [blocks, rows]
};

// Of each row of a chunk: the log-sum-exp of all logits but the target's, that logit, and Σ w·l where it is asked for.
template <class T>
class LogSums {
 public:
  LogSums(const Problem<T>& p, int64_t most_rows, bool sums_logits)
      : p_(p),
        softmax_(most_rows, p.panel_blocks()),
        sums_(p, softmax_.stride, sums_logits),
        logs_(softmax_.stride),
        positive_(softmax_.stride) {}

  // `place(token, i0)`: where to leave the logits of a block of tokens with rows from i0 on, and the targets' as -inf;
  // in tiles of so many columns, whose rows lie `ld` apart.
  template <class Place>
  void find(const Chunk<T>& chunk, int64_t tile_cols, int64_t ld, Place place) {
    softmax_.reset();
    sums_.reset();
    for (int64_t i = 0; i < chunk.count; ++i) positive_.data[i] = T(__builtin_nan(""));  // of targets that are no token
    p_.with_tokens([&](const auto& tokens) {
      for (int64_t panel = 0; panel < p_.tokens; panel += p_.panel_tokens()) {
        for_each_block(p_, panel, [&](int64_t b, int64_t token, int64_t n) {
          const T* const packed = packed_tokens<T>(tokens, token, n);
          const Ahead next = next_block(tokens, token, p_.threads);
          for (int64_t i0 = 0; i0 < chunk.count; i0 += tile_cols) {
            const int64_t cols = smaller(tile_cols, chunk.count - i0);
            T* const tile = place(token, i0);
            const int64_t stores = blocks_of(n * cols, Vec<T>::size) * blocks_of(p_.width, TileShape<T>::depth);
            chunk.fill(packed, token, n, i0, cols, tile, ld,
                       next.part(i0 / tile_cols, blocks_of(chunk.count, tile_cols), stores));
            take(chunk, b, token, n, i0, cols, tile, ld);
          }
        });
        const int64_t blocks = blocks_of(smaller(p_.panel_tokens(), p_.tokens - panel), TileShape<T>::block_rows);
        softmax_.merge(blocks);
        sums_.merge(blocks);
      }
    });
    softmax_.logs(logs_.data);
  }

  T others(int64_t i) const { return logs_.data[i]; }
  T positive(int64_t i) const { return positive_.data[i]; }
  T total(int64_t i) const { return sums_.of(i); }

 private:
  void take(const Chunk<T>& chunk, int64_t b, int64_t token, int64_t n, int64_t i0, int64_t cols, T* tile, int64_t ld) {
    sums_.add(b, token, n, i0, cols, tile, ld);
    chunk.for_each_target(token, n, i0, cols, [&](int64_t r, int64_t c) {
      positive_.data[i0 + c] = tile[r * ld + c];
      tile[r * ld + c] = minus_infinity<T>();
    });
    softmax_.add(b, i0, n, cols, tile, ld, [](int64_t) { return true; });
  }

  const Problem<T>& p_;
  ColumnSoftmax<T> softmax_;
  const LogitSums<T> sums_;
  const Scratch<T> logs_, positive_;
};

// Tensors: the problem's, then what LogSums finds. Scalars: the softcap, the inverse temperature, ignore_index, whether
// logits are summed.
template <class T>
void forward(const Call& call) {
  using Shape = TileShape<T>;
  const Problem<T> p(call, 0, call.scalars[0], call.scalars[1], call.scalars[2]);
  const RowScalars<T> others = row_scalars<T>(call[5]), positive = row_scalars<T>(call[6]),
                      totals = row_scalars<T>(call[7]);
  for (int64_t i = 0; i < p.all_rows; ++i) {
    others.set(i, 0);
    positive.set(i, 0);
    totals.set(i, 0);
  }
  Chunk<T> chunk(p, kMostRows);
  LogSums<T> sums(p, chunk.most(), call.scalars[3] != 0);
  for (int64_t c = 0; c < chunk.chunks(); ++c) {
    chunk.take(c);
    sums.find(chunk, Shape::block_cols, Shape::block_stride,
              [](int64_t, int64_t) { return cache_block.reserve<T>(Shape::block_rows * Shape::block_stride); });
    for (int64_t i = 0; i < chunk.count; ++i) {
      others.set(chunk.row(i), sums.others(i));
      positive.set(chunk.row(i), sums.positive(i));
      totals.set(chunk.row(i), sums.total(i));
    }
  }
}

}  // namespace vocabulary
}  // namespace MMKERN_ISA
}  // namespace mmkern
