// One step of a denoising sampler: mmkern/reference/diffusion.py. It is put together a stretch at a time, by loops that
// each know what there is, so that memory is read once and written once.
#pragma once

#include "elementwise.h"
#include "random.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace denoise {

constexpr int kMaxOutputs = 5, kMaxHistory = 4;

namespace tensor {
enum {  // Of a call. The last three are results, of which the first is always wanted.
  kX,
  kOutputs,
  kMask = kOutputs + kMaxOutputs,
  kHistory,
  kNoise = kHistory + kMaxHistory,
  kSeed,
  kKeep,
  kKnown,
  kKnownNoise,
  kWeights,
  kRescale,
  kCoefficients,
  kLimits,
  kNext,
  kX0,
  kCorrected,
  kGuided,  // the outputs put together; not of a call
  kCount,
};
}  // namespace tensor

namespace column {
enum {  // Of a row of coefficients: Column of mmkern/reference/diffusion.py.
  kX0Sample,
  kX0Output,
  kX0Scale,
  kSample,
  kOutput,
  kX0,
  kHistory,
  kNoise = kHistory + kMaxHistory,
  kCorrectedSample,
  kCorrectedX0,
  kCorrectedHistory,
  kKnown = kCorrectedHistory + kMaxHistory,
  kKnownNoise,
};
}  // namespace column

// Puts all tensors of a call on the axes of x, and as few of those as may be: what has one row for each sample, or one
// for all, moves along the first axis alone, and the seed along none.
inline void put_on_axes_of_x(Call& call) {
  const int of_samples[] = {tensor::kWeights, tensor::kRescale, tensor::kCoefficients, tensor::kLimits};
  for (const int numbers : of_samples) {
    View& view = call.tensors[numbers];
    for (int axis = 1; view && axis < call[tensor::kX].rank; ++axis) view.sizes[axis] = 1;
  }
  for (int axis = 0; axis < call[tensor::kX].rank; ++axis) call.tensors[tensor::kSeed].sizes[axis] = 1;
  merge_axes(call, tensor::kX);
}

// Count, mean and sum of the squared distances to it.
struct Moments {
  double n = 0, mean = 0, squares = 0;

  // Chan et al. 1983.
  void add(const Moments& more) {
    const double all = n + more.n, distance = more.mean - mean;
    mean += distance * more.n / all;
    squares += more.squares + distance * distance * n * more.n / all;
    n = all;
  }
};

template <class T>
class Step {
  using Stretch = typename Elements<T>::Stretch;

 public:
  Step(const Call& call, int64_t row)
      : elements_(call, tensor::kX, row, tensor::kCount, call[tensor::kSeed] ? Pieces::kSize + 6 : 0),
        normals_(call[tensor::kSeed]) {}

  void operator++() { ++elements_; }

  // Elements begin to end of this row, of which the first is x's element `first`.
  void write(int64_t begin, int64_t end, int64_t first, bool stream) const {
    const T* const drawn =
        normals_ ? normals_.fill(first, end - begin, elements_.room(tensor::kCount)) - begin : nullptr;
    elements_.for_each_stretch(begin, end,
                               [&](Stretch at) { write_stretch(at, drawn ? drawn + at.begin : nullptr, stream); });
  }

  // Of elements begin to end of this row: the outputs put together, and output 1.
  void measure(int64_t begin, int64_t end, Moments* found) const {
    const double n = double(end - begin);
    T means[2] = {};
    for (int pass = 0; pass < 2; ++pass) {
      double sums[2] = {};
      elements_.for_each_stretch(begin, end, [&](Stretch at) {
        T* const guided = elements_.room(tensor::kGuided);
        with_guided(at, [&](auto g) { for_each_vec<T>(at.n, [=](auto i) { i.keep(guided, g.at(i)); }); });
        const T* const both[2] = {guided, read(tensor::kOutputs + 1, at)};
        for (int k = 0; k < 2; ++k) {
          const T *const x = both[k], mean = means[k];
          const auto sum = reduce_row<T, 1>(at.n, [=](auto i, Vec<T>* acc) {
            const Vec<T> v = i.load(x), d = i.only(v - Vec<T>(mean));
            acc[0] = pass == 0 ? acc[0] + v : fma(d, d, acc[0]);
          });
          sums[k] += double(sum.total(0));
        }
      });
      for (int k = 0; k < 2; ++k) {
        if (pass == 0)
          means[k] = T(sums[k] / n);
        else
          found[k] = {n, double(means[k]), sums[k]};
      }
    }
  }

