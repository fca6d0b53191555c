// Probabilities of tokens: mmkern/reference/probabilities.py.
#pragma once

#include "selection.h"
#include "softmax.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace probabilities {

// ---- The logarithm of one ------------------------------------------------------------------------------------------

// log Σ exp of a row is the sum of both.
template <class T>
struct LogSum {
  T largest, log_sum;
};

// NaN where the row has NaN or +inf, or nothing above -inf.
template <class T, class S>
LogSum<T> log_sum_exp(const S* row, int64_t n) {
  constexpr int W = Vec<T>::size;
  const T infinity = -minus_infinity<T>();
  Vec<T> most(minus_infinity<T>());
  auto odd = most == Vec<T>(infinity);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Vec<T> x = Vec<T>::load(row + i);
    most = max(x, most);
    odd = odd | !(x < Vec<T>(infinity));
  }
  T largest = max_of(most);
  bool is_odd = any(odd);
  for (; i < n; ++i) {
    const T x = T(element(row, i));
    largest = x > largest ? x : largest;
    is_odd = is_odd || !(x < infinity);
  }
  constexpr T kNone = T(__builtin_nan(""));
  if (is_odd || !(largest > minus_infinity<T>())) return {kNone, kNone};
  WideSum<T> sum;
  for_each_vec<T>(n, [&](auto at) { sum.add(at.only(exp_flushed(at.load(row) - Vec<T>(largest)))); });
  return {largest, T(__builtin_log(sum.total()))};
}

// Tensors: logits, tokens, log-probabilities, largest logits, logarithms of sums.
template <class S>
void run_log_prob(const Call& call) {
  using T = accumulate_t<S>;
  const Rows<const S> logits = rows<const S>(call[0]);
  const RowScalars<const int64_t> tokens = row_scalars<const int64_t>(call[1]);
  const RowScalars<T> log_probs = row_scalars<T>(call[2]);
  const RowScalars<T> largest = row_scalars<T>(call[3]), log_sums = row_scalars<T>(call[4]);
  parallel_rows(logits.rows, 4 * logits.cols, call.threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t token = tokens.get(r, 0);
      const LogSum<T> total = log_sum_exp<T>(logits[r], logits.cols);
      largest.set(r, total.largest);
      log_sums.set(r, total.log_sum);
      const bool is_token = token >= 0 && token < logits.cols;
      const T own = is_token ? T(element(logits[r], token)) : T(__builtin_nan(""));
      log_probs.set(r, own - total.largest - total.log_sum);
    }
  });
}

// Tensors: grad, logits, tokens, log-probabilities, largest logits, logarithms of sums, the gradient.
template <class S>
void run_log_prob_backward(const Call& call) {
  using T = accumulate_t<S>;
  const RowScalars<const T> grad = row_scalars<const T>(call[0]);
  const RowScalars<const T> largest = row_scalars<const T>(call[4]), log_sums = row_scalars<const T>(call[5]);
  const Rows<const S> logits = rows<const S>(call[1]);
  const RowScalars<const int64_t> tokens = row_scalars<const int64_t>(call[2]);
  if (!call[6]) return;
  const Rows<S> to = rows<S>(call[6]);
  parallel_rows(logits.rows, 4 * logits.cols, call.threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t token = tokens.get(r, 0);
      const bool is_token = token >= 0 && token < logits.cols;
      const T upstream = is_token ? grad.get(r, T(0)) : T(0), most = largest.get(r, T(0)),
              log_sum = log_sums.get(r, T(0));
      for_each_vec<T>(logits.cols, [&](auto at) {
        const Vec<T> p = exp_flushed(at.load(logits[r]) - Vec<T>(most) - Vec<T>(log_sum));
        at.store(to[r], p * Vec<T>(-upstream));
      });
      if (!is_token) continue;
      const double p = __builtin_exp(element(logits[r], token) - double(most) - double(log_sum));
      set_element(to[r], token, double(upstream) * (1 - p));
    }
  });
}

// ---- Those of the largest ------------------------------------------------------------------------------------------

namespace kept {
enum { kTopK, kTopP };  // Kept of mmkern/reference/probabilities.py
}

// One thread's room for rows of n numbers.
template <class T>
class Renormalizer {
 public:
  explicit Renormalizer(int64_t n) : n_(n), keys_(n + W), left_(n + W), selection_(n) {
    for (int64_t i = n; i < n + W; ++i) keys_.data[i] = left_.data[i] = T(0);
  }

  template <class S>
  void run(const S* row, const T* filters, S* to) const {
    if (!take(row)) return fill(to, T(__builtin_nan("")));
    if (filters[kept::kTopK] < T(n_)) keep(nullptr, double(filters[kept::kTopK]));
    if (!(total() > 0)) return fill(to, T(__builtin_nan("")));
    if (filters[kept::kTopP] < 1) keep(left_.data, double(filters[kept::kTopP]) * total());
    const Vec<T> divisor((T(total())));
    for_each_vec<T>(n_, [&](auto at) { at.store(to, at.load(left_.data) / divisor); });
  }

 private:
  static constexpr int W = Vec<T>::size;

  // False where one is none.
  template <class S>
  bool take(const S* row) const {
    const Vec<T> zero(T(0)), infinity(-minus_infinity<T>());
    auto odd = zero == infinity;
    for_each_vec<T>(n_, [&](auto at) {
      const Vec<T> p = at.load(row);
      odd = odd | !((p >= zero) & (p < infinity));
      at.keep(keys_.data, p);
      at.keep(left_.data, p);
    });
    return !any(odd);
  }
  void keep(const T* weights, double least) const {
    drop_below(selection_.find(keys_.data, weights, n_, least), keys_.data, n_, left_.data, T(0));
  }
  double total() const {
    WideSum<T> sum;
    for (int64_t i = 0; i < n_; i += W) sum.add(Vec<T>::load(left_.data + i));
    return sum.total();
  }
  template <class S>
  void fill(S* to, T value) const {
    for_each_vec<T>(n_, [&](auto at) { at.store(to, Vec<T>(value)); });
  }

  const int64_t n_;
  const Scratch<T> keys_, left_;
  const Selection<T> selection_;
};

// Tensors: probabilities, filters, the result.
template <class S>
void run_renormalize(const Call& call) {
  using T = accumulate_t<S>;
  const Rows<const S> probs = rows<const S>(call[0]);
  const Rows<const T> filters = rows<const T>(call[1]);
  const Rows<S> to = rows<S>(call[2]);
  parallel_rows(probs.rows, 8 * probs.cols, call.threads, [&](int64_t first, int64_t last) {
    const Renormalizer<T> renormalizer(probs.cols);
    for (int64_t b = first; b < last; ++b) renormalizer.run(probs[b], filters[filters.rows == 1 ? 0 : b], to[b]);
  });
}

}  // namespace probabilities
}  // namespace MMKERN_ISA
}  // namespace mmkern
