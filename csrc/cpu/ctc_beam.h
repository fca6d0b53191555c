// The likeliest labellings of CTC: prefix beam search, mmkern/reference/ctc_beam.py.
//
// A prefix has two numbers: of its paths that end in blank, and in its last token. After each frame those of the best
// are taken from all, which stay by a blank or their last token once more, or grow by a token. Numbers are kept beside
// that of the likeliest, so that they keep their digits however long the row is. What grows is held, a vector at a
// time, against the worst that is still among the best; few pass.
//
// Prefixes are told apart by 64 bits of a hash. A prefix is a node of a tree, from which its tokens are read at last.
#pragma once

#include "ctc_greedy.h"
#include "selection.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace ctc {

constexpr int32_t kNone = -1;

struct Node {
  int32_t parent, token, time;
};

// Places for n prefixes.
template <class T>
struct Prefixes {
  explicit Prefixes(int64_t n)
      : in_blank(up_to(Vec<T>::size, n)), in_token(up_to(Vec<T>::size, n)), hash(n), shorter(n), last(n), node(n) {}

  const Scratch<T> in_blank, in_token;
  const Scratch<uint64_t> hash, shorter;  // its own, and that of the prefix without its last token
  const Scratch<int32_t> last, node;
  int64_t count = 0;

  void add(T blank, T token, uint64_t its_hash, uint64_t its_shorter, int32_t its_last, int32_t its_node) {
    in_blank.data[count] = blank, in_token.data[count] = token;
    hash.data[count] = its_hash, shorter.data[count] = its_shorter;
    last.data[count] = its_last, node.data[count++] = its_node;
  }
  // Lanes behind the last one.
  void pad() const {
    for (int64_t i = count; i < up_to(Vec<T>::size, count); ++i)
      in_blank.data[i] = in_token.data[i] = minus_infinity<T>();
  }
};

// Of a prefix with a token more: the finish of splitmix64.
inline uint64_t hash_of(uint64_t prefix, int64_t token) {
  uint64_t h = prefix ^ uint64_t(token + 1) * 0x9e3779b97f4a7c15u;
  h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9u;
  h = (h ^ h >> 27) * 0x94d049bb133111ebu;
  return h ^ h >> 31;
}

// The place of a prefix by its hash.
class Places {
 public:
  explicit Places(int64_t n) : mask_(size_for(n) - 1), places_(mask_ + 1) {}

  void fill(const uint64_t* hashes, int64_t n) {
    hashes_ = hashes;
    for (int64_t i = 0; i <= mask_; ++i) places_.data[i] = kNone;
    for (int64_t i = 0; i < n; ++i) places_.data[slot(hashes[i])] = int32_t(i);
  }
  int32_t find(uint64_t hash) const { return places_.data[slot(hash)]; }

 private:
  static int64_t size_for(int64_t n) {
    int64_t size = 16;
    while (size < 2 * n) size *= 2;
    return size;
  }
  int64_t slot(uint64_t hash) const {
    int64_t at = int64_t(hash) & mask_;
    while (places_.data[at] != kNone && hashes_[places_.data[at]] != hash) at = (at + 1) & mask_;
    return at;
  }
  const int64_t mask_;
  const uint64_t* hashes_ = nullptr;
  const Scratch<int32_t> places_;
};

template <class V>
MMKERN_FN V log_add(V a, V b) {
  const V most = max(a, b), least = min(a, b), none(minus_infinity<decltype(a[0] + a[0])>());
  return select(most == none, none, most + log1p(exp_flushed(least - most)));
}

template <class T>
struct Labelling {
  T score;
  int32_t node;
};