 private:
  // What is added up: tensors, and what they are multiplied by.
  template <int kMost>
  struct Terms {
    int count = 0;
    const T* from[kMost];
    T by[kMost];

    void add(const T* tensor, T number) {
      if (!tensor) return;
      from[count] = tensor;
      by[count++] = number;
    }
    // Scalar: for (k < kCount) total += by[k] * from[k][i];
    template <int kCount, class A>
    MMKERN_FN Vec<T> onto(A i, Vec<T> total) const {
#pragma GCC unroll 8
      for (int k = 0; k < kCount; ++k) total = fma(Vec<T>(by[k]), i.load(from[k]), total);
      return total;
    }
  };
  // The history and the noise.
  using Past = Terms<kMaxHistory + 1>;
  static constexpr int kPastAtOnce = 2;  // the most that a loop of the common outputs adds by the way

  const T* read(int slot, Stretch at) const { return elements_.read(slot, at); }

  void write_stretch(Stretch at, const T* drawn, bool stream) const {
    const T *const by = elements_.numbers(tensor::kCoefficients), *const x = read(tensor::kX, at);
    Past past, of_corrected;
    for (int k = 0; k < kMaxHistory; ++k) {
      const T* const from = read(tensor::kHistory + k, at);
      past.add(from, by[column::kHistory + k]);
      of_corrected.add(from, by[column::kCorrectedHistory + k]);
    }
    past.add(drawn ? drawn : read(tensor::kNoise, at), by[column::kNoise]);
    with_guided(at, [&](auto g) {
      const bool at_once = past.count <= g.kPast && !elements_.has(tensor::kKeep) && !elements_.has(tensor::kCorrected);
      // What goes past the caches but is not written at once is put together in its room.
      const auto place = [&](int slot) {
        return stream && !at_once && elements_.has(slot) ? elements_.room(slot) : elements_.place(slot, at);
      };
      T *const next = place(tensor::kNext), *const x0 = place(tensor::kX0),
               *const corrected = place(tensor::kCorrected);
      const bool past_caches = stream && !elements_.is_room(tensor::kNext, next) && !elements_.is_room(tensor::kX0, x0);
      form(at.n, x, g, past, x0, next, past_caches);
      if (elements_.has(tensor::kKeep)) put_known(at, next);
      if (corrected) correct(at.n, x, x0, of_corrected, corrected);
      elements_.finish(tensor::kNext, at, next, stream);
      elements_.finish(tensor::kX0, at, x0, stream);
      elements_.finish(tensor::kCorrected, at, corrected, stream);
    });
  }

  // f(g) with g.at(i) the outputs of the model, put together.
  template <class F>
  void with_guided(Stretch at, F f) const {
    const T *const weights = elements_.numbers(tensor::kWeights), *const factor = elements_.numbers(tensor::kRescale);
    const T* const mask = weights ? read(tensor::kMask, at) : nullptr;
    Terms<kMaxOutputs> outputs, masked;
    for (int k = 0; k < kMaxOutputs; ++k) {
      const T* const output = read(tensor::kOutputs + k, at);
      outputs.add(output, weights ? weights[2 * k] : T(1));
      masked.add(output, mask ? weights[2 * k + 1] : T(0));
    }
    if (outputs.count == 0) return f(NoOutput{});
    const T all = factor ? *factor : T(1);
    with_count<kMaxOutputs>(outputs.count, [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      mask ? f(Guided<kCount, true>(outputs, masked, mask, all)) : f(Guided<kCount, false>(outputs, masked, mask, all));
    });
  }

  struct NoOutput {
    static constexpr int kPast = kPastAtOnce;

