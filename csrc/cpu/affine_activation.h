// y = act((offset + scale) x + shift), and its gradient: affine_activation of mmkern/reference/gated.py.
#pragma once

#include "elementwise.h"
#include "row_runs.h"

#include "../activations.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace affine_activation {

// Of a call, forward up to kY; then what the backward has instead.
enum { kX, kScale, kShift, kY, kGrad = kY, kToX, kToScale, kToShift, kTensors };

// Whether each element of x has its own.
inline bool is_whole(const View& view, const View& x) {
  bool whole = bool(view);
  for (int axis = 0; whole && axis < x.rank; ++axis) whole = view.sizes[axis] == x.sizes[axis];
  return whole;
}

// Scale or shift: that of which several elements share one, where there is such. If both are, they come in one shape.
inline int shared_one(const Call& call) {
  if (call[kScale] && !is_whole(call[kScale], call[kX])) return kScale;
  return call[kShift] && !is_whole(call[kShift], call[kX]) ? kShift : kX;
}

// The call with as few axes as may be. Those that the shared one has move outwards, so that the rows which share a row
// of it are neighbours.
inline Call with_runs(const Call& call) {
  const View &x = call[kX], &one = call[shared_one(call)];
  Call ordered = call;
  int place = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int axis = 0; axis < x.rank - 1; ++axis) {
      if ((one.sizes[axis] == 1) != (pass == 1)) continue;
      for (int t = 0; t < kTensors; ++t) {
        ordered.tensors[t].sizes[place] = call[t].sizes[axis];
        ordered.tensors[t].strides[place] = call[t].strides[axis];
      }
      ++place;
    }
  }
  merge_axes(ordered, kX);
  return ordered;
}

template <class T, class Act>
class Row {
 public:
  using V = typename Elements<T>::V;
  using Place = typename Elements<T>::Place;
  using Stretch = typename Elements<T>::Stretch;

  Row(const Call& call, T offset, int64_t row) : elements_(call, kX, row, kTensors), offset_(offset) {
    for (int k = 0; k < 2; ++k) whole_[k] = is_whole(call, k);
  }

  void operator++() { ++elements_; }

  // Scalar: for (i = begin; i < end; ++i) y[i] = act((offset + scale[i]) * x[i] + shift[i]);
  void write(int64_t begin, int64_t end, bool stream) const {
    elements_.for_each_stretch(begin, end, [&](Stretch s) {
      const Argument u(*this, s);
      T* const to = elements_.place(kY, s);
      elements_.each_to(kY, to, s.n, stream, [=](auto at) __attribute__((always_inline)) {
        at.store(to, Act::at(u.at(at, at.load(u.x))).value);
      });
      elements_.finish(kY, s, to, stream);
    });
  }

  // The gradients of what has one for each element; f(at, k, terms) is told the others', of scale and of shift.
  template <class F>
  void differentiate(int64_t begin, int64_t end, F f) const {
    elements_.for_each_stretch(begin, end, [&](Stretch s) {
      const Argument u(*this, s);
      const T* const grad = elements_.read(kGrad, s);
      T* const to_x = elements_.place(kToX, s);
      T* to[2] = {};
      bool shares[2] = {};
      for (int k = 0; k < 2; ++k) {
        if (whole_[k]) to[k] = elements_.place(kToScale + k, s);
        shares[k] = !whole_[k] && elements_.has(kToScale + k);
      }
      Elements<T>::each(0, s.n, [=](Place at) __attribute__((always_inline)) {
        const V x = at.load(u.x), slope = at.load(grad) * Act::at(u.at(at, x)).slope;
        if (to_x) at.store(to_x, slope * u.factor(at));
        const V terms[2] = {slope * x, slope};
        for (int k = 0; k < 2; ++k) {
          if (to[k]) at.store(to[k], terms[k]);
          if (shares[k]) f(Place{s.begin + at.i, at.n}, k, terms[k]);
        }
      });
      elements_.finish(kToX, s, to_x, false);
      for (int k = 0; k < 2; ++k)
        if (to[k]) elements_.finish(kToScale + k, s, to[k], false);
    });
  }
  // Those of the row of scale and of shift that is shared here: `width` numbers each.
  void write_sums(const double* sums, int64_t width) const {
    for (int k = 0; k < 2; ++k) {
      T* const to = whole_[k] ? nullptr : const_cast<T*>(elements_.numbers(kToScale + k));
      for (int64_t i = 0; to && i < width; ++i) to[i] = T(sums[k * width + i]);
    }
  }

 private:
  // (offset + scale) x + shift in a stretch.
  struct Argument {
    const T *x, *scale, *shift;
    V offset;

    Argument(const Row& row, Stretch s)
        : x(row.elements_.read(kX, s)),
          scale(row.elements_.read(kScale, s)),
          shift(row.elements_.read(kShift, s)),
          offset(row.offset_) {}

    template <class P>
    MMKERN_FN V factor(P at) const {
      return scale ? offset + at.load(scale) : offset;
    }
    template <class P>
    MMKERN_FN V at(P i, V of) const {
      return shift ? fma(factor(i), of, i.load(shift)) : factor(i) * of;
    }
  };

  // A whole one moves along every axis that x has.
  static bool is_whole(const Call& call, int k) {
    const View& view = call[kToScale + k];
    bool whole = bool(view);
    for (int axis = 0; whole && axis < view.rank; ++axis) whole = view.strides[axis] != 0 || view.sizes[axis] == 1;
    return whole;
  }

