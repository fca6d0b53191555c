// Rows of [..., D] with a stride for each leading axis, as a head of attention lies in a projection.
#pragma once

#include "../call.h"
#include "rows.h"

namespace mmkern {
inline namespace MMKERN_ISA {

// The same call with the leading axes of its tensors in the order in which those of tensor `lead` lie in memory, the
// outermost first: neighbouring rows then are neighbours there. Tensors of another rank stay as they are.
inline Call in_memory_order(const Call& call, int lead) {
  Call ordered = call;
  const View& x = call[lead];
  int order[kMaxRank];
  for (int axis = 0; axis < x.rank - 1; ++axis) {
    int place = axis;
    for (; place > 0 && x.strides[order[place - 1]] < x.strides[axis]; --place) order[place] = order[place - 1];
    order[place] = axis;
  }
  for (View& view : ordered.tensors) {
    if (!view || view.rank != x.rank) continue;
    const View given = view;
    for (int axis = 0; axis < x.rank - 1; ++axis) {
      view.sizes[axis] = given.sizes[order[axis]];
      view.strides[axis] = given.strides[order[axis]];
    }
  }
  return ordered;
}

// Walks over the first `leading` axes of a view, the last of them fastest, from `row` on. What it points to is the
// offset of the row's first element.
class RowWalk {
 public:
  RowWalk(const View& view, int leading, int64_t row) : view_(view), leading_(view ? leading : 0) {
    for (int axis = leading_ - 1; axis >= 0; --axis) {
      index_[axis] = row % view.sizes[axis];
      row /= view.sizes[axis];
      offset_ += index_[axis] * view.strides[axis];
    }
  }

  int64_t operator*() const { return offset_; }
  void operator++() {
    for (int axis = leading_ - 1; axis >= 0; --axis) {
      offset_ += view_.strides[axis];
      if (++index_[axis] < view_.sizes[axis]) return;
      offset_ -= index_[axis] * view_.strides[axis];
      index_[axis] = 0;
    }
  }

 private:
  const View& view_;
  int leading_;
  int64_t index_[kMaxRank], offset_ = 0;
};

// The same of one tensor's elements of type S; null where the tensor is.
template <class S>
class GridRows {
 public:
  GridRows(const View& view, int leading, int64_t row) : data_(static_cast<S*>(view.data)), walk_(view, leading, row) {}

  S* operator*() const { return data_ ? data_ + *walk_ : nullptr; }
  void operator++() { ++walk_; }

 private:
  S* data_;
  RowWalk walk_;
};

}  // namespace MMKERN_ISA
}  // namespace mmkern
