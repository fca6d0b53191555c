// One step of a denoising sampler: mmkern/reference/diffusion.py. Everything is read once and written once; what is put
// together on the way stays in registers.
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

// The call with all tensors on the axes of x, and as few of those as may be: what has one row for each sample, or one
// for all, moves along the first axis alone, and the seed along none.
inline Call on_axes_of_x(const Call& call) {
  Call aligned = call;
  const int of_samples[] = {tensor::kWeights, tensor::kRescale, tensor::kCoefficients, tensor::kLimits};
  for (const int numbers : of_samples) {
    View& view = aligned.tensors[numbers];
    for (int axis = 1; view && axis < call[tensor::kX].rank; ++axis) view.sizes[axis] = 1;
  }
  for (int axis = 0; axis < call[tensor::kX].rank; ++axis) aligned.tensors[tensor::kSeed].sizes[axis] = 1;
  return with_fewest_axes(aligned, tensor::kX);
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
  using V = typename Elements<T>::V;
  using Place = typename Elements<T>::Place;

 public:
  Step(const Call& call, int64_t row)
      : elements_(call, tensor::kX, row), normals_(call[tensor::kSeed]), room_(normals_ ? Pieces::kSize + 6 : 0) {
    for (int k = 0; k < kMaxOutputs; ++k)
      if (elements_.has(tensor::kOutputs + k)) outputs_ = k + 1;
    for (int k = 0; k < kMaxHistory; ++k)
      if (elements_.has(tensor::kHistory + k)) history_ = k + 1;
  }

  void operator++() { ++elements_; }

  // Elements begin to end of this row, of which the first is x's element `first`.
  template <bool kStream>
  void write(int64_t begin, int64_t end, int64_t first) const {
    const T* const drawn = normals_ ? normals_.fill(first, end - begin, room_.data) - begin : nullptr;
    Elements<T>::each(begin, end, [&](Place at) __attribute__((always_inline)) { write_at<kStream>(at, drawn); });
  }

  // Of elements begin to end of this row: the outputs put together, and output 1.
  void measure(int64_t begin, int64_t end, Moments* found) const {
    const double n = double(end - begin);
    T means[2] = {};
    for (int pass = 0; pass < 2; ++pass) {
      double sums[2] = {};
      Elements<T>::each(begin, end, [&](Place at) {
        const V both[2] = {guided(at), elements_.load(tensor::kOutputs + 1, at)};
        for (int k = 0; k < 2; ++k) {
          const V x = pass == 0 ? both[k] : (both[k] - V(means[k])) * (both[k] - V(means[k]));
          if (at.n == V::size) sums[k] += double(sum(x));
          for (int lane = 0; at.n < V::size && lane < at.n; ++lane) sums[k] += double(x[lane]);
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
  // Scalar: one element of each tensor, through the formulas of the reference.
  template <bool kStream>
  MMKERN_FN void write_at(Place at, const T* drawn) const {
    const T* const by = elements_.numbers(tensor::kCoefficients);
    const V x = elements_.load(tensor::kX, at), output = guided(at);
    const V x0 = clipped(fma(V(by[column::kX0Output]), output, x * V(by[column::kX0Sample])) * V(by[column::kX0Scale]));
    V next = fma(V(by[column::kX0]), x0, fma(V(by[column::kOutput]), output, x * V(by[column::kSample])));
    const bool corrects = elements_.has(tensor::kCorrected);
    V corrected(T(0));
    if (corrects) corrected = fma(V(by[column::kCorrectedX0]), x0, x * V(by[column::kCorrectedSample]));
    for (int k = 0; k < history_; ++k) {
      if (!elements_.has(tensor::kHistory + k)) continue;
      const V past = elements_.load(tensor::kHistory + k, at);
      next = fma(V(by[column::kHistory + k]), past, next);
      if (corrects) corrected = fma(V(by[column::kCorrectedHistory + k]), past, corrected);
    }
    if (drawn)
      next = fma(V(by[column::kNoise]), at.load(drawn), next);
    else if (elements_.has(tensor::kNoise))
      next = fma(V(by[column::kNoise]), elements_.load(tensor::kNoise, at), next);
    if (elements_.has(tensor::kKeep)) {
      const V known = fma(V(by[column::kKnownNoise]), elements_.load(tensor::kKnownNoise, at),
                          elements_.load(tensor::kKnown, at) * V(by[column::kKnown]));
      next = fma(elements_.load(tensor::kKeep, at), known - next, next);
    }
    elements_.template store<kStream>(tensor::kNext, at, next);
    if (elements_.has(tensor::kX0)) elements_.template store<kStream>(tensor::kX0, at, x0);
    if (corrects) elements_.template store<kStream>(tensor::kCorrected, at, corrected);
  }

  // The outputs of the model, put together.
  MMKERN_FN V guided(Place at) const {
    const T* const weights = elements_.numbers(tensor::kWeights);
    const bool is_masked = weights && elements_.has(tensor::kMask);
    const V mask = is_masked ? elements_.load(tensor::kMask, at) : V(T(0));
    V total(T(0));
    for (int k = 0; k < outputs_; ++k) {
      if (!elements_.has(tensor::kOutputs + k)) continue;
      V weight(weights ? weights[2 * k] : T(1));
      if (is_masked) weight = fma(mask, V(weights[2 * k + 1]), weight);
      total = fma(weight, elements_.load(tensor::kOutputs + k, at), total);
    }
    const T* const factor = elements_.numbers(tensor::kRescale);
    return factor ? total * V(*factor) : total;
  }

  MMKERN_FN V clipped(V x0) const {
    const T* const limits = elements_.numbers(tensor::kLimits);
    if (!limits) return x0;
    return min(V(limits[0]), max(V(-limits[0]), x0)) * V(limits[1]);  // NaN stays NaN
  }

  Elements<T> elements_;
  const Normals<T> normals_;
  const Scratch<T> room_;
  int outputs_ = 0, history_ = 0;
};

// In the place of how far to rescale, one factor a sample: 1 for now. Without any, nothing is there.
template <class T>
Call with_factors(const Call& given, T* factors, int64_t samples) {
  Call call = given;
  View& view = call.tensors[tensor::kRescale];
  if (!factors) {
    view = View();
    return call;
  }
  view.data = factors;
  view.sizes[0] = samples;
  view.strides[0] = 1;
  for (int64_t b = 0; b < samples; ++b) factors[b] = 1;
  return call;
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
  const bool rescales = given[tensor::kRescale] && given[tensor::kOutputs + 1];
  const Scratch<T> factors(rescales ? samples : 0);
  const Call call = on_axes_of_x(with_factors(given, rescales ? factors.data : nullptr, samples));
  if (rescales) find_factors(given, call, factors.data, samples);
  const Pieces pieces(call[tensor::kX]);
  const bool stream = streams(without_gaps(call[tensor::kNext]), without_gaps(call[tensor::kX0]),
                              without_gaps(call[tensor::kCorrected]));
  pieces.for_each(
      given.threads, [&](int64_t row) { return Step<T>(call, row); },
      [&](const Step<T>& step, int64_t piece) {
        const int64_t begin = pieces.begin(piece), end = pieces.end(piece), first = pieces.first_element(piece);
        stream ? step.template write<true>(begin, end, first) : step.template write<false>(begin, end, first);
      });
}

inline void step(const Call& call) {
  call[tensor::kX].dtype == Dtype::float64 ? run_step<double>(call) : run_step<float>(call);
}

}  // namespace denoise
}  // namespace MMKERN_ISA
}  // namespace mmkern
