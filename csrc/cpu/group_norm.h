// Group norm with its modulation, then an activation: group_norm_act of mmkern/reference/group_norm.py.
//   n = (x - mean) / sqrt(var + eps) in each group of a sample;  z = n f + p with f = w (1 + s), p = b (1 + s) + h of
//   each channel;  y = act(z)
//
// Backward, with u = y' act'(z), and U = sum u and N = sum u n of each channel of a sample:
//   x' = (f u - mean(f u) - n mean(f u n)) / sqrt(var + eps), the means those of the group
//   h' = U;  s' = w N + b U;  b' = sum (1 + s) U and w' = sum (1 + s) N over the samples
#pragma once

#include "elementwise.h"

#include "../activations.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace group_norm {

template <class T>
using V = typename Elements<T>::V;
template <class T>
using Place = typename Elements<T>::Place;

// The channels of one group of a sample.
template <class T>
struct Channels {
  const T *weight, *bias, *scale, *shift;  // null for ones and zeros

  T factor(int64_t c) const { return scale ? T(1) + scale[c] : T(1); }
  T times(int64_t c) const { return weight ? weight[c] * factor(c) : factor(c); }
  T plus(int64_t c) const { return (bias ? bias[c] * factor(c) : T(0)) + (shift ? shift[c] : T(0)); }
};

// One group of a tensor [samples, groups, channels, positions].
template <class T>
struct Group {
  Stored<T> data;
  int64_t channels, positions, stride;

  Group(const View& x, int64_t i)
      : data(Stored<T>(x) + (i / x.sizes[1] * x.strides[0] + i % x.sizes[1] * x.strides[1])),
        channels(x.sizes[2]),
        positions(x.sizes[3]),
        stride(x.strides[2]) {}

  Stored<T> channel(int64_t c) const { return data + c * stride; }
  double size() const { return double(channels * positions); }
};

template <class T>
MMKERN_FN V<T> load(Stored<T> from, Place<T> at) {
  V<T> v;
  from.here_with([&](const auto* numbers) __attribute__((always_inline)) { v = at.fetch(numbers); });
  return v;
}
template <bool kStream, class T>
MMKERN_FN void store(Stored<T> to, Place<T> at, V<T> v) {
  to.here_with([&](auto* numbers) __attribute__((always_inline)) { at.template store<kStream>(numbers, v); });
}

// Of a group: n = (x - mean) scale - rest. The rest is of what the rounding of the mean left.
template <class T>
struct Moments {
  T mean, scale, rest;

  // Scalar: two passes, of which `total` is the first's; for (i < size) sum += (x[i] - mean) * (x[i] - mean);
  Moments(const Group<T>& x, double total, T eps) : mean(T(total / x.size())) {
    double sum_of_rests = 0, squares = 0;
    for (int64_t c = 0; c < x.channels; ++c) {
      const Stored<T> from = x.channel(c);
      V<T> sums[2] = {V<T>(T(0)), V<T>(T(0))};
      Elements<T>::each(0, x.positions, [&](Place<T> at) __attribute__((always_inline)) {
        V<T> d = load(from, at) - V<T>(mean);
        if (at.n < V<T>::size) d = first_of(d, at.n);
        sums[0] += d;
        sums[1] = fma(d, d, sums[1]);
      });
      sum_of_rests += double(sum(sums[0]));
      squares += double(sum(sums[1]));
    }
    const double left = sum_of_rests / x.size(), variance = squares / x.size() - left * left;
    const double by = 1 / __builtin_sqrt((variance < 0 ? 0 : variance) + double(eps));
    scale = T(by);
    rest = T(left * by);
  }

  static MMKERN_FN V<T> first_of(V<T> v, int n) {
    T kept[V<T>::size];
    v.store(kept, n);
    return V<T>::load(kept, n);
  }
};

template <class T>
double sum_of(Stored<T> from, int64_t n) {
  V<T> total(T(0));
  Elements<T>::each(0, n, [&](Place<T> at) __attribute__((always_inline)) { total += load(from, at); });
  return double(sum(total));
}
template <class T>
double sum_of(const Group<T>& x) {
  double total = 0;
  for (int64_t c = 0; c < x.channels; ++c) total += sum_of(x.channel(c), x.positions);
  return total;
}

template <class T>
struct Problem {
  const View &x, &weight, &bias, &scale, &shift;
  T eps;

