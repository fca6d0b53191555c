// Lorentz centroid: out = m / sqrt(q), q = m_t^2 - c|m|^2, m = sum w_n x_n, m_t = sum w_n t_n,
// t_n = sqrt(1 + c|x_n|^2).
//
// A group of lanes (rows.cuh) takes one set of members. Backward, with q' = -(g.m) q^(-3/2) / 2:
//   m' = g / sqrt(q) - 2c q' m          m_t' = 2 m_t q'
//   w_n' = m'.x_n + m_t' t_n            x_n' = w_n (m' + c m_t'/t_n x_n)
//   c' = -|m|^2 q' + sum w_n m_t' |x_n|^2 / (2 t_n)
#pragma once

#include "device.cuh"

#include "../hyperbolic.h"
#include "rows.cuh"

namespace mmkern {
inline namespace device {

// Laid out alike in mmkern/backends/cuda.py. Strides in elements; outputs are contiguous, null where not wanted.
struct CentroidArgs {
  const void* x;  // [sets, members, cols]
  i64 x_set_stride, x_member_stride;
  const void* weights;  // [sets, members]
  i64 weight_set_stride, weight_member_stride;
  const void* grad;  // [sets, cols]
  i64 grad_stride;
  void* out;         // [sets, cols]
  void* x_to;        // [sets, members, cols]
  void* weights_to;  // [sets, members]
  float* curvature_partials;
  float* scratch;  // [sets, whole chunks of columns], where a row has more than one
  i64 sets, members;
  Scalar curvature;
  int cols, lanes;
  Dtype dtype;
  int vectors;
};

// One set in the hands of a group. `m` is kept for the last chunk of columns; the others are made again when asked for.
struct CentroidSet {
  const CentroidArgs& a;
  Columns columns;
  i64 set;
  int last;
  bool active;
  float c;
  float m[kColumns];
  float time;

  MMKERN_FN float weight(i64 n) const {
    if (!active) return 0;
    return load_one(a.weights, set * a.weight_set_stride + n * a.weight_member_stride, a.dtype);
  }
  MMKERN_FN void load(float (&v)[kColumns], i64 n, int first) {
    columns.first = first;
    columns.load(v, a.x, set * a.x_set_stride + n * a.x_member_stride);
  }
  MMKERN_FN float time_of(float xx) const { return lorentz_time(xx, c); }

  MMKERN_FN void add_weighted(float (&to)[kColumns], float w, const float (&v)[kColumns]) const {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) to[k] = fma(w, v[k], to[k]);
  }

  // m of the last chunk, and the whole of m_t.
  MMKERN_FN void gather() {
    time = 0;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) m[k] = 0;
    for (i64 n = 0; n < a.members; ++n) {
      const float w = weight(n);
      float xx[1] = {}, v[kColumns];
      for (int first = 0; first <= last; first += columns.chunk()) {
        load(v, n, first);
#pragma unroll
        for (int k = 0; k < kColumns; ++k) xx[0] = fma(v[k], v[k], xx[0]);
      }
      add_weighted(m, w, v);
      sum_over_group(xx, a.lanes);
      time = fma(w, time_of(xx[0]), time);
    }
  }

  MMKERN_FN void gather(float (&to)[kColumns], int first) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) to[k] = first == last ? m[k] : 0;
    if (first == last) return;
    for (i64 n = 0; n < a.members; ++n) {
      float v[kColumns];
      load(v, n, first);
      add_weighted(to, weight(n), v);
    }
  }

  // The k-th column of this lane in the chunk from `first`.
  MMKERN_FN float& scratch(int first, int k) const {
    return a.scratch[set * (last + columns.chunk()) + first + k * a.lanes + columns.lane];
  }
};

// Calls work(set) for every set of this group; all threads of a block come along.
template <class Work>
MMKERN_FN void for_each_set(const CentroidArgs& a, Work work) {
  const int group = int(threadIdx.x) / a.lanes, groups = int(blockDim.x) / a.lanes;
  const Columns columns{0, a.cols, int(threadIdx.x) % a.lanes, a.lanes, a.vectors, a.dtype};
  CentroidSet set{a, columns, 0, (a.cols - 1) / columns.chunk() * columns.chunk(), true, a.curvature.get(), {}, 0};
  for (i64 base = i64(blockIdx.x) * groups; base < a.sets; base += i64(gridDim.x) * groups) {
    set.active = base + group < a.sets;
    set.set = set.active ? base + group : 0;
    set.columns.cols = set.active ? a.cols : 0;
    work(set);
  }
}

