// The cross-entropy of all rows and its gradients, from one pass over their logits: linear_cross_entropy of
// mmkern/reference/vocabulary.py. A chunk of rows sees all tokens, keeps its logits, and knows what they are worth.
//
// Products of N x V x D: three, where a backward of its own needs four; for that the tokens are read twice for each
// chunk, and their gradient is read and written. The logits of a chunk are kept: a quarter of the rows, up to 512.
#pragma once

#include "vocabulary_gradients.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace vocabulary {

// As many rows as a chunk has, where there are n: in tiles of 128, or of 64 where that would be too many.
inline int64_t kept_rows(int64_t n) { return n < 512 ? 64 : smaller(n / 512 * 128, kMostRows); }

// The loss of a row, by what LogSums finds of it.
template <class T>
class Loss {
 public:
  struct Row {
    double loss;
    typename Upstream<T>::Row upstream;
  };

  Loss(const Problem<T>& p, double label_smoothing, double z_loss, bool mean) : p_(p), smoothing_(label_smoothing) {
    double weights = 0, all_weights = p.token_weights ? 0 : double(p.tokens);
    for (int64_t i = 0; i < p.rows; ++i) weights += weight_of(p.row.data[i]);
    for (int64_t v = 0; p.token_weights && v < p.tokens; ++v) all_weights += double(p.token_weights[v]);
    per_weight_ = mean ? 1 / weights : 1;
    z_loss_ = mean ? z_loss / double(p.rows) : z_loss;
    of_total_ = label_smoothing / double(p.tokens) * per_weight_;
    of_log_ = of_total_ * all_weights;
  }

  Row at(int64_t row, T others, T positive, T total) const {
    const double weight = (1 - smoothing_) * weight_of(row) * per_weight_;
    const double n = others, p = positive, gap = n - p;
    const double less = ::exp(gap < 0 ? gap : -gap), softplus = (gap > 0 ? gap : 0) + ::log1p(less);
    const double wrong = (gap < 0 ? less : 1) / (1 + less), right = (gap < 0 ? 1 : less) / (1 + less);
    double loss = weight * softplus, of_log = 0;
    if (of_log_ != 0 || z_loss_ != 0) {
      const double log = p + softplus;  // of all logits
      loss += of_log_ * log - of_total_ * double(total) + z_loss_ * log * log;
      of_log = of_log_ + 2 * z_loss_ * log;
    }
    return {loss, {T((weight + of_log) * wrong), T(of_log * right - weight * wrong), T(-of_total_), others, positive}};
  }

 private:
  double weight_of(int64_t row) const {
    const int64_t token = p_.target[row];
    return token < 0 || token >= p_.tokens ? 1 : double(p_.token_weight(token));
  }

  const Problem<T>& p_;
  const double smoothing_;
  double per_weight_, z_loss_, of_total_, of_log_;
};

// Tensors: the problem's, the loss, and its gradients for input, linear_weight and linear_bias (of none without
// elements). Scalars: the softcap, ignore_index, label_smoothing, z_loss, whether the mean is taken.
template <class T, int kCols>
void loss_with_gradients(const Call& call, const Problem<T>& p) {
  const double label_smoothing = call.scalars[2];
  const bool mean = call.scalars[4] != 0;
  const Loss<T> loss(p, label_smoothing, call.scalars[3], mean);
  const View none{};
  Chunk<T> chunk(p, kept_rows(p.rows));
  LogSums<T> sums(p, chunk.most(), label_smoothing != 0);
  using Kept = Gradients<T, kCols>;
  const Kept gradients(p, chunk, true, call[6], call[7], p.bias ? call[8] : none);
  double total = mean && p.rows == 0 ? __builtin_nan("") : 0;
  for (int64_t c = 0; c < chunk.chunks(); ++c) {
    chunk.take(c);
    sums.find(chunk, kCols, Kept::ld, [&](int64_t token, int64_t i0) { return gradients.tile(token, i0); });
    for (int64_t i = 0; i < chunk.count; ++i) {
      const auto row = loss.at(chunk.row(i), sums.others(i), sums.positive(i), sums.total(i));
      total += row.loss;
      gradients.upstream.set(i, row.upstream);
    }
    gradients.take_rows();
    p.with_tokens([&](const auto& tokens) {
      for (int64_t panel = 0; panel < p.tokens; panel += p.panel_tokens()) gradients.differentiate(tokens, panel);
    });
  }
  for (int64_t panel = 0; panel < p.tokens; panel += p.panel_tokens())
    gradients.finish_tokens(panel, smaller(p.panel_tokens(), p.tokens - panel));
  gradients.finish_rows();
  *static_cast<T*>(call[5].data) = T(total);
}

template <class T>
void loss_with_gradients(const Call& call) {
  const Problem<T> p(call, 0, call.scalars[0], 1, call.scalars[1]);
  kept_rows(p.rows) < 128 ? loss_with_gradients<T, 64>(call, p) : loss_with_gradients<T, 128>(call, p);
}

}  // namespace vocabulary
}  // namespace MMKERN_ISA
}  // namespace mmkern
