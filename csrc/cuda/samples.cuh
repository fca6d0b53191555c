// What the kernels of the diffusion family share: numbers of samples, masks, parts of samples. Laid out alike in
// mmkern/backends/cuda_diffusion.py.
#pragma once

#include "pieces.cuh"

namespace mmkern {
inline namespace device {

struct SampleSizes : PieceSizes {
  i64 of_sample[3];  // strides of the sample's number

  MMKERN_FN i64 sample(const GridPlace& at) const {
    return at.batch * of_sample[0] + at.head * of_sample[1] + at.place * of_sample[2];
  }
};

// In float32, expanded to the sample's shape.
struct Mask {
  GridRows rows;
  i64 of_columns;  // or one number a row

  MMKERN_FN void load(float (&v)[kColumns], const Columns& columns, const GridPlace& at) const {
    if (of_columns) return columns.load_floats(v, static_cast<const float*>(rows.data), at.in(rows));
    const float all = at.number(rows);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) v[k] = all;
  }
};

// A row of numbers for each sample, or one for all; null where there are none.
template <class Row>
struct OfSamples {
  const Row* data;
  i64 stride;

  MMKERN_FN const Row* of(i64 sample) const { return data ? data + sample * stride : nullptr; }
};

// Pieces of a sample are neighbours; a block takes a part of them.
struct SampleParts {
  i64 units, units_a_part;  // of a sample
  i64 parts;

  // f(unit) for each that this thread's group takes.
  template <class F>
  MMKERN_FN void for_each_unit(int lanes, F f) const {
    const int group = int(threadIdx.x) / lanes, groups = int(blockDim.x) / lanes;
    const i64 sample = i64(blockIdx.x) / parts, first = (i64(blockIdx.x) - sample * parts) * units_a_part;
    const i64 end = first + units_a_part < units ? first + units_a_part : units;
    for (i64 i = first + group; i < end; i += groups) f(sample * units + i);
  }
};

}  // namespace device
}  // namespace mmkern
