// Where the results of a block of rows go.
#pragma once

#include "attention.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace attention {

inline thread_local ThreadBuffer results_block;

// A row of `out` for each of a block's: where it stays, or in a buffer until it is rounded to a shorter type.
template <class T>
class Results {
 public:
  Results(const RowBlock<T>& block, const View& out, int64_t width)
      : block_(block), out_(out), width_(width), buffered_(!Stored<T>(out).as_they_are()) {
    T* const buffer = buffered_ ? results_block.reserve<T>(kBlockRows<T> * width_ + 1) : nullptr;
    block.for_each_run(out, [&](int64_t r, int64_t n, int64_t place) {
      T* const to = buffered_ ? buffer + r * width_ : (Stored<T>(out) + place).as_they_are();
      for (int64_t i = 0; i < n; ++i) rows_[r + i] = to + i * width_;
    });
  }

  // A function of (r, d, value, adds) that takes lanes from d on of row r, and adds them to what is there if `adds`.
  auto put() const {
    return [rows = rows_, width = width_](int64_t r, int64_t d, Vec<T> value, bool adds)
               __attribute__((always_inline)) {
                 T* const to = rows[r] + d;
                 if (d + Vec<T>::size <= width)
                   (adds ? value + Vec<T>::load(to) : value).store(to);
                 else
                   (adds ? value + Vec<T>::load(to, int(width - d)) : value).store(to, int(width - d));
               };
  }
  // To be called when all have been put.
  void write() const {
    if (!buffered_) return;
    block_.for_each_run(
        out_, [&](int64_t r, int64_t n, int64_t place) { (Stored<T>(out_) + place).write(n * width_, rows_[r]); });
  }

 private:
  const RowBlock<T>& block_;
  const View& out_;
  const int64_t width_;
  const bool buffered_;
  T* rows_[kBlockRows<T>];
};

}  // namespace attention
}  // namespace MMKERN_ISA
}  // namespace mmkern
