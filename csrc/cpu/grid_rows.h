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

// Gives a call as few axes as may be: neighbours that all tensors walk over as one become one, and what tensor `lead`
// has more than once and another has once is expanded. All tensors have the rank of `lead`, or no axis; of those, rows
// are dense or expanded.
inline void merge_axes(Call& call, int lead) {
  const View x = call[lead];
  const int last = x.rank - 1;
  View* there[kMaxTensors];
  int count = 0;
  for (View& view : call.tensors) {
    if (!view) view.rank = 0;
    if (view) there[count++] = &view;
  }
  for (int i = 0; i < count; ++i) {
    View& view = *there[i];
    for (int axis = 0; axis <= last; ++axis) {
      if (view.sizes[axis] == 1) view.strides[axis] = x.sizes[axis] == 1 && axis == last ? 1 : 0;
      view.sizes[axis] = x.sizes[axis];
    }
  }
  int kept = last;  // the axes from here on are those of the result
  for (int axis = last - 1; axis >= 0; --axis) {
    bool is_one = true;
    for (int i = 0; i < count; ++i) {
      const View& view = *there[i];
      is_one = is_one && (x.sizes[axis] == 1 || view.strides[axis] == view.strides[kept] * view.sizes[kept]);
    }
    if (!is_one) --kept;
    for (int i = 0; i < count; ++i) {
      View& view = *there[i];
      if (is_one) {
        view.sizes[kept] *= x.sizes[axis];
      } else {
        view.sizes[kept] = x.sizes[axis];
        view.strides[kept] = view.strides[axis];
      }
    }
  }
  for (int i = 0; i < count; ++i) {
    View& view = *there[i];
    view.rank = last + 1 - kept;
    for (int axis = 0; axis < view.rank; ++axis) {
      view.sizes[axis] = view.sizes[kept + axis];
      view.strides[axis] = view.strides[kept + axis];
    }
  }
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

// The same over all tensors of a call that has put them on the axes of tensor `lead`.
class CallRows {
 public:
  CallRows(const Call& call, int lead, int64_t row) : call_(call), leading_(call[lead].rank - 1) {
    for (int i = 0; i < kMaxTensors; ++i)
      if (call[i]) there_[count_++] = i;
    for (int axis = leading_ - 1; axis >= 0; --axis) {
      sizes_[axis] = call[lead].sizes[axis];
      index_[axis] = row % sizes_[axis];
      row /= sizes_[axis];
      move(axis, index_[axis]);
    }
  }

  int64_t offset(int tensor) const { return offsets_[tensor]; }
  // f(tensor) for those that are there.
  template <class F>
  void for_each_tensor(F f) const {
    for (int k = 0; k < count_; ++k) f(there_[k]);
  }
  void operator++() {
    for (int axis = leading_ - 1; axis >= 0; --axis) {
      move(axis, 1);
      if (++index_[axis] < sizes_[axis]) return;
      move(axis, -index_[axis]);
      index_[axis] = 0;
    }
  }

 private:
  void move(int axis, int64_t by) {
    for_each_tensor([&](int i) { offsets_[i] += by * call_[i].strides[axis]; });
  }

  const Call& call_;
  int leading_, count_ = 0, there_[kMaxTensors];
  int64_t sizes_[kMaxRank], index_[kMaxRank], offsets_[kMaxTensors] = {};
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