  Elements<T> elements_;
  const T offset_;
  bool whole_[2];
};

template <class T, class Act>
void write_all(const Call& call, T offset, int threads) {
  const Pieces pieces(call[kX]);
  const bool stream = streams(bytes_of(call), call[kY]);
  pieces.for_each(
      threads, [&](int64_t row) { return Row<T, Act>(call, offset, row); },
      [&](const Row<T, Act>& row, int64_t piece) { row.write(pieces.begin(piece), pieces.end(piece), stream); });
}

// Rows, `run` neighbours of them, share one number; or none is shared.
template <class T, class Act>
void differentiate_rows(const Call& call, int64_t run, T offset, int threads) {
  using R = Row<T, Act>;
  using V = typename R::V;
  const Pieces pieces(call[kX]);
  const Scratch<double> found(2 * pieces.count());
  pieces.for_each(
      threads, [&](int64_t row) { return R(call, offset, row); },
      [&](const R& row, int64_t piece) {
        V sums[2] = {V(T(0)), V(T(0))};
        double* const to = found.data + 2 * piece;
        to[0] = to[1] = 0;
        row.differentiate(pieces.begin(piece), pieces.end(piece),
                          [&](typename R::Place at, int k, V terms) __attribute__((always_inline)) {
                            if (at.n == V::size) sums[k] += terms;
                            for (int i = 0; at.n < V::size && i < at.n; ++i) to[k] += double(terms[i]);
                          });
        for (int k = 0; k < 2; ++k) to[k] += double(sum(sums[k]));
      });
  const int64_t rows = count(call[kX], call[kX].rank - 1), each = pieces.count() / rows * run;
  for (int64_t i = 0; i < rows / run; ++i) {
    double total[2] = {};
    for (int64_t piece = i * each; piece < (i + 1) * each; ++piece)
      for (int k = 0; k < 2; ++k) total[k] += found.data[2 * piece + k];
    R(call, offset, i * run).write_sums(total, 1);
  }
}

// Rows, `run` neighbours of them, share a row of numbers.
template <class T, class Act>
void differentiate_columns(const Call& call, int64_t run, T offset, int threads) {
  using R = Row<T, Act>;
  using V = typename R::V;
  const View& x = call[kX];
  const int64_t cols = x.sizes[x.rank - 1];
  const Blocks blocks(count(x, x.rank - 1), run);
  const Scratch<T> found(2 * cols * blocks.count());
  parallel_rows(blocks.count(), 12 * cols * blocks.most_rows(), threads, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      T* const sums = found.data + 2 * cols * block;
      for (int64_t i = 0; i < 2 * cols; ++i) sums[i] = 0;
      R row(call, offset, blocks.first(block));
      for (int64_t i = blocks.first(block); i < blocks.last(block); ++i, ++row) {
        row.differentiate(0, cols, [&](typename R::Place at, int k, V terms) __attribute__((always_inline)) {
          at.keep(sums + k * cols, at.load(sums + k * cols) + terms);
        });
      }
    }
  });
  blocks.for_each_run(run, found.data, 2 * cols,
                      [&](int64_t i, const double* total) { R(call, offset, i * run).write_sums(total, cols); });
}

template <class T, class Act>
void differentiate_all(const Call& given, T offset) {
  const Call call = with_runs(given);
  const View& one = call[shared_one(given)];
  const int last = one.rank - 1;
  int64_t run = 1;
  for (int axis = last - 1; axis >= 0 && one.strides[axis] == 0; --axis) run *= one.sizes[axis];
  if (one.strides[last] && run > 1)
    differentiate_columns<T, Act>(call, run, offset, given.threads);
  else
    differentiate_rows<T, Act>(call, run, offset, given.threads);
}

inline void fill_with_zeros(const View& view) {
  for (int64_t i = 0; view && i < count(view, view.rank); ++i) {
    if (view.dtype == Dtype::float64)
      static_cast<double*>(view.data)[i] = 0;
    else
      static_cast<float*>(view.data)[i] = 0;
  }
}

template <class T>
void from(const Call& given, bool backward) {
  if (count(given[kX], given[kX].rank) == 0) {
    fill_with_zeros(given[kToScale]);
    return fill_with_zeros(given[kToShift]);
  }
  const T offset = T(given.scalars[0]);
  activation::with(int(given.scalars[1]), [&](auto act) {
    using Act = decltype(act);
    if (backward) return differentiate_all<T, Act>(given, offset);
    Call merged = given;
    merge_axes(merged, kX);
    write_all<T, Act>(merged, offset, given.threads);
  });
}

// Tensors: x, scale, shift, y. Scalars: the offset, the activation.
inline void forward(const Call& call) {
  call[kX].dtype == Dtype::float64 ? from<double>(call, false) : from<float>(call, false);
}
// Tensors: the gradient of y, x, scale, shift, and the gradients of the last three.
inline void backward(const Call& given) {
  Call call = given;
  for (int i = 0; i < 3; ++i) call.tensors[i] = given[i + 1];
  call.tensors[kGrad] = given[0];
  call[kX].dtype == Dtype::float64 ? from<double>(call, true) : from<float>(call, true);
}

}  // namespace affine_activation
}  // namespace MMKERN_ISA
}  // namespace mmkern
