// Kernels that make each element of their results from what is in its place in other tensors, whatever lies between.
#pragma once

#include "grid_rows.h"
#include "stored.h"

namespace mmkern {
inline namespace MMKERN_ISA {

// The tensors of a call, which `with_fewest_axes` has made, along one row.
template <class T>
class Elements {
 public:
  using V = Vec<T, kLanes<T> * sizeof(T) == 64 ? 4 : 2>;

  struct Place {
    int64_t i;
    int n;  // elements; V::size but at the end of a row

    template <class S>
    MMKERN_FN V load(const S* row) const {
      return n == V::size ? V::load(row + i) : V::load(row + i, n);
    }
    // The same, and what lies ahead is asked for: that pays for one or two tensors, not for all of a step's.
    template <class S>
    MMKERN_FN V fetch(const S* row) const {
      prefetch<false>(row);
      return load(row);
    }
    // The hardware fetches less far ahead of stores than of loads: see At::store.
    template <bool kStream, class S>
    MMKERN_FN void store(S* row, V v) const {
      if (!kStream) prefetch<true>(row);
      n == V::size ? v.template store<kStream>(row + i) : v.store(row + i, n);
    }

   private:
    template <bool kToStore, class S>
    MMKERN_FN void prefetch(S* row) const {
      constexpr int kLine = 64 / int(sizeof(S)), kAhead = 512 / int(sizeof(S));
      for (int line = 0; line < V::size; line += kLine) __builtin_prefetch(row + i + kAhead + line, kToStore);
    }
  };

  Elements(const Call& call, int lead, int64_t row) : call_(call), rows_(call, lead, row) {
    for (int slot = 0; slot < kMaxTensors; ++slot)
      is_one_[slot] = call[slot] && call[slot].strides[call[slot].rank - 1] == 0;
    find_places();
  }

  void operator++() {
    ++rows_;
    find_places();
  }

  bool has(int slot) const { return bool(places_[slot]); }
  // Of a tensor of T that moves along leading axes alone; null where it is not there.
  const T* numbers(int slot) const { return places_[slot].template as<const T>(); }

  MMKERN_FN V load(int slot, Place at) const {
    V v;
    places_[slot].here_with([&](const auto* from) __attribute__((always_inline)) {
      v = is_one_[slot] ? V(Vec<T>::load(from, 1)[0]) : at.load(from);
    });
    return v;
  }
  MMKERN_FN V fetch(int slot, Place at) const {
    if (is_one_[slot]) return load(slot, at);
    V v;
    places_[slot].here_with([&](const auto* from) __attribute__((always_inline)) { v = at.fetch(from); });
    return v;
  }
  template <bool kStream>
  MMKERN_FN void store(int slot, Place at, V v) const {
    places_[slot].here_with([&](auto* to) __attribute__((always_inline)) { at.template store<kStream>(to, v); });
  }

  // Elements from `begin` on, as T: where they lie, or in room for them; null where the tensor is not there.
  const T* read(int slot, int64_t begin, int64_t n, T* room) const {
    if (!has(slot)) return nullptr;
    if (is_one_[slot]) {
      const V all = load(slot, {0, 1});
      each(0, n,
           [=](Place at) { at.n == V::size ? V(all[0]).store(room + at.i) : V(all[0]).store(room + at.i, at.n); });
      return room;
    }
    if (const T* const there = place(slot, begin)) return there;
    (places_[slot] + begin).read(n, room);
    return room;
  }
  // Where they lie, or null if they are not stored as T.
  T* place(int slot, int64_t begin) const {
    T* const row = places_[slot].as_they_are();
    return row ? row + begin : nullptr;
  }
  void write(int slot, int64_t begin, int64_t n, const T* from, bool stream) const {
    (places_[slot] + begin).write(n, from, stream);
  }

  // f(place) for elements begin to end.
  template <class F>
  static MMKERN_FN void each(int64_t begin, int64_t end, F f) {
    int64_t i = begin;
    for (; i + V::size <= end; i += V::size) f(Place{i, V::size});
    if (i < end) f(Place{i, int(end - i)});
  }

 private:
  void find_places() {
    for (int slot = 0; slot < kMaxTensors; ++slot)
      if (call_[slot]) places_[slot] = Stored<T>(call_[slot]) + rows_.offset(slot);
  }

  const Call& call_;
  CallRows rows_;
  Stored<T> places_[kMaxTensors];  // where the row begins
  bool is_one_[kMaxTensors];       // one number along the row
};

// The rows of a tensor, cut into pieces that are worth a thread's while.
class Pieces {
 public:
  static constexpr int64_t kSize = 4096;

  explicit Pieces(const View& x)
      : rows_(::mmkern::count(x, x.rank - 1)), cols_(x.sizes[x.rank - 1]), each_((cols_ + kSize - 1) / kSize) {}

  int64_t count() const { return rows_ * each_; }
  int64_t begin(int64_t piece) const { return piece % each_ * kSize; }
  int64_t end(int64_t piece) const { return begin(piece) + kSize < cols_ ? begin(piece) + kSize : cols_; }
  int64_t first_element(int64_t piece) const { return piece / each_ * cols_ + begin(piece); }

  // f(of, piece) for each, with of = make(row), which walks from row to row.
  template <class Make, class F>
  void for_each(int threads, Make make, F f) const {
    parallel_rows(count(), 8 * (cols_ < kSize ? cols_ : kSize), threads, [&](int64_t first, int64_t last) {
      auto of = make(first / each_);
      for (int64_t piece = first; piece < last; ++piece) {
        f(of, piece);
        if (end(piece) == cols_) ++of;
      }
      store_fence();
    });
  }

 private:
  int64_t rows_, cols_, each_;
};

// Whether a result goes past the caches: only one without gaps does.
inline Rows<char> without_gaps(const View& view) {
  if (!view || view.rank > 1) return {nullptr, 0, 0, 0};
  return {static_cast<char*>(view.data), 1, view.sizes[0] * bytes_of(view.dtype), 0};
}

}  // namespace MMKERN_ISA
}  // namespace mmkern
