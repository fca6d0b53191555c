// Numbers in their storage type, read and written a stretch at a time as T (float, or double of doubles), so that
// 16-bit types need no loops of their own.
#pragma once

#include "row_ops.h"

namespace mmkern {
inline namespace MMKERN_ISA {

template <class T>
class Stored {
 public:
  Stored() = default;
  Stored(void* data, Dtype dtype) : data_(static_cast<char*>(data)), dtype_(dtype) {}
  explicit Stored(const View& view) : Stored(view.data, view.dtype) {}
  explicit Stored(T* data) : Stored(data, sizeof(T) == sizeof(double) ? Dtype::float64 : Dtype::float32) {}

  explicit operator bool() const { return data_ != nullptr; }
  Stored operator+(int64_t elements) const { return {data_ + elements * bytes_of(dtype_), dtype_}; }

  void read(int64_t n, T* to) const {
    with([&](const auto* from) { for_each_vec<T>(n, [&](auto at) { at.store(to, at.load(from)); }); });
  }
  void write(int64_t n, const T* from, bool stream = false) const {
    with([&](auto* to) { for_each_vec<T>(n, stream, [&](auto at) { at.store(to, at.load(from)); }); });
  }
  // f(S* data)
  template <class F>
  void with(F f) const {
    if constexpr (sizeof(T) == sizeof(double)) {
      f(reinterpret_cast<T*>(data_));
    } else {
      if (dtype_ == Dtype::bfloat16) return f(reinterpret_cast<bf16*>(data_));
      if (dtype_ == Dtype::float16) return f(reinterpret_cast<half*>(data_));
      f(reinterpret_cast<T*>(data_));
    }
  }
  // As what `with` has shown them to be.
  template <class S>
  MMKERN_FN S* as() const {
    return reinterpret_cast<S*>(data_);
  }
  // Where the numbers are T already, else null.
  T* as_they_are() const {
    const bool same = dtype_ == (sizeof(T) == sizeof(double) ? Dtype::float64 : Dtype::float32);
    return same ? reinterpret_cast<T*>(data_) : nullptr;
  }

  // n of them as T: where they lie, or in the room.
  const T* numbers(int64_t n, T* room) const {
    if (const T* const there = as_they_are()) return there;
    read(n, room);
    return room;
  }
  // Where to write n of them as T, and `finish` then: where they are to lie, or the room.
  T* target(T* room) const {
    T* const there = as_they_are();
    return there ? there : room;
  }
  void finish(int64_t n, const T* written, bool stream) const {
    if (written != reinterpret_cast<const T*>(data_)) write(n, written, stream);
  }

 private:
  char* data_ = nullptr;
  Dtype dtype_ = Dtype::none;
};

}  // namespace MMKERN_ISA
}  // namespace mmkern