    template <class A>
    MMKERN_FN Vec<T> at(A) const {
      return Vec<T>(T(0));
    }
  };
  template <int kCount, bool kMasked>
  struct Guided {
    static constexpr int kPast = kCount <= 2 && !kMasked ? kPastAtOnce : 0;

    const T* from[kCount];
    T by[kCount], masked[kCount];
    const T* mask;
    T all;

    Guided(const Terms<kMaxOutputs>& outputs, const Terms<kMaxOutputs>& of_mask, const T* given, T factor)
        : mask(given), all(factor) {
      for (int k = 0; k < kCount; ++k) {
        from[k] = outputs.from[k];
        by[k] = outputs.by[k];
        masked[k] = of_mask.by[k];
      }
    }

    template <class A>
    MMKERN_FN Vec<T> at(A i) const {
      Vec<T> total(T(0));
#pragma GCC unroll 8
      for (int k = 0; k < kCount; ++k) {
        Vec<T> weight(by[k]);
        if (kMasked) weight = fma(i.load(mask), Vec<T>(masked[k]), weight);
        total = fma(weight, i.load(from[k]), total);
      }
      return total * Vec<T>(all);
    }
  };

  // Scalar: for (i < n) { x0[i] = clip((b * g[i] + a * x[i]) * s); next[i] = e * x0[i] + d * g[i] + c * x[i]; }
  // and past added to next, by the way where that is of few terms: memory then is read and written evenly. x0 may be
  // null.
  template <class G>
  void form(int64_t n, const T* x, const G& g, const Past& past, T* x0, T* next, bool stream) const {
    if (past.count == 0) return form_with<0>(n, x, g, past, x0, next, stream);
    if constexpr (G::kPast > 0) {
      if (past.count <= G::kPast)
        return with_count<G::kPast>(
            past.count, [&](auto count) { form_with<decltype(count)::value>(n, x, g, past, x0, next, stream); });
    }
    form_with<0>(n, x, g, past, x0, next, false);
    add(past, n, next);
  }
  template <int kPast, class G>
  void form_with(int64_t n, const T* x, const G& g, const Past& past, T* x0_to, T* next, bool stream) const {
    const T *const by = elements_.numbers(tensor::kCoefficients), *const limits = elements_.numbers(tensor::kLimits);
    const Vec<T> of_x(by[column::kSample]), of_g(by[column::kOutput]), of_x0(by[column::kX0]);
    if (!x0_to && by[column::kX0] == 0) {
      for_each_vec<T>(n, stream, [=](auto i) __attribute__((always_inline)) {
        i.store(next, past.template onto<kPast>(i, fma(of_g, g.at(i), i.load(x) * of_x)));
      });
      return;
    }
    const Vec<T> a(by[column::kX0Sample]), b(by[column::kX0Output]), scale(by[column::kX0Scale]);
    const Vec<T> most(limits ? limits[0] : T(0)), by_limits(limits ? limits[1] : T(1));
    for_each_vec<T>(n, stream, [=](auto i) __attribute__((always_inline)) {
      const Vec<T> sample = i.load(x), output = g.at(i);
      Vec<T> x0 = fma(b, output, sample * a) * scale;
      if (limits) x0 = min(most, max(-most, x0)) * by_limits;  // NaN stays NaN
      i.store(next, past.template onto<kPast>(i, fma(of_x0, x0, fma(of_g, output, sample * of_x))));
      if (x0_to) i.store(x0_to, x0);
    });
  }

  // Scalar: for (i < n) for (k < terms.count) to[i] += terms.by[k] * terms.from[k][i];
  static void add(const Past& terms, int64_t n, T* to) {
    with_count<kMaxHistory + 1>(terms.count, [&](auto count) {
      for_each_vec<T>(n, [=](auto i) __attribute__((always_inline)) {
        i.keep(to, terms.template onto<decltype(count)::value>(i, i.load(to)));
      });
    });
  }

