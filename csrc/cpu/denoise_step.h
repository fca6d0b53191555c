// One step of a denoising sampler: mmkern/reference/diffusion.py. Everything is read once and written once; what is put
// together on the way stays in registers.
#pragma once

#include "grid_rows.h"
#include "random.h"
#include "stored.h"

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
// for all, moves along the first axis alone.
inline Call on_axes_of_x(const Call& call) {
  Call aligned = call;
  const int of_samples[] = {tensor::kWeights, tensor::kRescale, tensor::kCoefficients, tensor::kLimits};
  for (const int numbers : of_samples) {
    View& view = aligned.tensors[numbers];
    for (int axis = 1; view && axis < call[tensor::kX].rank; ++axis) view.sizes[axis] = 1;
  }
  aligned.tensors[tensor::kSeed] = View();
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
 public:
  using V = Vec<T, kLanes<T> * sizeof(T) == 64 ? 4 : 2>;

  Step(const Call& call, int64_t row) : call_(call), rows_(call, tensor::kX, row) {
    while (outputs_ < kMaxOutputs && call_[tensor::kOutputs + outputs_]) ++outputs_;
    while (history_ < kMaxHistory && call_[tensor::kHistory + history_]) ++history_;
  }

  void operator++() { ++rows_; }

  // Of elements begin to end of this row: the outputs put together, and output 1.
  void measure(int64_t begin, int64_t end, Moments* found) const {
    double means[2] = {};
    for (int pass = 0; pass < 2; ++pass) {
      const bool is_second_pass = pass == 1;
      double sums[2] = {};
      for (int64_t i = begin; i < end; i += V::size) {
        const Place at{i, int(end - i < V::size ? end - i : V::size)};
        const V both[2] = {guided(at), load(tensor::kOutputs + 1, at)};
        for (int k = 0; k < 2; ++k) {
          V x = both[k];
          if (is_second_pass) x = (x - V(T(means[k]))) * (x - V(T(means[k])));
          if (at.n == V::size) sums[k] += double(sum(x));
          for (int lane = 0; at.n < V::size && lane < at.n; ++lane) sums[k] += double(x[lane]);
        }
      }
      for (int k = 0; k < 2; ++k) {
        if (is_second_pass)
          found[k] = {double(end - begin), means[k], sums[k]};
        else
          means[k] = double(T(sums[k] / double(end - begin)));
      }
    }
  }

  // Elements begin to end of this row; `drawn` has their noise, where it is drawn.
  template <bool kStream>
  void write(int64_t begin, int64_t end, const T* drawn) const {
    int64_t i = begin;
    for (; i + V::size <= end; i += V::size)
      write_at<kStream>(Place{i, V::size}, drawn ? drawn + (i - begin) : nullptr);
    if (i < end) write_at<kStream>(Place{i, int(end - i)}, drawn ? drawn + (i - begin) : nullptr);
  }

 private:
  struct Place {
    int64_t i;
    int n;  // elements; V::size but at the end of a row

    template <class S>
    MMKERN_FN V load(const S* row) const {
      return n == V::size ? V::load(row + i) : V::load(row + i, n);
    }
    template <bool kStream, class S>
    MMKERN_FN void store(S* row, V v) const {
      n == V::size ? v.template store<kStream>(row + i) : v.store(row + i, n);
    }
  };

  // Scalar: one element of each tensor, through the formulas of the reference.
  template <bool kStream>
  MMKERN_FN void write_at(Place at, const T* drawn) const {
    const T* const by = numbers(tensor::kCoefficients);
    const V x = load(tensor::kX, at), output = guided(at);
    const V x0 = clipped(fma(V(by[column::kX0Output]), output, x * V(by[column::kX0Sample])));
    V next = fma(V(by[column::kX0]), x0, fma(V(by[column::kOutput]), output, x * V(by[column::kSample])));
    V corrected = fma(V(by[column::kCorrectedX0]), x0, x * V(by[column::kCorrectedSample]));
    for (int k = 0; k < history_; ++k) {
      const V past = load(tensor::kHistory + k, at);
      next = fma(V(by[column::kHistory + k]), past, next);
      corrected = fma(V(by[column::kCorrectedHistory + k]), past, corrected);
    }
    if (drawn)
      next = fma(V(by[column::kNoise]), V::load(drawn, at.n), next);
    else if (call_[tensor::kNoise])
      next = fma(V(by[column::kNoise]), load(tensor::kNoise, at), next);
    if (call_[tensor::kKeep]) {
      const V known = fma(V(by[column::kKnownNoise]), load(tensor::kKnownNoise, at),
                          load(tensor::kKnown, at) * V(by[column::kKnown]));
      next = fma(load(tensor::kKeep, at), known - next, next);
    }
    store<kStream>(tensor::kNext, at, next);
    if (call_[tensor::kX0]) store<kStream>(tensor::kX0, at, x0);
    if (call_[tensor::kCorrected]) store<kStream>(tensor::kCorrected, at, corrected);
  }

  // The outputs of the model, put together.
  MMKERN_FN V guided(Place at) const {
    if (outputs_ == 0) return V(T(0));
    V total = load(tensor::kOutputs, at);
    const T* const weights = numbers(tensor::kWeights);
    if (!weights) return total;
    const bool is_masked = bool(call_[tensor::kMask]);
    const V mask = is_masked ? load(tensor::kMask, at) : V(T(0));
    const auto weight = [&](int k) __attribute__((always_inline)) {
      return is_masked ? fma(mask, V(weights[2 * k + 1]), V(weights[2 * k])) : V(weights[2 * k]);
    };
    total *= weight(0);
    for (int k = 1; k < outputs_; ++k) total = fma(weight(k), load(tensor::kOutputs + k, at), total);
    const T* const factor = numbers(tensor::kRescale);
    return factor ? total * V(*factor) : total;
  }

  MMKERN_FN V clipped(V x0) const {
    const T* const limits = numbers(tensor::kLimits);
    if (!limits) return x0;
    return min(V(limits[0]), max(V(-limits[0]), x0)) * V(limits[1]);  // NaN stays NaN
  }

  Stored<T> row(int slot) const { return Stored<T>(call_[slot]) + rows_.offset(slot); }
  const T* numbers(int slot) const { return call_[slot] ? row(slot).template as<const T>() : nullptr; }

  MMKERN_FN V load(int slot, Place at) const {
    V v;
    const bool is_one = call_[slot].strides[call_[slot].rank - 1] == 0;
    row(slot).with([&](const auto* from)
                       __attribute__((always_inline)) { v = is_one ? V(Vec<T>::load(from, 1)[0]) : at.load(from); });
    return v;
  }
  template <bool kStream>
  MMKERN_FN void store(int slot, Place at, V v) const {
    row(slot).with([&](auto* to) __attribute__((always_inline)) { at.template store<kStream>(to, v); });
  }

  const Call& call_;
  CallRows rows_;
  int outputs_ = 0, history_ = 0;
};

