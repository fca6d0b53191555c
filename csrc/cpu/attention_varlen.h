// Attention of packed sequences: each segment is a call of its own on views into the whole.
#pragma once

#include "attention_backward.h"
#include "attention_decode.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace attention {

inline thread_local ThreadBuffer segment_rows;

// Tensors: q, k, v [T, H, D], cu_seqlens_q, cu_seqlens_k, prefix_lengths, seed, from `at` on in the call. Scalars:
// max_seqlen_q, max_seqlen_k, then those of a problem. See mmkern/reference/attention.py.
template <class T>
class Packed {
 public:
  static constexpr int kInputs = 7;

  Packed(const Call& call, int at)
      : call_(call),
        first_(at),
        query_ends_(static_cast<const int64_t*>(call[at + 3].data)),
        key_ends_(static_cast<const int64_t*>(call[at + 4].data)),
        prefixes_(static_cast<const int64_t*>(call[at + 5].data)),
        seed_(static_cast<const int64_t*>(call[at + 6].data)) {}

  int64_t segments() const { return call_[first_ + 3].sizes[0] - 1; }
  int64_t heads() const { return call_[first_].sizes[1]; }
  int64_t queries() const { return call_[first_].sizes[0]; }
  KeyRange queries(int64_t b) const { return {query_ends_[b], query_ends_[b + 1]}; }
  KeyRange keys(int64_t b) const { return {key_ends_[b], key_ends_[b + 1]}; }

  // f(b, threads) for each segment: shared out among the threads, or one after another with all threads in each.
  template <class F>
  void for_each_segment(F f) const {
    const View &q = call_[first_], &k = call_[first_ + 1], &v = call_[first_ + 2];
    const int64_t keys = segments() ? k.sizes[0] / segments() : 0;
    const int64_t work = q.sizes[0] * q.sizes[1] * keys * (q.sizes[2] + v.sizes[2]) / Vec<T>::size;
    const bool by_segment = segments() >= 2 * call_.threads && is_parallel(work, call_.threads);
    parallel_blocks(segments(), by_segment ? call_.threads : 1,
                    [&](int64_t b) { f(b, by_segment ? 1 : call_.threads); });
  }

  // The problem of segment b, from tensor `at` on of a call of its own; `seed` is room for its seed.
  void put(int64_t b, Call& call, int at, int64_t (&seed)[2]) const {
    const KeyRange of_q = queries(b), of_k = keys(b);
    call.tensors[at] = rows(call_[first_], of_q);
    call.tensors[at + 1] = rows(call_[first_ + 1], of_k);
    call.tensors[at + 2] = rows(call_[first_ + 2], of_k);
    if (prefixes_) call.tensors[at + 7] = numbers(prefixes_ + b, 1);
    if (seed_) {
      const int64_t fours = (int64_t(call_.scalars[1]) + 3) / 4;
      seed[0] = seed_[0];
      seed[1] = seed_[1] + of_q.first * heads() * fours;
      call.tensors[at + 8] = numbers(seed, 2);
    }
    for (int i = 0; i < 6; ++i) call.scalars[i] = call_.scalars[i + 2];
  }
  // Rows of [T, H, D] as [1, H, L, D].
  static View rows(const View& of, KeyRange range) {
    View view;
    if (of.dtype == Dtype::none) return view;  // not wanted; of no rows, it is there without data
    view.data = static_cast<char*>(of.data) + range.first * of.strides[0] * bytes_of(of.dtype);
    view.dtype = of.dtype;
    view.rank = 4;
    const int64_t sizes[] = {1, of.sizes[1], range.last - range.first, of.sizes[2]};
    const int64_t strides[] = {0, of.strides[1], of.strides[0], 1};
    for (int axis = 0; axis < 4; ++axis) {
      view.sizes[axis] = sizes[axis];
      view.strides[axis] = strides[axis];
    }
    return view;
  }
  // A number a query: [H, T] for all, [1, H, L] for a segment.
  T* segment(const View& all, int64_t b, T* to) const {
    const KeyRange range = queries(b);
    for (int64_t h = 0; h < heads(); ++h)
      for (int64_t i = range.first; i < range.last; ++i) *to++ = static_cast<const T*>(all.data)[h * queries() + i];
    return to;
  }
  void put_segment(const T* from, int64_t b, const View& all) const {
    const KeyRange range = queries(b);
    for (int64_t h = 0; h < heads(); ++h)
      for (int64_t i = range.first; i < range.last; ++i) static_cast<T*>(all.data)[h * queries() + i] = *from++;
  }
  static View numbers(const void* data, int64_t n) {
    View view;
    view.data = const_cast<void*>(data);
    view.dtype = Dtype::int64;
    view.rank = 1;
    view.sizes[0] = n;
    view.strides[0] = 1;
    return view;
  }

 private:
  const Call& call_;
  const int first_;
  const int64_t *const query_ends_, *const key_ends_, *const prefixes_, *const seed_;
};

// Tensors: the packed problem's, out, lse.
template <class T>
void forward_varlen(const Call& call) {
  const Packed<T> packed(call, 0);
  packed.for_each_segment([&](int64_t b, int threads) {
    const KeyRange queries = packed.queries(b);
    Call one;
    int64_t seed[2];
    packed.put(b, one, 0, seed);
    one.tensors[Problem<T>::kInputs] = packed.rows(call[Packed<T>::kInputs], queries);
    T* const lse = segment_rows.reserve<T>(packed.heads() * (queries.last - queries.first) + 1);
    one.tensors[Problem<T>::kInputs + 1].data = lse;
    one.threads = threads;
    forward<T>(one);
    packed.put_segment(lse, b, call[Packed<T>::kInputs + 1]);
  });
}

// Tensors: grad, grad_lse, the packed problem's, out, lse, and the gradients of q, k and v.
template <class T>
void backward_varlen(const Call& call) {
  constexpr int kGrads = 2, kOuts = kGrads + Packed<T>::kInputs, kOneOuts = kGrads + Problem<T>::kInputs;
  const Packed<T> packed(call, kGrads);
  packed.for_each_segment([&](int64_t b, int threads) {
    const KeyRange queries = packed.queries(b);
    Call one;
    int64_t seed[2];
    packed.put(b, one, kGrads, seed);
    T* const grad_lse = segment_rows.reserve<T>(2 * packed.heads() * (queries.last - queries.first) + 1);
    one.tensors[1].data = grad_lse;
    one.tensors[kOneOuts + 1].data = packed.segment(call[1], b, grad_lse);
    packed.segment(call[kOuts + 1], b, static_cast<T*>(one.tensors[kOneOuts + 1].data));
    one.tensors[0] = packed.rows(call[0], queries);
    one.tensors[kOneOuts] = packed.rows(call[kOuts], queries);
    const KeyRange keys = packed.keys(b);
    one.tensors[kOneOuts + 2] = packed.rows(call[kOuts + 2], queries);
    one.tensors[kOneOuts + 3] = packed.rows(call[kOuts + 3], keys);
    one.tensors[kOneOuts + 4] = packed.rows(call[kOuts + 4], keys);
    one.threads = threads;
    backward<T>(one);
  });
}

}  // namespace attention
}  // namespace MMKERN_ISA
}  // namespace mmkern
