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
template <class T>
using Stretch = typename Elements<T>::Stretch;

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
  const T* numbers(int64_t c, Stretch<T> s, T* room) const { return (channel(c) + s.begin).numbers(s.n, room); }
  // f(channel, stretch)
  template <class F>
  void for_each_stretch(F f) const {
    for (int64_t c = 0; c < channels; ++c)
      Elements<T>::for_each_stretch(Elements<T>::kStretch, 0, positions, [&](Stretch<T> s) { f(c, s); });
  }
  double size() const { return double(channels * positions); }
};

// Room for a stretch of each, where it is not stored as T.
template <class T>
class Rooms {
 public:
  enum Name { kX, kNext, kGrad, kTo, kCount };
  T* operator[](Name name) const { return rooms_.data + name * Elements<T>::kStretch; }

 private:
  const Scratch<T> rooms_{kCount * Elements<T>::kStretch};
};

// Of a group: n = (x - mean) scale - rest. The rest is of what the rounding of the mean left.
template <class T>
struct Moments {
  T mean, scale, rest;

  // Scalar: two passes, of which `total` is the first's; for (i < size) sum += (x[i] - mean) * (x[i] - mean);
  Moments(const Group<T>& x, double total, T eps, const Rooms<T>& rooms) : mean(T(total / x.size())) {
    double sum_of_rests = 0, squares = 0;
    const Vec<T> centre(mean);
    x.for_each_stretch([&](int64_t c, Stretch<T> s) {
      const T* const from = x.numbers(c, s, rooms[Rooms<T>::kX]);
      const auto sums = reduce_row<T, 2>(s.n, [=](auto at, Vec<T>* acc) {
        const Vec<T> d = at.only(at.load(from) - centre);
        acc[0] += d;
        acc[1] = fma(d, d, acc[1]);
      });
      sum_of_rests += double(sums.total(0));
      squares += double(sums.total(1));
    });
    const double left = sum_of_rests / x.size(), variance = squares / x.size() - left * left;
    const double by = 1 / __builtin_sqrt((variance < 0 ? 0 : variance) + double(eps));
    scale = T(by);
    rest = T(left * by);
  }
};

