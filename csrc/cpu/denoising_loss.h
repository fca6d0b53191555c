// The squared error of each sample, and its gradient: masked_squared_error of mmkern/reference/diffusion.py.
#pragma once

#include "elementwise.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace denoising_loss {

// The call with all tensors on the axes of tensor `lead`, and as few of those as may be; the sums of the samples, at
// `sums`, move along the first axis alone.
inline Call on_axes_of(const Call& call, int lead, int sums) {
  Call aligned = call;
  for (int axis = 1; axis < call[lead].rank; ++axis) aligned.tensors[sums].sizes[axis] = 1;
  if (call[lead].rank > 1) aligned.tensors[sums].strides[0] = 1;  // so that no piece has parts of two samples
  return with_fewest_axes(aligned, lead);
}

// Scalar: for (i < n) { d = pred[i] - target[i]; sum += mask[i] * d * d; }
template <class T>
class Error {
  using V = typename Elements<T>::V;
  using Place = typename Elements<T>::Place;

 public:
  // `first` is the place of pred in the call; target and mask come next.
  Error(const Call& call, int first, int64_t row) : elements_(call, first, row), first_(first) {}

  void operator++() { ++elements_; }

  double sum_of_squares(int64_t begin, int64_t end) const {
    double total = 0;
    V sums(T(0));
    Elements<T>::each(begin, end, [&](Place at) __attribute__((always_inline)) {
      const V d = difference(at), term = masked(at, d * d);
      if (at.n == V::size)
        sums += term;
      else
        for (int lane = 0; lane < at.n; ++lane) total += double(term[lane]);
    });
    return total + double(sum(sums));
  }

  // To the tensors after the mask: the gradients of pred and target; tensor 0 has those of the sums.
  template <bool kStream>
  void write_gradients(int64_t begin, int64_t end) const {
    const V slope(T(2) * *elements_.numbers(0));
    Elements<T>::each(begin, end, [&](Place at) __attribute__((always_inline)) {
      const V gradient = masked(at, slope * difference(at));
      if (elements_.has(first_ + 3)) elements_.template store<kStream>(first_ + 3, at, gradient);
      if (elements_.has(first_ + 4)) elements_.template store<kStream>(first_ + 4, at, -gradient);
    });
  }

 private:
  MMKERN_FN V difference(Place at) const { return elements_.load(first_, at) - elements_.load(first_ + 1, at); }
  MMKERN_FN V masked(Place at, V v) const { return elements_.has(first_ + 2) ? elements_.load(first_ + 2, at) * v : v; }

  Elements<T> elements_;
  const int first_;
};

// Tensors: pred, target, mask, the sums.
template <class T>
void forward(const Call& given) {
  const View &x = given[0], &out = given[3];
  const int64_t samples = out.sizes[0];
  T* const sums = static_cast<T*>(out.data);
  for (int64_t b = 0; b < samples; ++b) sums[b] = 0;
  if (count(x, x.rank) == 0) return;
  const Call call = on_axes_of(given, 0, 3);
  const Pieces pieces(call[0]);
  const Scratch<double> found(pieces.count());
  pieces.for_each(
      given.threads, [&](int64_t row) { return Error<T>(call, 0, row); },
      [&](const Error<T>& error, int64_t piece) {
        found.data[piece] = error.sum_of_squares(pieces.begin(piece), pieces.end(piece));
      });
  const int64_t each = pieces.count() / samples;
  for (int64_t b = 0; b < samples; ++b) {
    double sum = 0;
    for (int64_t piece = b * each; piece < (b + 1) * each; ++piece) sum += found.data[piece];
    sums[b] = T(sum);
  }
}

// Tensors: the gradients of the sums, pred, target, mask, the gradients of pred and target.
template <class T>
void backward(const Call& given) {
  if (count(given[1], given[1].rank) == 0) return;
  const Call call = on_axes_of(given, 1, 0);
  const Pieces pieces(call[1]);
  const bool stream = streams(without_gaps(call[4]), without_gaps(call[5]));
  pieces.for_each(
      given.threads, [&](int64_t row) { return Error<T>(call, 1, row); },
      [&](const Error<T>& error, int64_t piece) {
        const int64_t begin = pieces.begin(piece), end = pieces.end(piece);
        stream ? error.template write_gradients<true>(begin, end) : error.template write_gradients<false>(begin, end);
      });
}

inline void error(const Call& call) { call[0].dtype == Dtype::float64 ? forward<double>(call) : forward<float>(call); }
inline void error_backward(const Call& call) {
  call[1].dtype == Dtype::float64 ? backward<double>(call) : backward<float>(call);
}

}  // namespace denoising_loss
}  // namespace MMKERN_ISA
}  // namespace mmkern
