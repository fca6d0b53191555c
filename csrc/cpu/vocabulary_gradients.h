// Gradients of what LogSums finds, by panels of tokens: a block of tokens turns its logits into their gradients, in
// place, and has its own at once; then the rows of the chunk get theirs from all blocks of the panel.
#pragma once

#include "vocabulary.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace vocabulary {

// Sums that lie row by row: row i of them is row `index[i]` of a matrix, or i where there is no index.
template <class T>
struct SumsOfRows {
  T* to;
  int64_t stride, rows, cols;
  const int64_t* index;
  bool adds;

  MMKERN_FN void operator()(int64_t i, int64_t j, Vec<T> sum) const {
    if (i >= rows) return;
    T* const at = to + (index ? index[i] : i) * stride + j;
    const int64_t lanes = cols - j;
    if (lanes >= Vec<T>::size)
      (adds ? sum + Vec<T>::load(at) : sum).store(at);
    else
      (adds ? sum + Vec<T>::load(at, int(lanes)) : sum).store(at, int(lanes));
  }
};

// A gradient whose rows are added up over several products: where it lies, or in T until it is whole.
template <class T>
class SummedGradient {
 public:
  // `rows_at_a_time`: how many are not yet whole.
  SummedGradient(const View& view, int64_t rows_at_a_time)
      : to_(view),
        cols_(view ? view.sizes[1] : 0),
        stride_(view ? collapsed_stride(view, 1, cols_) : 0),
        in_place_(view ? to_.as_they_are() : nullptr),
        room_(view && !in_place_ ? rows_at_a_time * cols_ : 0) {}

  explicit operator bool() const { return bool(to_); }
  bool is_in_place() const { return in_place_; }

  // Where rows are added up: row `row` of all, which is row `place` of those that are not yet whole.
  T* row(int64_t row, int64_t place) const {
    return in_place_ ? in_place_ + row * stride_ : room_.data + place * cols_;
  }
  int64_t stride() const { return in_place_ ? stride_ : cols_; }
  Rows<const T> matrix(int64_t rows) const { return {in_place_, rows, cols_, stride_}; }

  void finish(int64_t row, int64_t place) const {
    if (!in_place_) (to_ + row * stride_).write(cols_, room_.data + place * cols_);
  }
  void clear(int64_t row) const {
    (to_ + row * stride_).with([&](auto* at_row) {
      for_each_vec<T>(cols_, [&](auto at) { at.store(at_row, Vec<T>(T(0))); });
    });
  }

 private:
  const Stored<T> to_;
  const int64_t cols_, stride_;
  T* const in_place_;
  const Room<T> room_;
};

// Of each row of a chunk: the gradients of n, the log-sum-exp of the other logits, of the target's logit, and of the
// sum of all; n and that logit.
template <class T>
struct Upstream {
  struct Row {
    T grad_others, grad_positive, grad_total, others, positive;
  };

  explicit Upstream(int64_t rows) : stride_(up_to(TileShape<T>::cols, rows)), room_(5 * stride_) {}

  void set(int64_t i, const Row& row) const {
    grad_others()[i] = row.grad_others;
    grad_positive()[i] = row.grad_positive;
    grad_total()[i] = row.grad_total;
    others()[i] = row.others == minus_infinity<T>() ? -minus_infinity<T>() : row.others;  // no weight, not 0/0
    positive()[i] = row.positive;
  }
  void pad(int64_t from) const {
    for (int64_t i = from; i < stride_; ++i) set(i, {});
  }
  T* grad_others() const { return room_.data; }
  T* grad_positive() const { return room_.data + stride_; }
  T* grad_total() const { return room_.data + 2 * stride_; }
  T* others() const { return room_.data + 3 * stride_; }
  T* positive() const { return room_.data + 4 * stride_; }

 private:
  const int64_t stride_;
  const Room<T> room_;
};

// kCols: columns of a tile.
template <class T, int kCols>
class Gradients {
  using Shape = TileShape<T>;
  static constexpr int W = Vec<T>::size;

 public:
  static constexpr int ld = kCols + 64 / int(sizeof(T));  // in an odd number of cache lines

  // Views: of the gradients of input, linear_weight and linear_bias, empty where one is not asked for. `keeps`: there
  // is room for the logits of all tokens.
  Gradients(const Problem<T>& p, const Chunk<T>& chunk, bool keeps, const View& input, const View& weight,
            const View& bias)
      : p_(p),
        chunk_(chunk),
        keeps_(keeps),
        span_(up_to(Shape::row_step, keeps ? p.tokens : p.panel_tokens())),
        to_input_(input, p.rows),
        to_weight_(weight, p.panel_tokens()),
        to_bias_(bias),
        upstream(chunk.most()),
        row_slivers_(weight ? up_to(Shape::cols, p.width) * chunk.most() : 0),
        token_slivers_(input ? up_to(Shape::cols, p.width) * p.panel_tokens() : 0),
        logits_(blocks_of(chunk.most(), kCols) * span_ * ld),
        bias_sums_(keeps ? p.tokens : p.panel_tokens()) {}

