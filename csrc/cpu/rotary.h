// Rotary embeddings, with or without the root-mean-square norm before them: y = s x w with s = 1/sqrt(mean(x^2) + eps),
// out = (a c - b s, a s + b c) for each pair (a, b) of y.
//
// Backward: y' is g turned back;  w' = sum over rows of y' s x;  with n = s x and n' = y' w
//           x' = s (n' - n mean(n' n))
//
// All of it works on rows that hold the first of each pair, then the second of each, then the channels that pass.
// Interleaved rows are brought into that order in a buffer, and back.
#pragma once

#include "grid_rows.h"
#include "row_ops.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace rotary {

constexpr int64_t kBlockRows = 64;  // whose gradients of the weight are added up in one piece

// Tensors: x, weight, cos, sin, from `at` on in the call. Scalars: eps, normalize, interleaved.
template <class T>
struct Problem {
  const View &x, &weight, &cos, &sin;
  int leading;
  int64_t rows, cols, pairs;
  T eps;
  bool normalize, interleaved;

  Problem(const Call& call, int at)
      : x(call[at]),
        weight(call[at + 1]),
        cos(call[at + 2]),
        sin(call[at + 3]),
        leading(x.rank - 1),
        rows(count(x, leading)),
        cols(x.sizes[leading]),
        pairs(cos.sizes[leading]),
        eps(T(call.scalars[0])),
        normalize(call.scalars[1] != 0),
        interleaved(call.scalars[2] != 0) {}

  // Scalar: for (i < pairs) to[i] = from[2 i], to[pairs + i] = from[2 i + 1];  the rest as it is
  void split(const T* from, T* to) const {
    for (int64_t i = 0; i < pairs; ++i) {
      to[i] = from[2 * i];
      to[pairs + i] = from[2 * i + 1];
    }
    for (int64_t i = 2 * pairs; i < cols; ++i) to[i] = from[i];
  }
  void join(const T* from, T* to) const {
    for (int64_t i = 0; i < pairs; ++i) {
      to[2 * i] = from[i];
      to[2 * i + 1] = from[pairs + i];
    }
    for (int64_t i = 2 * pairs; i < cols; ++i) to[i] = from[i];
  }

  // The weight in the order of the pairs; ones where there is none.
  void read_weight(T* to) const {
    const T* const from = static_cast<const T*>(weight.data);
    if (from && interleaved) return split(from, to);
    for (int64_t i = 0; i < cols; ++i) to[i] = from ? from[i] : T(1);
  }

  // f(row), in the order of the pairs.
  template <class S, class F>
  void in_order(const S* row, T* buffer, T* ordered, F f) const {
    if (!interleaved) return f(row);
    for_each_vec<T>(cols, [&](auto at) { at.store(buffer, at.load(row)); });
    split(buffer, ordered);
    f(static_cast<const T*>(ordered));
  }
  // f(to), which it fills in the order of the pairs.
  template <class S, class F>
  void from_order(S* row, T* buffer, T* ordered, F f) const {
    if (!interleaved) return f(row);
    f(ordered);
    join(ordered, buffer);
    for_each_vec<T>(cols, [&](auto at) { at.store(row, at.load(buffer)); });
  }

  // y scaled and turned; `direction` is 1, or -1 to turn back. `to` may be `from`.
  template <class From, class To>
  void turn(const From* from, To* to, T scale, const T* w, const T* c, const T* s, T direction) const {
    const Vec<T> by(scale), sign(direction);
    for_each_vec<T>(pairs, [&](auto at) {
      const Vec<T> a = at.load(from) * (by * at.load(w)), b = at.load(from + pairs) * (by * at.load(w + pairs));
      const Vec<T> co = at.load(c), si = sign * at.load(s);
      at.store(to, fma(a, co, -(b * si)));
      at.store(to + pairs, fma(a, si, b * co));
    });
    const int64_t passed = 2 * pairs;
    for_each_vec<T>(cols - passed,
                    [&](auto at) { at.store(to + passed, at.load(from + passed) * (by * at.load(w + passed))); });
  }

  template <class S>
  T scale(const S* row) const {
    if (!normalize) return T(1);
    return (Vec<T>(T(1)) / sqrt(Vec<T>(squared_norm<T>(row, cols) / T(cols) + eps)))[0];
  }
};

