// A step of masked iterative decoding: masked_decode_step of mmkern/reference/masked_decode.py.
//
// Masked rows are shared among threads, each sampled as any row of logits; then, of each sample, those of which there
// is most doubt are selected without a sort.
#pragma once

#include <limits>

#include "grid_rows.h"
#include "sample_tokens.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace masked_decode {

namespace setting {
enum { kTopK, kTemperature, kNoise };  // Setting of mmkern/reference/masked_decode.py
}

// Of a uniform number, by the exponential one that the race makes of it.
template <class T>
T gumbel(float v) {
  return -log(-log1p(-Vec<T>(T(v))))[0];
}

template <class S>
class Step {
 public:
  using T = accumulate_t<S>;

  // Tensors: logits, tokens, masked, seed, settings, counts; log-probabilities, tokens, which stay masked.
  explicit Step(const Call& call)
      : logits_(call[0]),
        settings_(call[4]),
        rows_(count(call[0], call[0].rank - 1)),
        size_(call[0].sizes[call[0].rank - 1]),
        of_sample_(call[0].sizes[0] ? rows_ / call[0].sizes[0] : 0),
        threads_(call.threads),
        seed_(static_cast<const int64_t*>(call[3].data)),
        before_(row_scalars<const int64_t>(call[1])),
        masked_(row_scalars<const bool>(call[2])),
        counts_(row_scalars<const int64_t>(call[5])),
        shares_count_(call[5].sizes[0] == 1),
        log_probs_(row_scalars<T>(call[6])),
        tokens_(row_scalars<int64_t>(call[7])),
        stays_(row_scalars<int64_t>(call[8])),
        doubts_(rows_) {}

  void run() const {
    if (rows_ == 0) return;
    const Scratch<int64_t> masked(rows_);
    int64_t n = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      if (masked_.get(r, false)) masked.data[n++] = r;
      tokens_.set(r, before_.get(r, 0));
      log_probs_.set(r, T(0));
      stays_.set(r, 0);
      doubts_.data[r] = minus_infinity<T>();
    }
    parallel_rows(n, 16 * size_, threads_, [&](int64_t first, int64_t last) {
      sampling::Sampler<T> sampler(size_);
      for (int64_t i = first; i < last; ++i) draw(sampler, masked.data[i]);
    });
    const Selection<T> selection(of_sample_);
    for (int64_t b = 0; b < rows_ / of_sample_; ++b) mask_again(selection, b);
  }

 private:
  const T* settings_of(int64_t r) const {
    return static_cast<const T*>(settings_.data) + (settings_.sizes[0] > 1 ? r / of_sample_ * settings_.strides[0] : 0);
  }

  void draw(sampling::Sampler<T>& sampler, int64_t r) const {
    using namespace sampling;
    const T* const settings = settings_of(r);
    const T filters[filter::kCount] = {
        settings[setting::kTopK], settings[setting::kTemperature], T(1), T(0), T(1), T(1)};
    const int64_t counters = blocks_of(size_, int64_t(4));
    const uint64_t key = uint64_t(seed_[0]), offset = uint64_t(seed_[1]);
    const S* const row = static_cast<const S*>(logits_.data) + *RowWalk(logits_, logits_.rank - 1, r);
    const int64_t token = sampler.draw(row, Request<T>{filters, {}, {}, {key, offset + uint64_t(r * counters)}}).token;
    tokens_.set(r, token);
    if (token < 0) {
      log_probs_.set(r, T(__builtin_nan("")));
      doubts_.data[r] = std::numeric_limits<T>::max();
      return;
    }
    const T log_prob = sampler.untempered_log_prob(), noise = settings[setting::kNoise];
    const RandomRow random{key, offset + uint64_t(rows_ * counters)};
    log_probs_.set(r, log_prob);
    const T score = exp_flushed(Vec<T>(log_prob))[0];
    doubts_.data[r] = -(noise > 0 ? score + noise * gumbel<T>(random.uniform(r)) : score);
  }

  void mask_again(const Selection<T>& selection, int64_t b) const {
    const int64_t first = b * of_sample_, wanted = counts_.get(shares_count_ ? 0 : b, 0);
    bool any = false;
    for (int64_t r = first; r < first + of_sample_; ++r) any = any || masked_.get(r, false);
    if (wanted <= 0 || !any) return;
    Boundary<T> boundary = selection.find(doubts_.data + first, nullptr, of_sample_, double(wanted));
    for (int64_t r = first; r < first + of_sample_; ++r) {
      const T doubt = doubts_.data[r];
      if (!(doubt >= boundary.key) || (doubt == boundary.key && boundary.ties-- <= 0)) continue;
      stays_.set(r, 1);
      tokens_.set(r, before_.get(r, 0));
    }
  }

  const View &logits_, &settings_;
  const int64_t rows_, size_, of_sample_;
  const int threads_;
  const int64_t* const seed_;
  const RowScalars<const int64_t> before_;
  const RowScalars<const bool> masked_;
  const RowScalars<const int64_t> counts_;
  const bool shares_count_;
  const RowScalars<T> log_probs_;
  const RowScalars<int64_t> tokens_, stays_;
  const Scratch<T> doubts_;  // -inf where nothing was masked
};

}  // namespace masked_decode
}  // namespace MMKERN_ISA
}  // namespace mmkern
