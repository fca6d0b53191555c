// Kernels that make each element of their results from what is in its place in other tensors, whatever lies between.
#pragma once

#include <optional>

#include "grid_rows.h"
#include "stored.h"

namespace mmkern {
inline namespace MMKERN_ISA {

// The tensors of a call, after `merge_axes`, along one row, of which they are read and written a stretch
// at a time: loops then know what there is, and of which type.
template <class T>
class Elements {
 public:
  using V = Vec<T, kLanes<T> * sizeof(T) == 64 ? 4 : 2>;

  template <bool kStream>
  struct PlaceOf {
    int64_t i;
    int n;  // elements; V::size but at the end of a row

    MMKERN_FN V load(const T* row) const { return n == V::size ? V::load(row + i) : V::load(row + i, n); }
    // The same, and what lies so far ahead is asked for: that pays for one or two tensors, not for all of a step's.
    template <int kBytesAhead>
    MMKERN_FN V fetch(const T* row) const {
      prefetch<false, kBytesAhead>(row);
      return load(row);
    }
    // The hardware fetches less far ahead of stores than of loads: see At::store.
    MMKERN_FN void store(T* row, V v) const {
      if (!kStream) prefetch<true, 512>(row);
      n == V::size ? v.template store<kStream>(row + i) : v.store(row + i, n);
    }
    // For what is read again at once.
    MMKERN_FN void keep(T* row, V v) const { n == V::size ? v.store(row + i) : v.store(row + i, n); }

   private:
    template <bool kToStore, int kBytesAhead>
    MMKERN_FN void prefetch(const T* row) const {
      constexpr int kLine = 64 / int(sizeof(T)), kAhead = kBytesAhead / int(sizeof(T));
      for (int line = 0; line < V::size; line += kLine) __builtin_prefetch(row + i + kAhead + line, kToStore);
    }
  };
  using Place = PlaceOf<false>;

  // `rooms`: for stretches of this many slots, and as many numbers more as are asked for.
  Elements(const Call& call, int lead, int64_t row, int rooms, int64_t more = 0)
      : call_(call),
        rows_(call, lead, row),
        stretch_(has_16_bits(call) ? kStretch : 2 * kStretch),
        numbers_in_rooms_(rooms * stretch_ + more) {
    rows_.for_each_tensor([&](int slot) { is_one_[slot] = call[slot].strides[call[slot].rank - 1] == 0; });
    find_places();
  }

  void operator++() {
    ++rows_;
    find_places();
  }

  bool has(int slot) const { return bool(places_[slot]); }
  // Of a tensor of T that moves along leading axes alone; null where it is not there.
  const T* numbers(int slot) const { return places_[slot].template as<const T>(); }

  // A part of a row, short enough for a near cache to hold what is made of it on the way. Where most numbers lie as T,
  // and need no room, it is twice as long: a call's tensors are looked up for each.
  static constexpr int64_t kStretch = 1024;
  struct Stretch {
    int64_t begin, n;
  };
  template <class F>
  static void for_each_stretch(int64_t most, int64_t begin, int64_t end, F f) {
    for (int64_t i = begin; i < end; i += most) f(Stretch{i, i + most < end ? most : end - i});
  }
  template <class F>
  void for_each_stretch(int64_t begin, int64_t end, F f) const {
    for_each_stretch(stretch_, begin, end, f);
  }

  // Of a slot, or of something else that a kernel makes on the way.
  T* room(int slot) const {
    if (!rooms_) rooms_.emplace(numbers_in_rooms_);
    return rooms_->data + slot * stretch_;
  }
  // Whether what was placed there is yet to be brought where it is to lie.
  bool is_room(int slot, const T* place) const { return rooms_ && place == room(slot); }

  // The numbers of a stretch as T: where they lie, or in the slot's room; null where the tensor is not there.
  const T* read(int slot, Stretch at) const {
    if (!has(slot)) return nullptr;
    const Stored<T> from = places_[slot] + at.begin;
    if (is_one_[slot]) {
      T* const to = room(slot);
      places_[slot].read(1, to);
      const V all(to[0]);
      each(0, at.n, [=](Place i) { i.keep(to, all); });
      return to;
    }
    const T* const there = from.as_they_are();
    return there ? there : from.numbers(at.n, room(slot));
  }

  // Where to write those of a result, of which `finish` is told then: where they are to lie, or in its room; null where
  // it is not there.
  T* place(int slot, Stretch at) const {
    if (!has(slot)) return nullptr;
    T* const there = (places_[slot] + at.begin).as_they_are();
    return there ? there : room(slot);
  }
  void finish(int slot, Stretch at, const T* written, bool stream) const {
    if (has(slot)) (places_[slot] + at.begin).finish(at.n, written, stream);
  }

  // f(place) for elements begin to end.
  template <bool kStream = false, class F>
  static MMKERN_FN void each(int64_t begin, int64_t end, F f) {
    int64_t i = begin;
    for (; i + V::size <= end; i += V::size) f(PlaceOf<kStream>{i, V::size});
    if (i < end) f(PlaceOf<kStream>{i, int(end - i)});
  }
  // The same, from one to the next: total = f(place, total). A sum captured by reference would live in memory.
  template <bool kStream = false, class F>
  static MMKERN_FN V fold(int64_t n, F f) {
    V total(T(0));
    int64_t i = 0;
    for (; i + V::size <= n; i += V::size) total = f(PlaceOf<kStream>{i, V::size}, total);
    return i < n ? f(PlaceOf<kStream>{i, int(n - i)}, total) : total;
  }
  // The same to what `place` gave for a slot, with stores past the caches where they are final: not to a room.
  template <class F>
  void each_to(int slot, const T* place, int64_t n, bool stream, F f) const {
    stream && !is_room(slot, place) ? each<true>(0, n, f) : each(0, n, f);
  }

 private:
  void find_places() {
    rows_.for_each_tensor([&](int slot) { places_[slot] = Stored<T>(call_[slot]) + rows_.offset(slot); });
  }

  static bool has_16_bits(const Call& call) {
    bool found = false;
    for (const View& view : call.tensors)
      found = found || view.dtype == Dtype::bfloat16 || view.dtype == Dtype::float16;
    return found;
  }

  const Call& call_;
  CallRows rows_;
  const int64_t stretch_;
  Stored<T> places_[kMaxTensors];  // where the row begins
  bool is_one_[kMaxTensors] = {};  // one number along the row
  const int64_t numbers_in_rooms_;
  mutable std::optional<Scratch<T>> rooms_;  // once one is needed
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

}  // namespace MMKERN_ISA
}  // namespace mmkern