  // Tensors: x, weight, bias, scale, shift, from `at` on. Scalar: eps.
  Problem(const Call& call, int at)
      : x(call[at]),
        weight(call[at + 1]),
        bias(call[at + 2]),
        scale(call[at + 3]),
        shift(call[at + 4]),
        eps(T(call.scalars[0])) {}

  int64_t groups() const { return x.sizes[0] * x.sizes[1]; }
  Channels<T> channels(int64_t i) const {
    return {of_group(weight, i), of_group(bias, i), of_group(scale, i), of_group(shift, i)};
  }
  // Of [groups, channels], or with an axis of samples before them.
  T* of_group(const View& view, int64_t i) const {
    if (!view) return nullptr;
    const int axis = view.rank - 2;
    const int64_t of_sample = axis ? i / x.sizes[1] * view.strides[0] : 0;
    return static_cast<T*>(view.data) + of_sample + i % x.sizes[1] * view.strides[axis];
  }
};

// Scalar: for (i < n) { to[i] = act((x[i] - mean) * by + plus); total += next[i]; }
// The loads of what is read next fill the time of the stores.
template <class Act, bool kStream, class T>
double write_channel(Stored<T> x, Stored<T> to, Stored<T> next, int64_t n, T mean, T by, T plus) {
  V<T> total(T(0));
  Elements<T>::each(0, n, [&](Place<T> at) __attribute__((always_inline)) {
    const V<T> d = load(x, at) - V<T>(mean);
    total += load(next, at);
    store<kStream>(to, at, Act::at(fma(d, V<T>(by), V<T>(plus))).value);
  });
  return double(sum(total));
}

// Tensors: the problem's, out. A group is read from memory once, while the one before it is written.
template <class T, class Act, bool kStream>
void write_groups(const Call& call, const Problem<T>& p) {
  const int64_t size = p.x.sizes[2] * p.x.sizes[3];
  parallel_rows(p.groups(), 16 * size, call.threads, [&](int64_t begin, int64_t end) {
    double total = sum_of(Group<T>(p.x, begin));
    for (int64_t i = begin; i < end; ++i) {
      const Group<T> x(p.x, i), to(call[5], i), next(p.x, i + 1 < end ? i + 1 : i);
      const Moments<T> of(x, total, p.eps);
      const Channels<T> channels = p.channels(i);
      total = 0;
      for (int64_t c = 0; c < x.channels; ++c) {
        const T times = channels.times(c);
        total += write_channel<Act, kStream>(x.channel(c), to.channel(c), next.channel(c), x.positions, of.mean,
                                             of.scale * times, channels.plus(c) - of.rest * times);
      }
    }
    store_fence();
  });
}

// Tensors: the gradient of y, the problem's, and the gradients of these; null where they are not wanted.
template <class T, class Act>
class Backward {
 public:
  Backward(const Call& call)
      : call_(call), p_(call, 1), channels_(p_.x.sizes[2]), sums_(2 * p_.groups() * p_.x.sizes[2]) {}

