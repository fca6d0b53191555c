// Rows that lie as they like: a stride for each of batch, head and place. The structs are laid out alike in
// mmkern/backends/cuda_tensors.py.
#pragma once

#include "device.cuh"

namespace mmkern {
inline namespace device {

// The rows of [batch, heads, length, channels], or their numbers [batch, heads, length].
struct GridRows {
  void* data;  // null: not there
  i64 strides[3];
};

struct GridSizes {
  i64 rows;
  int heads, length, cols;
  int lanes;  // that share a row: a power of two, or whole warps
  Dtype dtype;
  int vectors;  // rows begin and end at multiples of 16 bytes
};

// Which row a group takes; one without any reads and writes nothing, but meets the others in the sums.
struct GridPlace {
  bool active;
  i64 row, batch;
  int head, place;

  MMKERN_FN GridPlace(const GridSizes& n, i64 given, i64 end) : active(given < end), row(active ? given : 0) {
    const i64 of_head = row / n.length;
    place = int(row - of_head * n.length);
    batch = of_head / n.heads;
    head = int(of_head - batch * n.heads);
  }
  MMKERN_FN i64 in(const GridRows& x) const {
    return batch * x.strides[0] + head * x.strides[1] + place * x.strides[2];
  }
  MMKERN_FN float number(const GridRows& x) const { return static_cast<const float*>(x.data)[in(x)]; }
  MMKERN_FN void set_number(const GridRows& x, float value) const {
    if (x.data) static_cast<float*>(x.data)[in(x)] = value;
  }
};

// f(place), by all threads together, for every row that this thread's group takes.
template <class F>
MMKERN_FN void for_each_row(const GridSizes& n, F f) {
  const int group = int(threadIdx.x) / n.lanes, groups = int(blockDim.x) / n.lanes;
  for (i64 base = i64(blockIdx.x) * groups; base < n.rows; base += i64(gridDim.x) * groups)
    f(GridPlace(n, base + group, n.rows));
}

// Rows that share something are a run of neighbours, of which a block takes a few.
struct Runs {
  i64 run, rows_a_block;

  // The same of the rows of one block.
  template <class F>
  MMKERN_FN void for_each_row(const GridSizes& n, i64 block, F f) const {
    const int group = int(threadIdx.x) / n.lanes, groups = int(blockDim.x) / n.lanes;
    const i64 blocks = (run + rows_a_block - 1) / rows_a_block, which = block / blocks;
    const i64 first = which * run + (block - which * blocks) * rows_a_block, last = (which + 1) * run;
    const i64 end = first + rows_a_block < last ? first + rows_a_block : last;
    for (i64 base = first; base < end; base += groups) f(GridPlace(n, base + group, end));
  }
};

}  // namespace device
}  // namespace mmkern
