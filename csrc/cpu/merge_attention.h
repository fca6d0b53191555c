// The merge of two results of one attention over different keys: out = w a + v b with w = exp(lse_a - lse),
// v = exp(lse_b - lse). The weights of a block of rows with one lane a row, then the rows.
//
// Backward, with g' the gradient of lse:  a' = w g   b' = v g   lse_a' = w (v g.(a - b) + g')
//                                         lse_b' = v (w g.(b - a) + g')
#pragma once

#include "grid_rows.h"
#include "row_ops.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace merge {

enum Weight { kFirst, kOther, kLse, kWeights };

// Scalar: w = exp(lses[0] - lse), v = exp(lses[1] - lse), lse = log(exp(lses[0]) + exp(lses[1])); 0, 0 and -inf where
// both lses are -inf.
template <class T>
void weigh(const Lanes<T, 2>& lses, Lanes<T, kWeights>& out) {
  using V = Vec<T>;
  const V none(-T(__builtin_inf())), zero(T(0)), one(T(1)), a = lses.get(kFirst), b = lses.get(kOther);
  V top = max(a, b);
  top = select(top == none, zero, top);
  const V of_a = exp(a - top), of_b = exp(b - top), total = of_a + of_b;
  const auto sees_none = total == zero;
  const V divisor = select(sees_none, one, total);
  out.put(kFirst, of_a / divisor);
  out.put(kOther, of_b / divisor);
  out.put(kLse, select(sees_none, none, top + log(divisor)));
}

// Two parts, walked together.
template <class S>
struct Parts {
  using T = accumulate_t<S>;

  Parts(const Call& call, int at, int leading, int64_t row)
      : a(call[at], leading, row),
        a_lse(call[at + 1], leading, row),
        b(call[at + 2], leading, row),
        b_lse(call[at + 3], leading, row) {}

  void read_lse(Lanes<T, 2>& lses, int r) {
    lses.at(kFirst, r) = **a_lse;
    lses.at(kOther, r) = **b_lse;
    ++a_lse;
    ++b_lse;
  }

  GridRows<const S> a;
  GridRows<const T> a_lse;
  GridRows<const S> b;
  GridRows<const T> b_lse;
};

template <class T>
bool has_keys(T lse) {
  return lse != -T(__builtin_inf());
}

// Tensors: out, lse, other, other_lse, merged, merged_lse.
template <class S>
void merge_rows(const Call& call) {
  using T = accumulate_t<S>;
  const int leading = call[0].rank - 1;
  const int64_t rows = count(call[0], leading), cols = call[0].sizes[leading];
  for_each_run_of_blocks<T>(rows, 3 * cols + 8, call.threads, [&](auto block, int64_t blocks) {
    Parts<S> parts(call, 0, leading, block(0).first);
    GridRows<S> to(call[4], leading, block(0).first);
    GridRows<T> lse_to(call[5], leading, block(0).first);
    for (int64_t i = 0; i < blocks; ++i) {
      Lanes<T, 2> lses;
      Lanes<T, kWeights> weights;
      const int n = block(i).n;
      for (int r = 0; r < n; ++r) parts.read_lse(lses, r);
      weigh(lses, weights);
      for (int r = 0; r < n; ++r, ++parts.a, ++parts.b, ++to, ++lse_to) {
        **lse_to = weights.at(kLse, r);
        const S *a = *parts.a, *b = *parts.b;
        S* const out = *to;
        const Vec<T> w(weights.at(kFirst, r)), v(weights.at(kOther, r));
        const bool has_a = has_keys(lses.at(kFirst, r)), has_b = has_keys(lses.at(kOther, r));
        if (has_a && has_b) {
          for_each_vec<T>(cols, [&](auto at) { at.store(out, fma(w, at.load(a), v * at.load(b))); });
        } else if (has_a || has_b) {
          const S* const only = has_a ? a : b;
          const Vec<T> weight = has_a ? w : v;  // 1, or NaN
          for_each_vec<T>(cols, [&](auto at) { at.store(out, weight * at.load(only)); });
        } else {
          for_each_vec<T>(cols, [&](auto at) { at.store(out, Vec<T>(T(0))); });
        }
      }
    }
  });
}

// Tensors: grad, grad_lse, out, lse, other, other_lse, and the gradients of the last four.
template <class S>
void merge_rows_backward(const Call& call) {
  using T = accumulate_t<S>;
  const int leading = call[0].rank - 1;
  const int64_t rows = count(call[0], leading), cols = call[0].sizes[leading];
  for_each_run_of_blocks<T>(rows, 5 * cols + 8, call.threads, [&](auto block, int64_t blocks) {
    const int64_t first = block(0).first;
    GridRows<const S> grad(call[0], leading, first);
    GridRows<const T> grad_lse(call[1], leading, first);
    Parts<S> parts(call, 2, leading, first);
    GridRows<S> a_to(call[6], leading, first), b_to(call[8], leading, first);
    GridRows<T> a_lse_to(call[7], leading, first), b_lse_to(call[9], leading, first);
    for (int64_t i = 0; i < blocks; ++i) {
      Lanes<T, 2> lses;
      Lanes<T, kWeights> weights;
      const int n = block(i).n;
      for (int r = 0; r < n; ++r) parts.read_lse(lses, r);
      weigh(lses, weights);
      for (int r = 0; r < n; ++r) {
        const S *g = *grad, *a = *parts.a, *b = *parts.b;
        S *const to_a = *a_to, *const to_b = *b_to;
        const T w = weights.at(kFirst, r), v = weights.at(kOther, r);
        const bool has_a = has_keys(lses.at(kFirst, r)), has_b = has_keys(lses.at(kOther, r));
        const Vec<T> zero(T(0));
        const auto sums = reduce_row<T, 1>(cols, [&](auto at, Vec<T>* acc) {
          const Vec<T> h = at.load(g);
          if (has_a && has_b) acc[0] = fma(h, at.load(a) - at.load(b), acc[0]);
          if (to_a) at.store(to_a, has_a ? Vec<T>(w) * h : zero);
          if (to_b) at.store(to_b, has_b ? Vec<T>(v) * h : zero);
        });
        const T gain = sums.total(0);  // g.(a - b)
        if (*a_lse_to) **a_lse_to = has_a ? w * (v * gain + **grad_lse) : T(0);
        if (*b_lse_to) **b_lse_to = has_b ? v * (**grad_lse - w * gain) : T(0);
        ++grad, ++grad_lse, ++parts.a, ++parts.b, ++a_to, ++b_to, ++a_lse_to, ++b_lse_to;
      }
    }
  });
}

inline void forward(const Call& call) {
  with_storage(call[0].dtype, [&](auto s) { merge_rows<typename decltype(s)::type>(call); });
}
inline void backward(const Call& call) {
  with_storage(call[0].dtype, [&](auto s) { merge_rows_backward<typename decltype(s)::type>(call); });
}

}  // namespace merge
}  // namespace MMKERN_ISA
}  // namespace mmkern
