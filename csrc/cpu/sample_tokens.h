// A token of each row of logits: sample_tokens of mmkern/reference/decoding.py.
//
// Where the k largest are few, one pass over the row finds them, and all else is done with them alone. Else weights are
// made of the whole row, and those of tokens that a filter drops become 0. Random numbers are made for blocks of tokens
// of which one is left.
#pragma once

#include <optional>

#include "race.h"
#include "selection.h"
#include "topk.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace sampling {

namespace filter {
enum { kTopK, kTemperature, kTopP, kMinP, kTypicalP, kPenalty, kCount };  // Filter of mmkern/reference/decoding.py
}

struct Words {
  const int64_t* data;
  int64_t n;
};

// Of row b of [B or 1, n]; none where the tensor is not there.
inline Words words_of_row(const View& view, int64_t b) {
  if (!view) return {nullptr, 0};
  return {static_cast<const int64_t*>(view.data) + (view.sizes[0] > 1 ? b * view.strides[0] : 0), view.sizes[1]};
}

template <class T>
struct Drawn {
  T log_prob;
  int64_t token;
};

// What a row is drawn by.
template <class T>
struct Request {
  const T* filters;
  Words history, allowed;
  RandomRow random;
};

// One thread's room for rows of n logits.
template <class T>
class Sampler {
 public:
  explicit Sampler(int64_t n) : n_(n), logits_(n + kMargin), weights_(n + kMargin), selection_(n < kFew ? kFew : n) {}

  template <class S>
  Drawn<T> draw(const S* row, const Request<T>& request) {
    const T* const filters = request.filters;
    if (!take(row, request)) return {T(__builtin_nan("")), -1};
    weigh(filters[filter::kTemperature]);
    if (filters[filter::kTopP] < 1) keep_mass(filters[filter::kTopP] * mass_);
    if (filters[filter::kMinP] > 0) keep_likely(filters[filter::kMinP]);
    if (filters[filter::kTypicalP] < 1) keep_typical(filters[filter::kTypicalP]);
    chosen_ = filters[filter::kTemperature] == 0 ? likeliest() : race(request);
    return {T(double(shifted(logits_.data[chosen_])) - __builtin_log(mass())), token(chosen_)};
  }

  // Of the token that was drawn last, among the k largest at a temperature of 1.
  T untempered_log_prob() const {
    const Vec<T> largest(largest_);
    WideSum<T> sum;
    for (int64_t i = 0; i < count_; i += W) sum.add(exp_flushed(Vec<T>::load(logits_.data + i) - largest));
    return T(double(logits_.data[chosen_]) - double(largest_) - __builtin_log(sum.total()));
  }

 private:
  static constexpr int W = Vec<T>::size;
  static constexpr int64_t kFew = 256, kBlock = Race<T>::kBlock;
  static constexpr int64_t kMargin = kFew + kBlock;

  // For topk::Best.
  struct Logits {
    static constexpr bool kNanFirst = true;
    T bar(T rank) const { return rank; }
  };

  int64_t token(int64_t i) const { return are_few_ ? tokens_[i] : i; }
  T shifted(T logit) const { return (logit - largest_) * inverse_; }

  // The logits of the k largest, or of all; false where there is no token, or a number that none can be told by.
  template <class S>
  bool take(const S* row, const Request<T>& request) {
    const T top_k = request.filters[filter::kTopK];
    const bool is_changed = request.history.n > 0 || request.allowed.data;
    const int64_t k = top_k < T(n_) ? int64_t(top_k) : n_;
    are_few_ = k < n_ && k <= kFew;
    if (is_changed || !are_few_) {
      for_each_vec<T>(n_, [&](auto at) { at.keep(logits_.data, at.load(row)); });
      penalize(row, request);
      forbid(request.allowed);
    }
    if (are_few_) {
      is_changed ? take_best(logits_.data, k) : take_best(row, k);
    } else {
      count_ = n_;
    }
    for (int64_t i = count_; i < up_to(kBlock, count_); ++i) logits_.data[i] = minus_infinity<T>();
    if (!find_largest()) return false;
    if (!are_few_ && k < n_) keep_count(k);
    return true;
  }

  template <class S>
  void penalize(const S* row, const Request<T>& request) {
    const T penalty = request.filters[filter::kPenalty];
    for (int64_t i = 0; i < request.history.n; ++i) {
      const int64_t token = request.history.data[i];
      if (token < 0 || token >= n_) continue;
      const T logit = T(element(row, token));  // of the row: a token may have been there before
      logits_.data[token] = logit > 0 ? logit / penalty : logit * penalty;
    }
  }

