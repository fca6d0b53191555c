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
  merge_axes(aligned, lead);
  return aligned;
}

// Scalar: for (i < n) { d = pred[i] - target[i]; sum += mask[i] * d * d; }
template <class T>
class Error {
  using Stretch = typename Elements<T>::Stretch;

 public:
  // `first` is the place of pred in the call; target and mask come next.
  Error(const Call& call, int first, int64_t row) : elements_(call, first, row, first + 5), first_(first) {}

  void operator++() { ++elements_; }

  double sum_of_squares(int64_t begin, int64_t end) const {
    double total = 0;
    elements_.for_each_stretch(begin, end, [&](Stretch s) {
      const auto [pred, target, mask] = read(s);
      const auto sum = reduce_row<T, 1>(s.n, [=](auto at, Vec<T>* acc) __attribute__((always_inline)) {
        const Vec<T> d = at.load(pred) - at.load(target);
        acc[0] = mask ? fma(at.load(mask) * d, d, acc[0]) : fma(d, d, acc[0]);
      });
      total += double(sum.total(0));
    });
    return total;
  }

  // To the tensors after the mask: the gradients of pred and target; tensor 0 has those of the sums.
  void write_gradients(int64_t begin, int64_t end, bool stream) const {
    const Vec<T> slope(T(2) * *elements_.numbers(0));
    elements_.for_each_stretch(begin, end, [&](Stretch s) {
      const auto [pred, target, mask] = read(s);
      T* const to[2] = {elements_.place(first_ + 3, s), elements_.place(first_ + 4, s)};
      const bool final = !elements_.is_room(first_ + 3, to[0]) && !elements_.is_room(first_ + 4, to[1]);
      for_each_vec<T>(s.n, stream && final,
                      [=, to_pred = to[0], to_target = to[1]](auto at) __attribute__((always_inline)) {
                        Vec<T> gradient = slope * (at.load(pred) - at.load(target));
                        if (mask) gradient = at.load(mask) * gradient;
                        if (to_pred) at.store(to_pred, gradient);
                        if (to_target) at.store(to_target, -gradient);
                      });
      for (int k = 0; k < 2; ++k) elements_.finish(first_ + 3 + k, s, to[k], stream);
    });
  }

 private:
  struct Sources {
    const T *pred, *target, *mask;
  };
  Sources read(Stretch s) const {
    return {elements_.read(first_, s), elements_.read(first_ + 1, s), elements_.read(first_ + 2, s)};
  }

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
  const bool stream = streams(bytes_of(call), call[4], call[5]);
  pieces.for_each(
      given.threads, [&](int64_t row) { return Error<T>(call, 1, row); },
      [&](const Error<T>& error, int64_t piece) {
        error.write_gradients(pieces.begin(piece), pieces.end(piece), stream);
      });
}

inline void error(const Call& call) { call[0].dtype == Dtype::float64 ? forward<double>(call) : forward<float>(call); }
inline void error_backward(const Call& call) {
  call[1].dtype == Dtype::float64 ? backward<double>(call) : backward<float>(call);
}

}  // namespace denoising_loss
}  // namespace MMKERN_ISA
}  // namespace mmkern