  // Where the logits of tokens from `token` on with rows from i0 on lie.
  T* tile(int64_t token, int64_t i0) const {
    return logits_.data + (i0 / kCols * span_ + (keeps_ ? token : token % p_.panel_tokens())) * ld;
  }

  // The chunk has other rows now.
  void take_rows() const {
    if (to_weight_) pack_all_columns(Columns<const T>(chunk_.matrix()), p_.threads, row_slivers_.data);
    upstream.pad(chunk_.count);
  }

  // A panel of tokens with the chunk; the logits are there already where all are kept.
  template <class S>
  void differentiate(const Rows<const S>& tokens, int64_t panel) const {
    const int64_t panel_rows = smaller(p_.panel_tokens(), p_.tokens - panel);
    for_each_block(p_, panel, [&](int64_t, int64_t token, int64_t n) {
      if (!keeps_) {
        const T* const packed = packed_tokens<T>(tokens, token, n);
        for (int64_t i0 = 0; i0 < chunk_.count; i0 += kCols)
          chunk_.fill(packed, token, n, i0, smaller(kCols, chunk_.count - i0), tile(token, i0), ld);
      }
      for (int64_t half = 0; to_input_ && half * W < up_to(Shape::cols, p_.width); ++half)
        pack_columns(Columns<const S>(tokens.part(token, n)), half * W,
                     token_slivers_.data + (half / 2 * panel_rows + token - panel) * Shape::cols + half % 2 * W);
      differentiate_block(token, n, keeps_ && to_input_ ? next_block(tokens, token, p_.threads) : Ahead{});
    });
    if (to_input_) add_to_rows(panel, panel_rows);
  }