template <class T>
double sum_of(const T* x, int64_t n) {
  // in the order of `write`
  const auto add = [=](Place<T> at, V<T> total) __attribute__((always_inline)) { return total + at.load(x); };
  return double(sum(Elements<T>::fold(n, add)));
}
template <class T>
double sum_of(const Group<T>& x, const Rooms<T>& rooms) {
  double total = 0;
  x.for_each_stretch([&](int64_t c, Stretch<T> s) { total += sum_of(x.numbers(c, s, rooms[Rooms<T>::kX]), s.n); });
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
double write(const T* x, T* to, const T* next, int64_t n, T mean, T by, T plus) {
  const V<T> centre(mean), times(by), shift(plus);
  const auto total = Elements<T>::template fold<kStream>(n, [=](auto at, V<T> sum) __attribute__((always_inline)) {
    at.store(to, Act::at(fma(at.load(x) - centre, times, shift)).value);
    return sum + at.template fetch<4096>(next);
  });
  return double(sum(total));
}

// Tensors: the problem's, out. A group is read from memory once, while the one before it is written.
template <class T, class Act>
void write_groups(const Call& call, const Problem<T>& p, bool stream) {
  const int64_t size = p.x.sizes[2] * p.x.sizes[3];
  parallel_rows(p.groups(), 16 * size, call.threads, [&](int64_t begin, int64_t end) {
    const Rooms<T> rooms;
    double total = sum_of(Group<T>(p.x, begin), rooms);
    for (int64_t i = begin; i < end; ++i) {
      const Group<T> x(p.x, i), out(call[5], i), next(p.x, i + 1 < end ? i + 1 : i);
      const Moments<T> of(x, total, p.eps, rooms);
      const Channels<T> channels = p.channels(i);
      total = 0;
      x.for_each_stretch([&](int64_t c, Stretch<T> s) {
        const Stored<T> results = out.channel(c) + s.begin;
        T* const to = results.target(rooms[Rooms<T>::kTo]);
        const auto write_some = stream && to != rooms[Rooms<T>::kTo] ? write<Act, true, T> : write<Act, false, T>;
        const T times = channels.times(c);
        total += write_some(x.numbers(c, s, rooms[Rooms<T>::kX]), to, next.numbers(c, s, rooms[Rooms<T>::kNext]), s.n,
                            of.mean, of.scale * times, channels.plus(c) - of.rest * times);
        results.finish(s.n, to, stream);
      });
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
      const Rooms<T> rooms;
      for (int64_t i = begin; i < end; ++i) differentiate(i, rooms);
    });
    if (call_[kToWeight] || call_[kToBias]) add_up_samples();
  }

 private:
  enum { kGrad, kToX = 6, kToWeight, kToBias, kToScale, kToShift };

  // A stretch of a channel in the making of its gradients: n, and u = y' act'(n times + plus).
  struct Slopes {
    const T *x, *grad;
    V<T> mean, scale, rest, times, plus;

    MMKERN_FN V<T> normal(Place<T> at) const { return fma(at.load(x) - mean, scale, -rest); }
    MMKERN_FN V<T> slope(Place<T> at, V<T> n) const { return at.load(grad) * Act::at(fma(n, times, plus)).slope; }
  };

  void differentiate(int64_t i, const Rooms<T>& rooms) const {
    const Group<T> x(p_.x, i), grad(call_[kGrad], i);
    const Moments<T> of(x, sum_of(x, rooms), p_.eps, rooms);
    const Channels<T> channels = p_.channels(i);
    const auto slopes_of = [&](int64_t c, Stretch<T> s) {
      return Slopes{x.numbers(c, s, rooms[Rooms<T>::kX]),
                    grad.numbers(c, s, rooms[Rooms<T>::kGrad]),
                    of.mean,
                    of.scale,
                    of.rest,
                    channels.times(c),
                    channels.plus(c)};
    };
    T *const of_u = sums_.data + 2 * i * channels_, *const of_un = of_u + channels_;
    for (int64_t c = 0; c < 2 * channels_; ++c) of_u[c] = 0;
    x.for_each_stretch([&](int64_t c, Stretch<T> s) {
      const Slopes slopes = slopes_of(c, s);
      V<T> sums[2] = {V<T>(T(0)), V<T>(T(0))};
      Elements<T>::each(0, s.n, [=, &sums](Place<T> at) __attribute__((always_inline)) {
        const V<T> n = slopes.normal(at), u = slopes.slope(at, n);
        sums[0] += u;
        sums[1] = fma(u, n, sums[1]);
      });
      of_u[c] += sum(sums[0]);
      of_un[c] += sum(sums[1]);
    });
    write_modulators(i, channels, of_u, of_un);
    if (!call_[kToX]) return;
    double centre = 0, along = 0;
    for (int64_t c = 0; c < channels_; ++c) {
      centre += double(channels.times(c)) * double(of_u[c]);
      along += double(channels.times(c)) * double(of_un[c]);
    }
    const Group<T> to_x(call_[kToX], i);
    const V<T> mean_u(T(centre / x.size())), mean_un(T(along / x.size()));
    x.for_each_stretch([&](int64_t c, Stretch<T> s) {
      const Slopes slopes = slopes_of(c, s);
      const Stored<T> results = to_x.channel(c) + s.begin;
      T* const to = results.target(rooms[Rooms<T>::kTo]);
      Elements<T>::each(0, s.n, [=](Place<T> at) __attribute__((always_inline)) {
        const V<T> n = slopes.normal(at);
        at.store(to, slopes.scale * (slopes.times * slopes.slope(at, n) - mean_u - n * mean_un));
      });
      results.finish(s.n, to, false);
    });
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
  const bool stream = streams(bytes_of(call), out);
  const Problem<T> p(call, 0);
  activation::with(int(call.scalars[1]), [&](auto act) {
    using Act = decltype(act);
    write_groups<T, Act>(call, p, stream);
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