// The search in one row, for a beam of so many prefixes.
template <class T>
class BeamSearch {
 public:
  BeamSearch(int64_t beam, int64_t frames, int64_t labels)
      : beam_(beam),
        labels_(labels),
        most_(4 * beam + 256 + labels),
        one_(beam),
        other_(beam),
        places_(beam),
        total_(up_to(W, beam)),
        grown_into_(up_to(W, beam)),
        stay_blank_(up_to(W, beam)),
        stay_token_(up_to(W, beam)),
        first_(beam),
        next_(beam),
        logs_(labels + W),
        row_(labels + W),
        tokens_(labels + W),
        position_(labels),
        values_(most_ + W),
        sources_(most_),
        grown_by_(most_),
        selection_(most_),
        nodes_(beam * frames + 1) {}

  template <class S>
  void run(const S* rows, int64_t stride, int64_t frames, int64_t blank, T prune) {
    nodes_.data[0] = {kNone, kNone, kNone};
    old_->add(T(0), minus_infinity<T>(), kRoot, 0, kNone, 0);
    for (int64_t t = 0; t < frames; ++t) {
      old_->pad();
      if (!take(rows + t * stride, blank, prune)) return;
      step(t);
    }
    old_->pad();
    add_up();
  }

  // The likeliest of those that no call has given yet, or one that is impossible; NaN where the row is odd.
  Labelling<T> next() {
    if (is_odd_) return {T(__builtin_nan("")), 0};
    int64_t best = 0;
    for (int64_t i = 1; i < old_->count; ++i)
      if (total_.data[i] > total_.data[best]) best = i;
    if (old_->count == 0 || !(total_.data[best] > minus_infinity<T>())) return {minus_infinity<T>(), 0};
    const Labelling<T> found{T(offset_ + double(total_.data[best])), old_->node.data[best]};
    total_.data[best] = minus_infinity<T>();
    return found;
  }
  // The tokens of a node, and how many they are.
  int64_t write(int32_t node, Collapsed to) const {
    for (int32_t i = node; i > 0; i = nodes_.data[i].parent) ++to.count;
    int64_t at = to.count;
    for (int32_t i = node; i > 0; i = nodes_.data[i].parent) {
      to.tokens[--at] = nodes_.data[i].token;
      to.times[at] = nodes_.data[i].time;
    }
    to.pad();
    return to.count;
  }

 private:
  static constexpr int W = Vec<T>::size;
  static constexpr uint64_t kRoot = 0x243f6a8885a308d3u;  // any

  // The frame's labels that are looked at, without blank; false where it has NaN or +inf.
  template <class S>
  bool take(const S* frame, int64_t blank, T prune) {
    const Best<T> best = best_of<T>(frame, labels_);
    is_odd_ = best.is_odd;
    if (is_odd_) return false;
    const T least = prune < best.value ? prune : best.value;
    count_ = 0;
    for (int64_t c = 0; c < labels_; ++c) {
      const T log = T(element(frame, c));
      const bool is_likely = log >= least && log > minus_infinity<T>();
      if (c == blank) blank_ = is_likely ? log : minus_infinity<T>();
      position_.data[c] = is_likely && c != blank ? int32_t(count_) : kNone;
      logs_.data[count_] = log;
      tokens_.data[count_] = int32_t(c);
      count_ += is_likely && c != blank;
    }
    for (int64_t i = count_; i < up_to(W, count_); ++i) logs_.data[i] = minus_infinity<T>();
    likeliest_ = minus_infinity<T>();
    for (int64_t i = 0; i < count_; ++i) likeliest_ = logs_.data[i] > likeliest_ ? logs_.data[i] : likeliest_;
    return true;
  }

  void step(int64_t time) {
    add_up();
    find_shorter();
    stay();
    for (int64_t i = 0; i < old_->count; ++i) grow(i);
    if (found_ > beam_) squeeze();
    take_over(time);
  }

  void add_up() const {
    for (int64_t i = 0; i < old_->count; i += W)
      log_add(Vec<T>::load(old_->in_blank.data + i), Vec<T>::load(old_->in_token.data + i)).store(total_.data + i);
  }