  // Scalar: for (i < n) to[i] = q * x0[i] + p * x[i];  and the history.
  void correct(int64_t n, const T* x, const T* x0, const Past& past, T* to) const {
    const T* const by = elements_.numbers(tensor::kCoefficients);
    const Vec<T> of_x(by[column::kCorrectedSample]), of_x0(by[column::kCorrectedX0]);
    for_each_vec<T>(n, [=](auto i) { i.store(to, fma(of_x0, i.load(x0), i.load(x) * of_x)); });
    add(past, n, to);
  }

  // Scalar: for (i < n) next[i] += keep[i] * (p * known[i] + q * noise[i] - next[i]);
  void put_known(Stretch at, T* next) const {
    const T* const by = elements_.numbers(tensor::kCoefficients);
    const Vec<T> of_known(by[column::kKnown]), of_noise(by[column::kKnownNoise]);
    const T *const keep = read(tensor::kKeep, at), *const known = read(tensor::kKnown, at),
                   *const noise = read(tensor::kKnownNoise, at);
    for_each_vec<T>(at.n, [=](auto i) {
      const Vec<T> x = i.load(next), there = fma(of_noise, i.load(noise), i.load(known) * of_known);
      i.keep(next, fma(i.load(keep), there - x, x));
    });
  }

  Elements<T> elements_;
  const Normals<T> normals_;  // a piece of them goes to the room behind those of slots
};

// In the place of how far to rescale, one factor a sample: 1 for now.
template <class T>
void put_factors(View& view, T* factors, int64_t samples) {
  view.data = factors;
  view.sizes[0] = samples;
  view.strides[0] = 1;
  for (int64_t b = 0; b < samples; ++b) factors[b] = 1;
}

// What guidance multiplies the outputs of each sample by: their standard deviation comes nearer to that of output 1.
template <class T>
void find_factors(const Call& given, const Call& call, T* factors, int64_t samples) {
  const Pieces pieces(call[tensor::kX]);
  const Scratch<Moments> found(2 * pieces.count());
  pieces.for_each(
      given.threads, [&](int64_t row) { return Step<T>(call, row); },
      [&](const Step<T>& step, int64_t piece) {
        step.measure(pieces.begin(piece), pieces.end(piece), found.data + 2 * piece);
      });
  const View& share = given[tensor::kRescale];
  const int64_t each = pieces.count() / samples, stride = share.sizes[0] > 1 ? share.strides[0] : 0;
  for (int64_t b = 0; b < samples; ++b) {
    Moments of[2];
    for (int64_t piece = b * each; piece < (b + 1) * each; ++piece)
      for (int k = 0; k < 2; ++k) of[k].add(found.data[2 * piece + k]);
    const double by = double(static_cast<const T*>(share.data)[b * stride]);
    factors[b] = T(1 + by * (__builtin_sqrt(of[1].squares / of[0].squares) - 1));
  }
}

// Tensors: those of `tensor`, in their order.
template <class T>
void run_step(const Call& given) {
  const View& x = given[tensor::kX];
  if (count(x, x.rank) == 0) return;
  const int64_t samples = x.rank > 1 ? x.sizes[0] : 1;
  Call call = given;
  View& rescale = call.tensors[tensor::kRescale];
  if (!given[tensor::kOutputs + 1]) rescale = View();
  std::optional<Scratch<T>> factors;
  if (rescale) put_factors(rescale, factors.emplace(samples).data, samples);
  put_on_axes_of_x(call);
  if (factors) find_factors(given, call, factors->data, samples);
  const Pieces pieces(call[tensor::kX]);
  const bool stream = streams(bytes_of(call), call[tensor::kNext], call[tensor::kX0], call[tensor::kCorrected]);
  pieces.for_each(
      given.threads, [&](int64_t row) { return Step<T>(call, row); },
      [&](const Step<T>& step, int64_t piece) {
        const int64_t begin = pieces.begin(piece), end = pieces.end(piece), first = pieces.first_element(piece);
        step.write(begin, end, first, stream);
      });
}

inline void step(const Call& call) {
  call[tensor::kX].dtype == Dtype::float64 ? run_step<double>(call) : run_step<float>(call);
}

}  // namespace denoise
}  // namespace MMKERN_ISA
}  // namespace mmkern
