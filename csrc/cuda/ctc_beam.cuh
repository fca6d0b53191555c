// The likeliest labellings of CTC on CUDA: prefix beam search, mmkern/reference/ctc_beam.py, as csrc/cpu/ctc_beam.h
// does it. A block has a row, frame after frame. What a frame makes of the beam, each prefix that stays and each that
// grows by a label, is one row of numbers, of which the largest are found as those of logits are.
#pragma once

#include "token_selection.cuh"

namespace mmkern {
inline namespace device {

// Laid out alike in mmkern/backends/cuda_ctc.py.
struct CtcBeamArgs {
  const void* log_probs;  // [rows, width, labels]
  i64 row_stride, frame_stride;
  const i64* lengths;  // or null
  float* floats;       // room of a row: Beam
  u64* hashes;
  int* ints;
  float* scores;                 // [rows, nbest]
  i64 *tokens, *counts, *times;  // [rows, nbest, width]; counts [rows, nbest]
  i64 width;
  int labels, beam, blank, nbest;
  float prune;
  Dtype dtype;
};

namespace ctc_beam {

constexpr int kNone = -1;
constexpr u64 kRoot = 0x243f6a8885a308d3ull;  // any

MMKERN_FN u64 hash_of(u64 prefix, int token) {
  u64 h = prefix ^ u64(token + 1) * 0x9e3779b97f4a7c15ull;
  h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9ull;
  h = (h ^ h >> 27) * 0x94d049bb133111ebull;
  return h ^ h >> 31;
}

MMKERN_FN float log_add(float a, float b) {
  const float most = a > b ? a : b, least = a > b ? b : a;
  return most == -infinity() ? most : most + log1pf(expf(least - most));
}

struct Node {
  int parent, token, time;
};

// The prefixes of a beam: the paths that end in blank and in its last token, its hash and that of the one before, and
// where the tree has it.
struct Prefixes {
  float *in_blank, *in_token;
  u64 *hash, *shorter;
  int *last, *node;

  MMKERN_FN void set(int i, float blank, float token, u64 its_hash, u64 its_shorter, int its_last, int its_node) const {
    in_blank[i] = blank, in_token[i] = token;
    hash[i] = its_hash, shorter[i] = its_shorter;
    last[i] = its_last, node[i] = its_node;
  }
};

// A row's room: floats for 7 numbers a prefix and one a candidate, of which there are up to beam·(labels + 1); 4 hashes
// and 5 ints a prefix; and a node of 3 ints for each prefix of each frame, and one.
class Beam {
 public:
  MMKERN_FN Beam(const CtcBeamArgs& a, i64 row) : a_(a), frame_(row * a.row_stride), n_(a.beam), labels_(a.labels) {
    const i64 candidates = i64(n_) * (labels_ + 1);
    float* const floats = a.floats + row * (7 * i64(n_) + candidates);
    u64* const hashes = a.hashes + row * 4 * n_;
    int* const ints = a.ints + row * (5 * i64(n_) + 3 * (i64(n_) * a.width + 1));
    old_ = {floats, floats + n_, hashes, hashes + n_, ints, ints + n_};
    new_ = {floats + 2 * n_, floats + 3 * n_, hashes + 2 * n_, hashes + 3 * n_, ints + 2 * n_, ints + 3 * n_};
    total_ = floats + 4 * n_, stay_blank_ = floats + 5 * n_, stay_token_ = floats + 6 * n_, values_ = floats + 7 * n_;
    shorter_ = ints + 4 * n_;
    nodes_ = reinterpret_cast<Node*>(ints + 5 * n_);
    if (threadIdx.x == 0) {
      nodes_[0] = {kNone, kNone, kNone};
      old_.set(0, 0, -infinity(), kRoot, 0, kNone, 0);
    }
    __syncthreads();
  }

  // One frame more; false where it has NaN or +inf.
  MMKERN_FN bool step(i64 time) {
    if (!look_at(time)) return false;
    add_up();
    stay();
    grow();
    take_over(int(time));
    return true;
  }

  // The likeliest that no call has given yet, after add_up(); the place is -1 where there is none.
  MMKERN_FN Leader next() {
    Leader best{-infinity(), n_};
    for (int i = int(threadIdx.x); i < count_; i += sampling::kThreads) best.take(total_[i], i);
    best = leader_of_block<sampling::kThreads>(best);
    if (best.value == -infinity()) return {best.value, kNone};
    if (threadIdx.x == 0) total_[best.place] = -infinity();
    __syncthreads();
    return {float(offset_ + double(best.value)), old_.node[best.place]};
  }

  MMKERN_FN void add_up() {
    for (int i = int(threadIdx.x); i < count_; i += sampling::kThreads)
      total_[i] = log_add(old_.in_blank[i], old_.in_token[i]);
    __syncthreads();
  }

  // By one thread: the tokens of a node, and how many they are.
  MMKERN_FN i64 write(int node, i64* tokens, i64* times) const {
    i64 count = 0;
    for (int i = node; i > 0; i = nodes_[i].parent) ++count;
    i64 at = count;
    for (int i = node; i > 0; i = nodes_[i].parent) {
      tokens[--at] = nodes_[i].token;
      times[at] = nodes_[i].time;
    }
    return count;
  }

 private:
  // Of a label in this frame; -inf where it is too unlikely to be looked at.
  MMKERN_FN float log_of(int label) const {
    const float log = load_one(a_.log_probs, frame_ + label, a_.dtype);
    return log >= least_ ? log : -infinity();
  }

  MMKERN_FN bool look_at(i64 time) {
    if (time > 0) frame_ += a_.frame_stride;
    Leader best{-infinity(), labels_};
    int odd = 0;
    for (int c = int(threadIdx.x); c < labels_; c += sampling::kThreads) {
      const float log = load_one(a_.log_probs, frame_ + c, a_.dtype);
      odd |= !(log < infinity());
      best.take(log, c);
    }
    best = leader_of_block<sampling::kThreads>(best);
    least_ = a_.prune < best.value ? a_.prune : best.value;
    return !__syncthreads_or(odd);
  }

  // What a prefix has before a token: only what ends in blank where that is its last one.
  MMKERN_FN float ending(int i, int token) const { return old_.last[i] == token ? old_.in_blank[i] : total_[i]; }

  MMKERN_FN void stay() const {
    const float blank = log_of(a_.blank);
    for (int i = int(threadIdx.x); i < count_; i += sampling::kThreads) {
      const int last = old_.last[i];
      int shorter = kNone;
      for (int j = 0; last != kNone && j < count_; ++j)
        if (old_.hash[j] == old_.shorter[i]) shorter = j;
      const float log = last == kNone ? -infinity() : log_of(last);
      float in_token = last == kNone ? -infinity() : old_.in_token[i] + log;
      if (shorter != kNone) in_token = log_add(in_token, ending(shorter, last) + log);
      shorter_[i] = shorter;
      stay_blank_[i] = total_[i] + blank;
      stay_token_[i] = in_token;
      values_[i] = log_add(stay_blank_[i], in_token);
    }
  }

  MMKERN_FN void grow() const {
    float* const grown = values_ + count_;
    for (i64 at = threadIdx.x; at < i64(count_) * labels_; at += sampling::kThreads) {
      const int i = int(at / labels_), label = int(at % labels_);
      grown[at] = label == a_.blank ? -infinity() : ending(i, label) + log_of(label);
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < count_; i += sampling::kThreads)
      if (shorter_[i] != kNone) grown[i64(shorter_[i]) * labels_ + old_.last[i]] = -infinity();
    __syncthreads();
  }

  // The largest candidates become the beam, beside the likeliest.
  MMKERN_FN void take_over(int time) {
    using namespace sampling;
    const LogitRow row{values_, nullptr, count_ * (labels_ + 1), kFloat32, false};
    Leader top;
    const bool is_any = find_top(row, top);
    u64 found = 0;
    if (is_any) {
      Kept kept{0, ~u64(0), 0};
      if (row.size > n_) keep_count(row, double(n_), kept);
      // All candidates weigh 1, but for the impossible.
      for_each_stretch(row, Scale{0, 0}, kept, [&](int first, const float (&z)[kEach], const float (&w)[kEach]) {
        u64 own = 0, total;
        for (int k = 0; k < kEach; ++k) own += w[k] > 0;
        int place = int(found + scan_block(own, total));
        found += total;
        for (int k = 0; k < kEach; ++k)
          if (w[k] > 0) put(place++, first + k, z[k] - top.value, top.value, time);
      });
      offset_ += double(top.value);
    }
    __syncthreads();
    count_ = int(found);
    const Prefixes before = old_;
    old_ = new_;
    new_ = before;
  }

  MMKERN_FN void put(int place, int candidate, float value, float top, int time) const {
    if (candidate < count_) {
      new_.set(place, stay_blank_[candidate] - top, stay_token_[candidate] - top, old_.hash[candidate],
               old_.shorter[candidate], old_.last[candidate], old_.node[candidate]);
      return;
    }
    const int from = (candidate - count_) / labels_, token = (candidate - count_) % labels_;
    const int node = 1 + time * n_ + place;
    nodes_[node] = {old_.node[from], token, time};
    new_.set(place, -infinity(), value, hash_of(old_.hash[from], token), old_.hash[from], token, node);
  }

  const CtcBeamArgs& a_;
  i64 frame_;
  const int n_, labels_;
  int count_ = 1;
  float least_ = 0;
  double offset_ = 0;
  Prefixes old_, new_;
  float *total_, *stay_blank_, *stay_token_, *values_;
  int* shorter_;  // the place of the prefix without the last token, if the beam has it
  Node* nodes_;
};

}  // namespace ctc_beam

__global__ void __launch_bounds__(sampling::kThreads) ctc_beam_decode(const CtcBeamArgs a) {
  const i64 row = blockIdx.x;
  i64 frames = a.lengths ? a.lengths[row] : a.width;
  frames = frames < 0 ? 0 : frames < a.width ? frames : a.width;
  ctc_beam::Beam beam(a, row);
  bool is_odd = false;
  for (i64 t = 0; t < frames && !is_odd; ++t) is_odd = !beam.step(t);
  beam.add_up();
  for (i64 at = row * a.nbest; at < (row + 1) * a.nbest; ++at) {
    __shared__ i64 count;
    const Leader found = is_odd ? Leader{infinity() - infinity(), ctc_beam::kNone} : beam.next();
    if (threadIdx.x == 0) {
      count =
          found.place == ctc_beam::kNone ? 0 : beam.write(found.place, a.tokens + at * a.width, a.times + at * a.width);
      a.scores[at] = found.value;
      a.counts[at] = count;
    }
    __syncthreads();
    for (i64 t = count + i64(threadIdx.x); t < a.width; t += sampling::kThreads)
      a.tokens[at * a.width + t] = a.times[at * a.width + t] = -1;
    __syncthreads();
  }
}

}  // namespace device
}  // namespace mmkern