  // Which prefixes grow into which, and with what.
  void find_shorter() {
    places_.fill(old_->hash.data, old_->count);
    for (int64_t i = 0; i < old_->count; ++i) first_.data[i] = kNone;
    for (int64_t i = 0; i < up_to(W, old_->count); ++i) grown_into_.data[i] = minus_infinity<T>();
    for (int64_t i = 0; i < old_->count; ++i) {
      const int32_t last = old_->last.data[i];
      const int32_t shorter = last == kNone ? kNone : places_.find(old_->shorter.data[i]);
      if (shorter == kNone) continue;
      next_.data[i] = first_.data[shorter];
      first_.data[shorter] = int32_t(i);
      const int32_t at = position_.data[last];
      if (at != kNone) grown_into_.data[i] = ending(shorter, last) + logs_.data[at];
    }
  }
  // What a prefix has before a token: only what ends in blank where that is its last one.
  T ending(int64_t i, int32_t token) const {
    return old_->last.data[i] == token ? old_->in_blank.data[i] : total_.data[i];
  }

  void stay() {
    for (int64_t i = 0; i < up_to(W, old_->count); ++i) {
      const int32_t last = i < old_->count ? old_->last.data[i] : kNone,
                    at = last == kNone ? kNone : position_.data[last];
      stay_token_.data[i] = at == kNone ? minus_infinity<T>() : old_->in_token.data[i] + logs_.data[at];
    }
    const Vec<T> blank(blank_);
    found_ = 0;
    for (int64_t i = 0; i < old_->count; i += W) {
      const Vec<T> in_blank = Vec<T>::load(total_.data + i) + blank;
      const Vec<T> in_token = log_add(Vec<T>::load(stay_token_.data + i), Vec<T>::load(grown_into_.data + i));
      in_blank.store(stay_blank_.data + i);
      in_token.store(stay_token_.data + i);
      log_add(in_blank, in_token).store(values_.data + i);
    }
    T worst = -minus_infinity<T>();
    for (int64_t i = 0; i < old_->count; ++i) {
      if (!(values_.data[i] > minus_infinity<T>())) continue;
      values_.data[found_] = values_.data[i];
      worst = values_.data[i] < worst ? values_.data[i] : worst;
      sources_.data[found_] = int32_t(i);
      grown_by_.data[found_++] = kNone;
    }
    bar_ = found_ == beam_ ? worst : minus_infinity<T>();
  }

  void grow(int64_t i) {
    if (!(total_.data[i] + likeliest_ > bar_)) return;
    if (found_ + count_ > most_) squeeze();
    const Vec<T> total(total_.data[i]);
    for (int64_t at = 0; at < count_; at += W) (total + Vec<T>::load(logs_.data + at)).store(row_.data + at);
    const int32_t last = old_->last.data[i];
    if (last != kNone && position_.data[last] != kNone)
      row_.data[position_.data[last]] = old_->in_blank.data[i] + logs_.data[position_.data[last]];
    for (int32_t longer = first_.data[i]; longer != kNone; longer = next_.data[longer]) {
      const int32_t at = position_.data[old_->last.data[longer]];
      if (at != kNone) row_.data[at] = minus_infinity<T>();
    }
    const Vec<T> bar(bar_);
    for (int64_t at = 0; at < count_; at += W) {
      for (uint64_t bits = bits_of(Vec<T>::load(row_.data + at) > bar); bits; bits &= bits - 1) {
        const int64_t passed = at + __builtin_ctzll(bits);
        values_.data[found_] = row_.data[passed];
        sources_.data[found_] = int32_t(i);
        grown_by_.data[found_++] = tokens_.data[passed];
      }
    }
  }