  void run() const {
    parallel_rows(p_.groups(), 40 * channels_ * p_.x.sizes[3], call_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) differentiate(i);
    });
    if (call_[kToWeight] || call_[kToBias]) add_up_samples();
  }

 private:
  enum { kGrad, kToX = 6, kToWeight, kToBias, kToScale, kToShift };

  // A channel in the making of its gradients: n, and u = y' act'(n times + plus).
  struct Slopes {
    Stored<T> x, grad;
    V<T> mean, scale, rest, times, plus;

    Slopes(const Group<T>& of_x, const Group<T>& of_grad, const Moments<T>& of, const Channels<T>& channels, int64_t c)
        : x(of_x.channel(c)),
          grad(of_grad.channel(c)),
          mean(of.mean),
          scale(of.scale),
          rest(of.rest),
          times(channels.times(c)),
          plus(channels.plus(c)) {}

    MMKERN_FN V<T> normal(Place<T> at) const { return fma(load(x, at) - mean, scale, -rest); }
    MMKERN_FN V<T> slope(Place<T> at, V<T> n) const { return load(grad, at) * Act::at(fma(n, times, plus)).slope; }
  };

  void differentiate(int64_t i) const {
    const Group<T> x(p_.x, i), grad(call_[kGrad], i);
    const Moments<T> of(x, sum_of(x), p_.eps);
    const Channels<T> channels = p_.channels(i);
    T *const of_u = sums_.data + 2 * i * channels_, *const of_un = of_u + channels_;
    double centre = 0, along = 0;
    for (int64_t c = 0; c < channels_; ++c) {
      const Slopes slopes(x, grad, of, channels, c);
      V<T> sums[2] = {V<T>(T(0)), V<T>(T(0))};
      Elements<T>::each(0, x.positions, [&](Place<T> at) __attribute__((always_inline)) {
        const V<T> n = slopes.normal(at), u = slopes.slope(at, n);
        sums[0] += u;
        sums[1] = fma(u, n, sums[1]);
      });
      of_u[c] = sum(sums[0]);
      of_un[c] = sum(sums[1]);
      centre += double(channels.times(c)) * double(of_u[c]);
      along += double(channels.times(c)) * double(of_un[c]);
    }
    write_modulators(i, channels, of_u, of_un);
    if (!call_[kToX]) return;
    const Group<T> to(call_[kToX], i);
    const V<T> mean_u(T(centre / x.size())), mean_un(T(along / x.size()));
    for (int64_t c = 0; c < channels_; ++c) {
      const Slopes slopes(x, grad, of, channels, c);
      const Stored<T> to_channel = to.channel(c);
      Elements<T>::each(0, x.positions, [&](Place<T> at) __attribute__((always_inline)) {
        const V<T> n = slopes.normal(at);
        const V<T> d = slopes.times * slopes.slope(at, n) - mean_u - n * mean_un;
        store<false>(to_channel, at, slopes.scale * d);
      });
    }
  }

  void write_modulators(int64_t i, const Channels<T>& channels, const T* of_u, const T* of_un) const {
    T *const to_scale = p_.of_group(call_[kToScale], i), *const to_shift = p_.of_group(call_[kToShift], i);
    for (int64_t c = 0; c < channels_; ++c) {
      const T weight = channels.weight ? channels.weight[c] : T(1), bias = channels.bias ? channels.bias[c] : T(0);
      if (to_scale) to_scale[c] = weight * of_un[c] + bias * of_u[c];
      if (to_shift) to_shift[c] = of_u[c];
    }
  }

  void add_up_samples() const {
    const int64_t groups = p_.x.sizes[1];
    for (int64_t g = 0; g < groups; ++g) {
      T *const to_bias = p_.of_group(call_[kToBias], g), *const to_weight = p_.of_group(call_[kToWeight], g);
      for (int64_t c = 0; c < channels_; ++c) {
        double u = 0, un = 0;
        for (int64_t i = g; i < p_.groups(); i += groups) {
          const double factor = double(p_.channels(i).factor(c));
          u += factor * double(sums_.data[2 * i * channels_ + c]);
          un += factor * double(sums_.data[(2 * i + 1) * channels_ + c]);
        }
        if (to_bias) to_bias[c] = T(u);
        if (to_weight) to_weight[c] = T(un);
      }
    }
  }

  const Call& call_;
  const Problem<T> p_;
  const int64_t channels_;
  const Scratch<T> sums_;  // [samples, groups, 2, channels]: U and N
};

// Tensors: the problem's, out. Scalars: eps, the activation.
template <class T>
void write_all(const Call& call) {
  const View& out = call[5];
  const Rows<char> rows{static_cast<char*>(out.data), count(out, 3), out.sizes[3] * bytes_of(out.dtype),
                        out.strides[2] * bytes_of(out.dtype)};
  const bool stream = is_dense(out) && streams(rows);
  const Problem<T> p(call, 0);
  activation::with(int(call.scalars[1]), [&](auto act) {
    using Act = decltype(act);
    stream ? write_groups<T, Act, true>(call, p) : write_groups<T, Act, false>(call, p);
  });
}
template <class T>
void differentiate_all(const Call& call) {
  activation::with(int(call.scalars[1]), [&](auto act) { Backward<T, decltype(act)>(call).run(); });
}

inline void forward(const Call& call) {
  call[0].dtype == Dtype::float64 ? write_all<double>(call) : write_all<float>(call);
}
inline void backward(const Call& call) {
  call[0].dtype == Dtype::float64 ? differentiate_all<double>(call) : differentiate_all<float>(call);
}

}  // namespace group_norm
}  // namespace MMKERN_ISA
}  // namespace mmkern