  // Of n tokens from `panel` on: after the last chunk; zeros where there was none.
  void finish_tokens(int64_t panel, int64_t n) const {
    const bool none = p_.rows == 0;
    T* const sums = bias_sums(panel);
    for (int64_t r = 0; none && r < n; ++r) sums[r] = 0;
    if (to_bias_) (to_bias_ + panel).write(n, sums);
    if (!to_weight_) return;
    parallel_rows(n, p_.width, p_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) none ? to_weight_.clear(panel + r) : to_weight_.finish(panel + r, r);
    });
  }
  void finish_rows() const {
    if (!to_input_) return;
    for (int64_t i = 0; i < p_.all_rows; ++i)
      if (!p_.has_target(i)) to_input_.clear(i);
    for (int64_t i = 0; i < p_.rows; ++i) to_input_.finish(p_.row.data[i], i);
  }

 private:
  T* bias_sums(int64_t token) const { return bias_sums_.data + (keeps_ ? token : token % p_.panel_tokens()); }

  // `next`: what is asked for meanwhile, beside the sums that the next block adds to.
  __attribute__((noinline)) void differentiate_block(int64_t token, int64_t n, const Ahead& next) const {
    const bool has_sums = to_weight_.is_in_place() && chunk_.first > 0;
    const Ahead next_sums = has_sums ? next_block(to_weight_.matrix(p_.tokens), token, p_.threads) : Ahead{};
    for (int64_t i0 = 0; i0 < chunk_.count; i0 += kCols) {
      const int64_t cols = smaller(kCols, chunk_.count - i0);
      const bool adds = chunk_.first + i0 > 0;
      T* const gradients = tile(token, i0);
      differentiate_tile(token, n, i0, cols, gradients);
      if (to_bias_) add_to_bias(token, n, cols, gradients, adds);
      if (!to_weight_) continue;
      const SumsOfRows<T> to{
          to_weight_.row(token, token % p_.panel_tokens()), to_weight_.stride(), n, p_.width, nullptr, adds};
      const int64_t part = i0 / kCols, parts = blocks_of(chunk_.count, kCols), stores = n * blocks_of(p_.width, W);
      Ahead ahead = next.part(part, parts, stores), ahead_sums = next_sums.part(part, parts, stores);
      const WithAhead<SumsOfRows<T>> first{to, ahead};
      const auto columns = [&](int64_t j) { return row_slivers_.data + j * chunk_.count + i0 * Shape::cols; };
      register_tiles<T, ld, 1>(gradients, columns, Shape::cols, n, p_.width, cols,
                               WithAhead<WithAhead<SumsOfRows<T>>>{first, ahead_sums});
    }
  }

  // Logits become their gradients, and these those of the products.
  void differentiate_tile(int64_t token, int64_t n, int64_t i0, int64_t cols, T* tile) const {
    const T *const grads = upstream.grad_others() + i0, *const logs = upstream.others() + i0;
    const T* const totals = upstream.grad_total() + i0;
    for (int64_t r = 0; r < n; ++r) {
      const Vec<T> weight(p_.token_weight(token + r));
      T* const row = tile + r * ld;
      for (int64_t c = 0; c < cols; c += W) {
        const Vec<T> logit = Vec<T>::load(row + c), share = exp_flushed(logit - Vec<T>::load(logs + c));
        const Vec<T> g = fma(Vec<T>::load(totals + c), weight, Vec<T>::load(grads + c) * share);
        (g * p_.slope(logit)).store(row + c);
      }
    }
    chunk_.for_each_target(token, n, i0, cols, [&](int64_t r, int64_t c) {
      const T g = upstream.grad_positive()[i0 + c] + totals[c] * p_.token_weight(token + r);
      tile[r * ld + c] = g * p_.slope(Vec<T>(upstream.positive()[i0 + c]))[0];
    });
  }

  void add_to_bias(int64_t token, int64_t n, int64_t cols, const T* tile, bool adds) const {
    for (int64_t r = 0; r < n; ++r) {
      const auto sums = reduce_row<T, 1>(cols, [&](auto at, Vec<T>* acc) { acc[0] += at.load(tile + r * ld); });
      T& to = bias_sums(token)[r];
      to = adds ? to + sums.total(0) : sums.total(0);
    }
  }

  // The chunk's part of input', from all n tokens of a panel.
  void add_to_rows(int64_t panel, int64_t n) const {
    constexpr int64_t kRange = 256;
    const int64_t ranges = blocks_of(p_.width, kRange);
    parallel_blocks(blocks_of(chunk_.count, kCols) * ranges, p_.threads, [&](int64_t task) {
      const int64_t i0 = task / ranges * kCols, d0 = task % ranges * kRange, place = chunk_.first + i0;
      const int64_t rows = smaller(kCols, chunk_.count - i0), cols = smaller(kRange, p_.width - d0);
      const int64_t* const index = to_input_.is_in_place() ? p_.row.data + place : nullptr;
      SumsOfRows<T> to{to_input_.row(0, place) + d0, to_input_.stride(), rows, cols, index, panel > 0};
      for (int64_t k = 0; k < n; k += Shape::depth) {
        const auto columns = [&](int64_t j) { return token_slivers_.data + (d0 + j) * n + k * Shape::cols; };
        register_tiles<T, 1, ld>(tile(panel + k, i0), columns, Shape::cols, rows, cols, smaller(Shape::depth, n - k),
                                 to);
        to.adds = true;
      }
    });
  }

  const Problem<T>& p_;
  const Chunk<T>& chunk_;
  const bool keeps_;
  const int64_t span_;  // tokens whose logits there is room for
  const SummedGradient<T> to_input_, to_weight_;
  const Stored<T> to_bias_;

 public:
  const Upstream<T> upstream;

 private:
  // Of the chunk's rows and of the panel's tokens, columns for products: [slivers][rows or tokens][cols].
  const Room<T> row_slivers_, token_slivers_;
  const Room<T> logits_;
  const Scratch<T> bias_sums_;
};

// With gradients that came from elsewhere: logits are formed again. Tensors: gradients of the three outputs of forward,
// its inputs and outputs, and the gradients of input, linear_weight and linear_bias.
template <class T>
void backward(const Call& call) {
  const Problem<T> p(call, 3, call.scalars[0], call.scalars[1], call.scalars[2]);
  const RowScalars<T> grad_others = row_scalars<T>(call[0]), grad_positive = row_scalars<T>(call[1]),
                      grad_totals = row_scalars<T>(call[2]), others = row_scalars<T>(call[8]),
                      positive = row_scalars<T>(call[9]);
  const bool sums_logits = call.scalars[3] != 0;
  Chunk<T> chunk(p, kMostRows);
  const Gradients<T, TileShape<T>::block_cols> gradients(p, chunk, false, call[11], call[12], call[13]);
  p.with_tokens([&](const auto& tokens) {
    for (int64_t panel = 0; panel < p.tokens; panel += p.panel_tokens()) {
      for (int64_t c = 0; c < chunk.chunks(); ++c) {
        if (panel == 0 || chunk.chunks() > 1) {
          chunk.take(c);
          for (int64_t i = 0; i < chunk.count; ++i) {
            const int64_t r = chunk.row(i);
            gradients.upstream.set(
                i, {grad_others.get(r, 0), grad_positive.get(r, 0), sums_logits ? grad_totals.get(r, 0) : T(0),
                    others.get(r, 0), positive.get(r, 0)});
          }
          gradients.take_rows();
        }
        gradients.differentiate(tokens, panel);
      }
      gradients.finish_tokens(panel, smaller(p.panel_tokens(), p.tokens - panel));
    }
  });
  gradients.finish_rows();
}

}  // namespace vocabulary
}  // namespace MMKERN_ISA
}  // namespace mmkern