  // The best of those that were found, in their order.
  void squeeze() {
    if (found_ <= beam_) return;
    Boundary<T> boundary = selection_.find(values_.data, nullptr, found_, double(beam_));
    int64_t kept = 0;
    for (int64_t i = 0; i < found_; ++i) {
      const T value = values_.data[i];
      const bool is_tie = value == boundary.key, is_kept = value > boundary.key || (is_tie && boundary.ties > 0);
      boundary.ties -= is_tie;
      values_.data[kept] = value;
      sources_.data[kept] = sources_.data[i];
      grown_by_.data[kept] = grown_by_.data[i];
      kept += is_kept;
    }
    found_ = kept;
    bar_ = boundary.key;
  }

  // What was found becomes the beam, beside the likeliest.
  void take_over(int64_t time) {
    T top = minus_infinity<T>();
    for (int64_t i = 0; i < found_; ++i) top = values_.data[i] > top ? values_.data[i] : top;
    new_->count = 0;
    for (int64_t i = 0; i < found_; ++i) {
      const int32_t from = sources_.data[i], token = grown_by_.data[i], node = old_->node.data[from];
      if (token == kNone) {
        new_->add(stay_blank_.data[from] - top, stay_token_.data[from] - top, old_->hash.data[from],
                  old_->shorter.data[from], old_->last.data[from], node);
      } else {
        nodes_.data[node_count_] = {node, token, int32_t(time)};
        new_->add(minus_infinity<T>(), values_.data[i] - top, hash_of(old_->hash.data[from], token),
                  old_->hash.data[from], token, int32_t(node_count_++));
      }
    }
    if (found_) offset_ += double(top);
    Prefixes<T>* const before = old_;
    old_ = new_;
    new_ = before;
  }

  const int64_t beam_, labels_, most_;
  Prefixes<T> one_, other_, *old_ = &one_, *new_ = &other_;
  Places places_;
  const Scratch<T> total_, grown_into_, stay_blank_, stay_token_;
  const Scratch<int32_t> first_, next_;  // of those that a prefix grows into
  const Scratch<T> logs_, row_;          // of labels that are looked at
  const Scratch<int32_t> tokens_, position_;
  const Scratch<T> values_;  // of what was found
  const Scratch<int32_t> sources_, grown_by_;
  const Selection<T> selection_;
  const Scratch<Node> nodes_;
  int64_t count_ = 0, found_ = 0, node_count_ = 1;
  T blank_ = 0, likeliest_ = 0, bar_ = 0;
  double offset_ = 0;
  bool is_odd_ = false;
};

// Tensors: log-probabilities, lengths; scores, tokens, lengths, times. Numbers: beam, blank, nbest, prune.
template <class S>
void run_beam(const Call& call) {
  using T = accumulate_t<S>;
  const View& from = call[0];
  const int64_t frames = from.sizes[1], nbest = int64_t(call.scalars[2]);
  const RowScalars<const int64_t> lengths = row_scalars<const int64_t>(call[1]);
  T* const scores = static_cast<T*>(call[2].data);
  int64_t* const tokens = static_cast<int64_t*>(call[3].data);
  int64_t* const counts = static_cast<int64_t*>(call[4].data);
  int64_t* const times = static_cast<int64_t*>(call[5].data);
  parallel_blocks(from.sizes[0], call.threads, [&](int64_t b) {
    const S* const rows = static_cast<const S*>(from.data) + b * from.strides[0];
    const int64_t n = frames_of(lengths, b, frames);
    BeamSearch<T> search(int64_t(call.scalars[0]), n, from.sizes[2]);
    search.run(rows, from.strides[1], n, int64_t(call.scalars[1]), T(call.scalars[3]));
    for (int64_t at = b * nbest; at < (b + 1) * nbest; ++at) {
      const Labelling<T> found = search.next();
      scores[at] = found.score;
      counts[at] = search.write(found.node, Collapsed{tokens + at * frames, times + at * frames, frames, 0});
    }
  });
}

}  // namespace ctc
}  // namespace MMKERN_ISA
}  // namespace mmkern
