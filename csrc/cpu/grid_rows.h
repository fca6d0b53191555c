// The rows of [..., D] tensors of any strides, walked together.
#pragma once

#include "../call.h"
#include "parallel.h"

namespace mmkern {
inline namespace MMKERN_ISA {

// Where one row after another begins in each of K views: [..., D], or [...] of one number a row. The order is that in
// which the rows of the first lie in memory.
template <int K>
class GridRows {
 public:
  GridRows(const View* const (&views)[K], int leading) : axes_(leading) {
    for (int axis = 0; axis < leading; ++axis) {
      int at = axis;  // insertion by stride, the largest first
      for (; at > 0 && views[0]->strides[axis] > strides_[0][at - 1]; --at) move(at - 1, at);
      sizes_[at] = views[0]->sizes[axis];
      for (int k = 0; k < K; ++k) strides_[k][at] = *views[k] ? views[k]->strides[axis] : 0;
      count_ *= sizes_[at];
    }
  }

  int64_t count() const { return count_; }

  // f(row, at) for rows begin, ..., end - 1; the row begins at element at[k] of view k.
  template <class F>
  void visit(int64_t begin, int64_t end, F f) const {
    int64_t index[kMaxRank], at[K] = {};
    int64_t rest = begin;
    for (int axis = axes_ - 1; axis >= 0; --axis) {
      index[axis] = rest % sizes_[axis];
      rest /= sizes_[axis];
      for (int k = 0; k < K; ++k) at[k] += index[axis] * strides_[k][axis];
    }
    for (int64_t row = begin; row < end; ++row) {
      f(row, at);
      for (int axis = axes_ - 1; axis >= 0; --axis) {
        for (int k = 0; k < K; ++k) at[k] += strides_[k][axis];
        if (++index[axis] < sizes_[axis]) break;
        for (int k = 0; k < K; ++k) at[k] -= sizes_[axis] * strides_[k][axis];
        index[axis] = 0;
      }
    }
  }

 private:
  void move(int from, int to) {
    sizes_[to] = sizes_[from];
    for (int k = 0; k < K; ++k) strides_[k][to] = strides_[k][from];
  }

  int axes_;
  int64_t sizes_[kMaxRank], strides_[K][kMaxRank], count_ = 1;
};

}  // namespace MMKERN_ISA
}  // namespace mmkern