// Whether results go past the caches: only those without gaps do.
inline bool streams_results(const Call& call) {
  const auto result = [&](int slot) {
    const View& view = call[slot];
    return Rows<char>{static_cast<char*>(view.data), 1, view.sizes[0] * bytes_of(view.dtype), 0};
  };
  return call[tensor::kX].rank == 1 && streams(result(tensor::kNext), result(tensor::kX0), result(tensor::kCorrected));
}

constexpr int64_t kPiece = 4096;  // elements of a row that one unit of work takes

// The rows of x, cut into pieces.
class Pieces {
 public:
  explicit Pieces(const View& x)
      : rows_(count(x, x.rank - 1)), cols_(x.sizes[x.rank - 1]), each_((cols_ + kPiece - 1) / kPiece) {}

  int64_t count_all() const { return rows_ * each_; }
  int64_t row(int64_t piece) const { return piece / each_; }
  int64_t begin(int64_t piece) const { return piece % each_ * kPiece; }
  int64_t end(int64_t piece) const { return begin(piece) + kPiece < cols_ ? begin(piece) + kPiece : cols_; }
  int64_t first_element(int64_t piece) const { return row(piece) * cols_ + begin(piece); }
  bool ends_row(int64_t piece) const { return end(piece) == cols_; }

  // f(first, last) for each thread.
  template <class F>
  void share(int threads, F f) const {
    parallel_rows(count_all(), 8 * (cols_ < kPiece ? cols_ : kPiece), threads, f);
  }

 private:
  int64_t rows_, cols_, each_;
};

// In the place of how far to rescale, one factor a sample: 1 for now.
template <class T>
Call with_factors(const Call& given, T* factors, int64_t samples) {
  Call call = given;
  View& view = call.tensors[tensor::kRescale];
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
  const Scratch<Moments> found(2 * pieces.count_all());
  pieces.share(given.threads, [&](int64_t first, int64_t last) {
    Step<T> step(call, pieces.row(first));
    for (int64_t piece = first; piece < last; ++piece) {
      step.measure(pieces.begin(piece), pieces.end(piece), found.data + 2 * piece);
      if (pieces.ends_row(piece)) ++step;
    }
  });
  const View& far = given[tensor::kRescale];
  const int64_t each = pieces.count_all() / samples;
  for (int64_t b = 0; b < samples; ++b) {
    Moments of[2];
    for (int64_t piece = b * each; piece < (b + 1) * each; ++piece)
      for (int k = 0; k < 2; ++k) of[k].add(found.data[2 * piece + k]);
    const T share = static_cast<const T*>(far.data)[far.sizes[0] > 1 ? b * far.strides[0] : 0];
    factors[b] = T(1 + double(share) * (__builtin_sqrt(of[1].squares / of[0].squares) - 1));
  }
}

// Tensors: those of `tensor`, in their order.
template <class T>
void run_step(const Call& given) {
  const View& x = given[tensor::kX];
  if (count(x, x.rank) == 0) return;
  const int64_t samples = x.rank > 1 ? x.sizes[0] : 1;
  const Scratch<T> factors(given[tensor::kRescale] ? samples : 0);
  const Call call = on_axes_of_x(given[tensor::kRescale] ? with_factors(given, factors.data, samples) : given);
  if (given[tensor::kRescale]) find_factors(given, call, factors.data, samples);
  const Pieces pieces(call[tensor::kX]);
  const Normals<T> normals(given[tensor::kSeed]);
  const bool stream = streams_results(call);
  pieces.share(given.threads, [&](int64_t first, int64_t last) {
    const Scratch<T> room(normals ? kPiece + 6 : 0);
    Step<T> step(call, pieces.row(first));
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t begin = pieces.begin(piece), end = pieces.end(piece);
      const T* drawn = nullptr;
      if (normals) drawn = normals.fill(pieces.first_element(piece), end - begin, room.data);
      stream ? step.template write<true>(begin, end, drawn) : step.template write<false>(begin, end, drawn);
      if (pieces.ends_row(piece)) ++step;
    }
    store_fence();
  });
}

inline void step(const Call& call) {
  call[tensor::kX].dtype == Dtype::float64 ? run_step<double>(call) : run_step<float>(call);
}

}  // namespace denoise
}  // namespace MMKERN_ISA
}  // namespace mmkern