__global__ void __launch_bounds__(kMaxLanes, 1) centroid(const CentroidArgs a) {
  for_each_set(a, [&](CentroidSet& set) {
    set.gather();
    float squares[1] = {};
    for (int first = 0; first <= set.last; first += set.columns.chunk()) {
      float m[kColumns];
      set.gather(m, first);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) squares[0] = fma(m[k], m[k], squares[0]);
    }
    sum_over_group(squares, a.lanes);
    const float scale = 1 / sqrt(set.time * set.time - set.c * squares[0]);
    for (int first = 0; first <= set.last; first += set.columns.chunk()) {
      float m[kColumns];
      set.gather(m, first);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) m[k] *= scale;
      set.columns.first = first;
      set.columns.store(m, a.out, set.set * a.cols);
    }
  });
}

__global__ void __launch_bounds__(kMaxLanes, 1) centroid_backward(const CentroidArgs a) {
  float curvature = 0;
  for_each_set(a, [&](CentroidSet& set) {
    Columns& columns = set.columns;
    const int chunk = columns.chunk();
    const i64 row = set.set * a.members;
    set.gather();
    enum { kMM, kGM };
    float sums[2] = {}, g[kColumns];
    for (int first = 0; first <= set.last; first += chunk) {
      float m[kColumns];
      set.gather(m, first);
      columns.first = first;
      columns.load(g, a.grad, set.set * a.grad_stride);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        sums[kMM] = fma(m[k], m[k], sums[kMM]);
        sums[kGM] = fma(g[k], m[k], sums[kGM]);
        if (first != set.last && set.active) set.scratch(first, k) = m[k];
      }
    }
    sum_over_group(sums, a.lanes);
    const float q = set.time * set.time - set.c * sums[kMM], inverse_root = 1 / sqrt(q);
    const float by_q = -0.5f * sums[kGM] * inverse_root / q, by_time = 2 * set.time * by_q;
    // m becomes m'.
#pragma unroll
    for (int k = 0; k < kColumns; ++k) set.m[k] = fma(inverse_root, g[k], -2 * set.c * by_q * set.m[k]);
    for (int first = 0; first < set.last && set.active; first += chunk) {
      columns.first = first;
      columns.load(g, a.grad, set.set * a.grad_stride);
#pragma unroll
      for (int k = 0; k < kColumns; ++k)
        set.scratch(first, k) = fma(inverse_root, g[k], -2 * set.c * by_q * set.scratch(first, k));
    }
    float by_curvature = -sums[kMM] * by_q;
    for (i64 n = 0; n < a.members; ++n) {
      const float w = set.weight(n);
      enum { kXX, kMX };
      float products[2] = {}, v[kColumns];
      for (int first = 0; first <= set.last; first += chunk) {
        set.load(v, n, first);
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          const float by_m = first == set.last ? set.m[k] : set.active ? set.scratch(first, k) : 0;
          products[kXX] = fma(v[k], v[k], products[kXX]);
          products[kMX] = fma(v[k], by_m, products[kMX]);
        }
      }
      sum_over_group(products, a.lanes);
      const float time = set.time_of(products[kXX]), by_x = set.c * by_time / time;
      by_curvature += w * by_time * products[kXX] / (2 * time);
      if (a.weights_to && set.active && columns.lane == 0)
        store_one(a.weights_to, row + n, fma(by_time, time, products[kMX]), a.dtype);
      for (int first = set.last; first >= 0 && a.x_to && set.active; first -= chunk) {
        if (first != set.last) set.load(v, n, first);
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          const float by_m = first == set.last ? set.m[k] : set.scratch(first, k);
          v[k] = w * fma(by_x, v[k], by_m);
        }
        columns.first = first;
        columns.store(v, a.x_to, (row + n) * a.cols);
      }
    }
    if (set.active && columns.lane == 0) curvature += by_curvature;
  });
  if (!a.curvature_partials) return;
  curvature = sum_over_block(curvature);
  if (threadIdx.x == 0) a.curvature_partials[blockIdx.x] = curvature;
}

}  // namespace device
}  // namespace mmkern
