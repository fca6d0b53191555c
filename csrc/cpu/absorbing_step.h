// A step of absorbing-state diffusion: absorbing_step of mmkern/reference/absorbing.py.
//
// A masked row is read once: its branches become one, whose scores are kept, weighed against the largest, and race.
// While they do, the next row is fetched. Of rows that are not masked nothing is read; the others are shared among
// threads.
#pragma once

#include "grid_rows.h"
#include "race.h"
#include "softmax.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace absorbing {

// A row of each branch, and how much it counts.
template <class S>
struct Branches {
  using T = accumulate_t<S>;

  const S* first;  // null: no row
  int64_t stride;
  int64_t count;
  const T* weights;  // null: there is one branch

  // Scalar: for (k < count) total += weights[k] * branch[k];  but -inf where any branch is
  template <class At>
  MMKERN_FN Vec<T> load(At at) const {
    Vec<T> total = at.load(first);
    if (!weights) return total;
    Vec<T> least = min(total, Vec<T>(-minus_infinity<T>()));  // of a NaN too
    total = total * Vec<T>(weights[0]);
    for (int64_t k = 1; k < count; ++k) {
      const Vec<T> score = at.load(first + k * stride);
      total = fma(score, Vec<T>(weights[k]), total);
      least = min(score, least);
    }
    return select(least == Vec<T>(minus_infinity<T>()), least, total);
  }

  // Asks for n elements of each, begin and on.
  MMKERN_FN void prefetch(int64_t begin, int64_t n) const {
    for (int64_t k = 0; first && k < count; ++k)
      for (int64_t i = 0; i < n; i += kLine / int64_t(sizeof(S)))
        __builtin_prefetch(first + k * stride + begin + i, 0, 2);
  }
};

template <class T>
struct Drawn {
  T log_prob;
  int64_t token;
};

// One thread's room for rows of n tokens, of which MASK is none.
template <class T>
class Sampler {
 public:
  explicit Sampler(int64_t n) : n_(n), scores_(n + kBlock), weights_(n + kBlock) {
    for (int64_t i = n; i < n + kBlock; ++i) scores_.data[i] = minus_infinity<T>();
  }

  // By a rate of infinity MASK has to go.
  template <class S>
  Drawn<T> draw(const Branches<S>& row, const Branches<S>& next, T rate, const RandomRow& random) {
    constexpr Drawn<T> kNone{T(__builtin_nan("")), -1};
    if (!take(row) || !(rate >= 0)) return kNone;
    if (largest_ == minus_infinity<T>()) return rate == -minus_infinity<T>() ? kNone : Drawn<T>{T(0), n_};
    // In units of the largest score: what the tokens weigh, and what there is room for.
    const double mass = weigh(), room = ::exp(-double(largest_) - ::log(double(rate)));
    const int64_t token = race(room > mass ? T(room - mass) : T(0), next, random);
    if (token == n_) return {T(::log1p(-mass / room)), n_};
    return {T(double(scores_.data[token]) - double(largest_) - ::log(room > mass ? room : mass)), token};
  }

 private:
  static constexpr int W = Vec<T>::size;
  static constexpr int64_t kBlock = Race<T>::kBlock;

  // The scores, and the largest; false where one is NaN or infinite.
  template <class S>
  bool take(const Branches<S>& row) {
    const Vec<T> infinity(-minus_infinity<T>());
    Vec<T> largest(minus_infinity<T>());
    auto odd = largest == infinity;
    const auto keep = [&](auto at) __attribute__((always_inline)) {
      const Vec<T> score = row.load(at);
      at.keep(scores_.data, score);
      return score;
    };
    const auto see = [&](Vec<T> score) __attribute__((always_inline)) {
      largest = max(score, largest);
      odd = odd | !(score < infinity);
    };
    int64_t i = 0;
    for (; i + W <= n_; i += W) see(keep(At<T>{i}));
    if (i < n_) {
      keep(AtTail<T>{i, int(n_ - i)});
      see(Vec<T>::load(scores_.data + i));  // -inf past the end
    }
    largest_ = max_of(largest);
    return !any(odd);
  }