// Tensors: x, weight, cos, sin, out.
template <class S>
void rotate_rows(const Call& call) {
  using T = accumulate_t<S>;
  const Problem<T> p(call, 0);
  Scratch<T> weight(p.cols);
  p.read_weight(weight.data);
  parallel_rows(p.rows, 6 * p.cols, call.threads, [&](int64_t begin, int64_t end) {
    Scratch<T> buffer(p.cols), ordered(p.cols);
    GridRows<const S> x(p.x, p.leading, begin);
    GridRows<const T> cos(p.cos, p.leading, begin), sin(p.sin, p.leading, begin);
    GridRows<S> out(call[4], p.leading, begin);
    for (int64_t row = begin; row < end; ++row, ++x, ++cos, ++sin, ++out) {
      const T scale = p.scale(*x);
      p.in_order(*x, buffer.data, ordered.data, [&](const auto* from) {
        p.from_order(*out, buffer.data, ordered.data,
                     [&](auto* to) { p.turn(from, to, scale, weight.data, *cos, *sin, T(1)); });
      });
    }
  });
}

// Adds the rows of `partials` [blocks, cols] in order.
template <class T>
void add_partials(const Problem<T>& p, int64_t blocks, const T* partials, T* total) {
  Scratch<double> sums(p.cols);
  Scratch<T> ordered(p.cols);
  for (int64_t i = 0; i < p.cols; ++i) sums.data[i] = 0;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < p.cols; ++i) sums.data[i] += partials[b * p.cols + i];
  T* const to = p.interleaved ? ordered.data : total;
  for (int64_t i = 0; i < p.cols; ++i) to[i] = T(sums.data[i]);
  if (p.interleaved) p.join(to, total);
}

// Tensors: grad, x, weight, cos, sin, grad_x, grad_weight.
template <class S>
void rotate_rows_backward(const Call& call) {
  using T = accumulate_t<S>;
  const Problem<T> p(call, 1);
  const View &x_to = call[5], &weight_to = call[6];
  const int64_t blocks = (p.rows + kBlockRows - 1) / kBlockRows;
  Scratch<T> weight(p.cols), ones(p.cols), partials(weight_to ? blocks * p.cols : 0);
  p.read_weight(weight.data);
  for (int64_t i = 0; i < p.cols; ++i) ones.data[i] = 1;
  parallel_rows(blocks, 12 * p.cols * kBlockRows, call.threads, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlockRows, last = end * kBlockRows < p.rows ? end * kBlockRows : p.rows;
    Scratch<T> buffer(p.cols), ordered(p.cols), turned(p.cols);
    GridRows<const S> grad(call[0], p.leading, first), x(p.x, p.leading, first);
    GridRows<const T> cos(p.cos, p.leading, first), sin(p.sin, p.leading, first);
    GridRows<S> to_rows(x_to, p.leading, first);
    const T *const w = weight.data, *const y = turned.data;
    for (int64_t row = first; row < last; ++row, ++grad, ++x, ++cos, ++sin, ++to_rows) {
      p.in_order(*grad, buffer.data, turned.data,
                 [&](const auto* from) { p.turn(from, turned.data, T(1), ones.data, *cos, *sin, T(-1)); });
      const T scale = p.scale(*x);
      p.in_order(*x, buffer.data, ordered.data, [&](const auto* from) {
        if (weight_to) {
          T* const sums = partials.data + row / kBlockRows * p.cols;
          const Vec<T> by(scale);
          if (row % kBlockRows == 0)
            for (int64_t i = 0; i < p.cols; ++i) sums[i] = 0;
          for_each_vec<T>(p.cols, [&](auto at) { at.store(sums, fma(at.load(y), by * at.load(from), at.load(sums))); });
        }
        if (!x_to) return;
        T along = 0;  // mean(n' n)
        if (p.normalize) {
          const auto sums = reduce_row<T, 1>(
              p.cols, [&](auto at, Vec<T>* acc) { acc[0] = fma(at.load(y) * at.load(w), at.load(from), acc[0]); });
          along = sums.total(0) * (scale / T(p.cols));
        }
        p.from_order(*to_rows, buffer.data, ordered.data, [&](auto* to) {
          const Vec<T> by(scale), mean(along);
          for_each_vec<T>(p.cols, [&](auto at) {
            const Vec<T> slope = at.load(y) * at.load(w);
            at.store(to, p.normalize ? by * (slope - by * at.load(from) * mean) : slope);
          });
        });
      });
    }
  });
  if (weight_to) add_partials(p, blocks, partials.data, static_cast<T*>(weight_to.data));
}

inline void forward(const Call& call) {
  with_storage(call[0].dtype, [&](auto s) { rotate_rows<typename decltype(s)::type>(in_memory_order(call, 0)); });
}
inline void backward(const Call& call) {
  with_storage(call[0].dtype,
               [&](auto s) { rotate_rows_backward<typename decltype(s)::type>(in_memory_order(call, 1)); });
}

}  // namespace rotary
}  // namespace MMKERN_ISA
}  // namespace mmkern
