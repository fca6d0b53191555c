// Where the results of a block of rows go.
#pragma once

#include "attention.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace attention {

inline thread_local ThreadBuffer results_block;

// A row of `out` for each of a block's: where it stays, or in a buffer while those are of a shorter type.
template <class T>
class Results {
 public:
  Results(const RowBlock<T>& block, const View& out, int64_t width) : block_(block), out_(out), width_(width) {
    T* const buffer = results_block.reserve<T>(kBlockRows<T> * width_ + 1);
    for (int64_t r = 0; r < block.count; ++r) {
      T* const own = at(r).as_they_are();
      rows_[r] = own ? own : buffer + r * width_;
    }
  }

  // Row r, lanes from d on: factor·sum, added to what is there if `adds`.
  MMKERN_FN void put(int64_t r, int64_t d, Vec<T> factor, Vec<T> sum, bool adds) const {
    T* const to = rows_[r] + d;
    if (d + Vec<T>::size <= width_)
      (adds ? fma(factor, sum, Vec<T>::load(to)) : factor * sum).store(to);
    else
      (adds ? fma(factor, sum, Vec<T>::load(to, int(width_ - d))) : factor * sum).store(to, int(width_ - d));
  }
  void write() const {
    for (int64_t r = 0; r < block_.count; ++r)
      if (!at(r).as_they_are()) at(r).write(width_, rows_[r]);
  }

 private:
  Stored<T> at(int64_t r) const {
    const Row& row = block_.rows[r];
    return Problem<T>::at(out_, row.batch, row.head, row.query);
  }

  const RowBlock<T>& block_;
  const View& out_;
  const int64_t width_;
  T* rows_[kBlockRows<T>];
};

}  // namespace attention
}  // namespace MMKERN_ISA
}  // namespace mmkern