  void forbid(Words allowed) {
    if (!allowed.data) return;
    for (int64_t begin = 0; begin < n_; begin += 64) {
      const uint64_t word = begin / 64 < allowed.n ? uint64_t(allowed.data[begin / 64]) : 0;
      if (word == ~uint64_t(0)) continue;
      const int64_t end = smaller(begin + 64, n_);
      for (int64_t i = begin; i < end; ++i)
        if (!(word >> (i - begin) & 1)) logits_.data[i] = minus_infinity<T>();
    }
  }

  // The k largest of a row, in the order of their indices.
  template <class S>
  void take_best(const S* row, int64_t k) {
    const Logits metric;
    topk::Best<T, true> best({k, values_, tokens_}, 0, 0);
    T bar = best.bar(metric);
    const auto offer = [&](auto keys, int64_t begin, int lanes) {
      if (all(keys <= decltype(keys)(bar))) return;  // NaN is not
      for (int lane = 0; lane < lanes; ++lane) {
        const T key = keys[lane];
        if (key <= bar) continue;
        best.offer(key, begin + lane);
        bar = best.bar(metric);
      }
    };
    constexpr int kWide = 4 * W;
    int64_t i = 0;
    for (; i + kWide <= n_; i += kWide) offer(Vec<T, 4>::load(row + i), i, kWide);
    for (; i < n_; i += W) {
      const int lanes = int(smaller(W, n_ - i));
      offer(Vec<T>::load(row + i, lanes), i, lanes);
    }
    sort_by_token(k);
    for (count_ = 0; count_ < k; ++count_) logits_.data[count_] = values_[count_];
  }

  void sort_by_token(int64_t k) {
    for (int64_t i = 1; i < k; ++i) {
      const int64_t token = tokens_[i];
      const T value = values_[i];
      int64_t at = i;
      for (; at > 0 && tokens_[at - 1] > token; --at) {
        tokens_[at] = tokens_[at - 1];
        values_[at] = values_[at - 1];
      }
      tokens_[at] = token;
      values_[at] = value;
    }
  }

  bool find_largest() {
    Vec<T> largest(minus_infinity<T>());
    const Vec<T> infinity(-minus_infinity<T>());
    auto odd = largest == infinity;
    for (int64_t i = 0; i < count_; i += W) {
      const Vec<T> logit = Vec<T>::load(logits_.data + i);
      largest = max(logit, largest);
      odd = odd | !(logit < infinity);
    }
    largest_ = max_of(largest);
    return !any(odd) && largest_ > minus_infinity<T>();
  }

  void weigh(T temperature) {
    inverse_ = temperature == 0 ? T(1) : T(1) / temperature;
    const Vec<T> largest(largest_), inverse(inverse_);
    WideSum<T> sum;
    for (int64_t i = 0; i < up_to(kBlock, count_); i += W) {
      const Vec<T> weight = exp_flushed((Vec<T>::load(logits_.data + i) - largest) * inverse);
      weight.store(weights_.data + i);
      sum.add(weight);
    }
    mass_ = sum.total();
  }

  double mass() const {
    WideSum<T> sum;
    for (int64_t i = 0; i < count_; i += W) sum.add(Vec<T>::load(weights_.data + i));
    return sum.total();
  }

  // Of the largest ones.
  void keep_count(int64_t k) {
    drop_below(selection_.find(logits_.data, nullptr, count_, double(k)), logits_.data, count_, logits_.data,
               minus_infinity<T>());
  }
  void keep_mass(double least) {
    drop_below(selection_.find(logits_.data, weights_.data, count_, least), logits_.data, count_, weights_.data, T(0));
  }

  void keep_likely(T least) {
    for (int64_t i = 0; i < count_; i += W) {
      const Vec<T> weight = Vec<T>::load(weights_.data + i);
      select(weight >= Vec<T>(least), weight, Vec<T>(T(0))).store(weights_.data + i);
    }
  }