  double weigh() const {
    const Vec<T> largest(largest_);
    WideSum<T> sum;
    for (int64_t begin = 0; begin < n_; begin += kBlock) {
      Vec<T> part(T(0));
      for (int64_t i = begin; i < begin + kBlock; i += W) {
        const Vec<T> weight = exp_flushed(Vec<T>::load(scores_.data + i) - largest);
        weight.store(weights_.data + i);
        part += weight;
      }
      sum.add(part);
    }
    return sum.total();
  }

  // MASK comes first: where it is likely to stay, few others are looked at.
  template <class S>
  int64_t race(T stay, const Branches<S>& next, const RandomRow& random) const {
    const Vec<T> of_mask = -log1p(-Vec<T>(T(random.uniform(n_))));
    Race<T> race(n_, stay / of_mask[0]);
    for (int64_t begin = 0; begin < n_; begin += kBlock) {
      next.prefetch(begin, kBlock);
      race.enter(weights_.data + begin, begin, [&](PhiloxBlock& words) { Race<T>::make_words(random, begin, words); });
    }
    return race.winner();
  }

  const int64_t n_;
  T largest_ = 0;
  const Scratch<T> scores_, weights_;
};

// Tensors: log_scores, tokens, seed, rates, weights, log-probabilities, what becomes of the tokens.
template <class S>
void step(const Call& call) {
  using T = accumulate_t<S>;
  const View &x = call[0], &weights = call[4];
  const int leading = x.rank - 2;
  const int64_t rows = count(x, leading), size = x.sizes[leading + 1];
  if (rows == 0) return;
  const int64_t of_sample = leading ? rows / x.sizes[0] : 1;
  const RowScalars<const int64_t> tokens = row_scalars<const int64_t>(call[1]);
  const int64_t* const seed = static_cast<const int64_t*>(call[2].data);
  const RowScalars<const T> rates = row_scalars<const T>(call[3]);
  const RowScalars<T> log_probs = row_scalars<T>(call[5]);
  const RowScalars<int64_t> out = row_scalars<int64_t>(call[6]);

  const Scratch<int64_t> masked(rows);
  int64_t n = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = tokens.get(r, 0);
    if (token == size - 1) masked.data[n++] = r;
    out.set(r, token);
    log_probs.set(r, T(0));
  }
  const auto sample = [&](const View& numbers, int64_t r) { return numbers.sizes[0] > 1 ? r / of_sample : 0; };
  const auto branches = [&](int64_t r) {
    const T* const own =
        weights ? static_cast<const T*>(weights.data) + sample(weights, r) * weights.strides[0] : nullptr;
    return Branches<S>{static_cast<const S*>(x.data) + *RowWalk(x, leading, r), x.strides[leading], x.sizes[leading],
                       own};
  };
  parallel_rows(n, (16 + x.sizes[leading]) * size, call.threads, [&](int64_t first, int64_t last) {
    Sampler<T> sampler(size - 1);
    Branches<S> next = branches(masked.data[first]);
    for (int64_t i = first; i < last; ++i) {
      const int64_t r = masked.data[i];
      const Branches<S> row = next;
      next = i + 1 < last ? branches(masked.data[i + 1]) : Branches<S>{};
      const RandomRow random{uint64_t(seed[0]), uint64_t(seed[1]) + uint64_t(r * blocks_of(size, int64_t(4)))};
      const Drawn<T> drawn = sampler.draw(row, next, rates.get(sample(call[3], r), T(0)), random);
      log_probs.set(r, drawn.log_prob);
      out.set(r, drawn.token);
    }
  });
}

}  // namespace absorbing
}  // namespace MMKERN_ISA
}  // namespace mmkern