  // Those whose surprise is nearest to the entropy, told in double: differences of near ones would drown in rounding.
  void keep_typical(double share) {
    if (!typical_) typical_.emplace(n_);
    const Typical& typical = *typical_;
    const double total = mass(), log_total = __builtin_log(total);
    double entropy = 0;
    int64_t n = 0;
    for (int64_t i = 0; i < count_; ++i) {
      if (weights_.data[i] == 0) continue;
      const double surprise = log_total - (double(logits_.data[i]) - double(largest_)) * double(inverse_);
      entropy += double(weights_.data[i]) / total * surprise;
      typical.places.data[n] = i;
      typical.weights.data[n] = double(weights_.data[i]);
      typical.keys.data[n++] = surprise;
    }
    for (int64_t i = 0; i < n; ++i) typical.keys.data[i] = -__builtin_fabs(typical.keys.data[i] - entropy);
    Boundary<double> bound = typical.selection.find(typical.keys.data, typical.weights.data, n, share * total);
    for (int64_t i = 0; i < n; ++i) {
      const double key = typical.keys.data[i];
      const bool is_tie = key == bound.key;
      if (!(key > bound.key) && !(is_tie && bound.ties > 0)) weights_.data[typical.places.data[i]] = 0;
      bound.ties -= is_tie;
    }
  }

  int64_t likeliest() const {
    int64_t i = 0;
    while (!(logits_.data[i] == largest_)) ++i;
    return i;
  }

  int64_t race(const Request<T>& request) const {
    Race<T> race;
    for (int64_t begin = 0; begin < count_; begin += kBlock)
      race.enter(weights_.data + begin, begin, [&](PhiloxBlock& words) { make_words(request, begin, words); });
    return race.winner();
  }

  void make_words(const Request<T>& request, int64_t begin, PhiloxBlock& words) const {
    if (!are_few_) return Race<T>::make_words(request.random, begin, words);
    PhiloxBlock made;
    for (unsigned& word : words.word) word = 0;
    for (int64_t at = 0; at < kBlock && begin + at < count_; at += PhiloxBlock::kCounters) {
      const int64_t* const tokens = tokens_ + begin + at;
      made.fill(request.random.key, [&](int i) { return request.random.first + uint64_t(tokens[i]) / 4; });
      for (int i = 0; i < PhiloxBlock::kCounters; ++i) words.word[at + i] = made.word[4 * i + tokens[i] % 4];
    }
  }

  // Room for what is told in double.
  struct Typical {
    explicit Typical(int64_t n) : keys(n), weights(n), places(n), selection(n) {}
    const Scratch<double> keys, weights;
    const Scratch<int64_t> places;
    const Selection<double> selection;
  };

  const int64_t n_;
  int64_t count_ = 0;  // tokens that are looked at
  int64_t chosen_ = 0;
  bool are_few_ = false;
  T largest_ = 0, inverse_ = 1;
  double mass_ = 0;  // of all weights
  T values_[kFew];
  int64_t tokens_[kFew + PhiloxBlock::kCounters] = {};
  const Scratch<T> logits_, weights_;
  const Selection<T> selection_;
  std::optional<Typical> typical_;
};

// Tensors: logits, seed, filters, history, allowed, log-probabilities, tokens.
template <class S>
void run(const Call& call) {
  using T = accumulate_t<S>;
  const Rows<const S> logits = rows<const S>(call[0]);
  const Rows<const T> filters = rows<const T>(call[2]);
  const Rows<const int64_t> seeds = rows<const int64_t>(call[1]);
  const bool shares_seed = seeds.rows == 1, shares_filters = filters.rows == 1;
  const RowScalars<T> log_probs = row_scalars<T>(call[5]);
  const RowScalars<int64_t> tokens = row_scalars<int64_t>(call[6]);
  parallel_rows(logits.rows, 16 * logits.cols, call.threads, [&](int64_t first, int64_t last) {
    Sampler<T> sampler(logits.cols);
    for (int64_t b = first; b < last; ++b) {
      const int64_t* const seed = seeds[shares_seed ? 0 : b];
      const int64_t before = shares_seed ? b * blocks_of(logits.cols, int64_t(4)) : 0;
      const Drawn<T> drawn =
          sampler.draw(logits[b], Request<T>{filters[shares_filters ? 0 : b],
                                             words_of_row(call[3], b),
                                             words_of_row(call[4], b),
                                             {uint64_t(seed[0]), uint64_t(seed[1]) + uint64_t(before)}});
      log_probs.set(b, drawn.log_prob);
      tokens.set(b, drawn.token);
    }
  });
}

}  // namespace sampling
}  // namespace MMKERN_ISA
}  // namespace mmkern
